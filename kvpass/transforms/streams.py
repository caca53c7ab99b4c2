"""Rows side by side: several streams of as many rows each, joined on one axis, get an axis of their own.

`cat([x, y], 1)` of two values `[B, S, D]` has `2 S` entries, of which entry `k` belongs to row `k mod S`. Spelled as a
stack that is flattened, `[B, 2, S, D] -> [B, 2 S, D]`, its axis is a product of which one factor is the rows, and what
treats the entries alike needs to know nothing. Cutting the streams apart again is an index on the other factor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from kvpass.analysis.sweep import arguments, dim_of, sym
from kvpass.transforms.spell import JOINS, SPLITS, call, named, replace, sizes

aten = torch.ops.aten


def stacked(graph: fx.Graph, rows: sympy.Symbol) -> None:
    """Rewrite in place.

    Args:
        rows: the length of the text.
    """
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None:
            with graph.inserting_before(node):
                rewrite(graph, node, rows)


def _join(graph: fx.Graph, node: fx.Node, rows: sympy.Symbol) -> None:
    pieces = list(arguments(node)[0])
    rank = node.meta["val"].dim()
    axis = dim_of(node, 1) % rank
    if len(pieces) < 2 or any(piece.meta["val"].dim() != rank for piece in pieces):
        return
    counts = [_streams(piece.meta["val"].shape[axis], rows) for piece in pieces]
    if all(counts):
        parts = [_apart(graph, node, piece, axis, count) for piece, count in zip(pieces, counts, strict=True)]
        replace(node, _together(graph, node, call(graph, node, aten.cat.default, parts, axis), axis))


def _slice(graph: fx.Graph, node: fx.Node, rows: sympy.Symbol) -> None:
    given = named(node)
    x, start = given["self"], given["start"]
    axis = given["dim"] % node.meta["val"].dim()
    count, kept = (_streams(of.meta["val"].shape[axis], rows) for of in (x, node))
    first = _streams(start.meta["val"] if isinstance(start, fx.Node) else start, rows) if start else 0
    if given["step"] == 1 and 0 < kept < count and (first or not start):
        replace(node, _some(graph, node, x, axis, count, first, kept))


def _split(graph: fx.Graph, node: fx.Node, rows: sympy.Symbol) -> None:
    x, axis = arguments(node)[0], dim_of(node, 2) % arguments(node)[0].meta["val"].dim()
    counts = [_streams(piece.shape[axis], rows) for piece in node.meta["val"]]
    if len(counts) < 2 or not all(counts) or any(user.target is not operator.getitem for user in node.users):
        return
    for user in list(node.users):
        k = arguments(user)[1]
        replace(user, _some(graph, node, x, axis, sum(counts), sum(counts[:k]), counts[k]))
    graph.erase_node(node)


def _some(graph: fx.Graph, like: fx.Node, x: fx.Node, axis: int, count: int, first: int, kept: int) -> fx.Node:
    """Streams `first .. first + kept - 1` of `count`."""
    whole = _apart(graph, like, x, axis, count)
    return _together(graph, like, call(graph, like, aten.slice.Tensor, whole, axis, first, first + kept), axis)


def _streams(size: Any, rows: sympy.Symbol) -> int:
    """How many times the rows an axis holds; 0 where that is no number."""
    count = sympy.cancel(sym(size) / rows)
    return int(count) if count.is_Integer and count > 0 else 0


def _apart(graph: fx.Graph, like: fx.Node, x: fx.Node, axis: int, count: int) -> fx.Node:
    """`[.., count * S, ..] -> [.., count, S, ..]`."""
    if count == 1:
        return call(graph, like, aten.unsqueeze.default, x, axis)
    shape = sizes(partial(call, graph, like), x)
    return call(graph, like, aten.reshape.default, x, [*shape[:axis], count, -1, *shape[axis + 1 :]])


def _together(graph: fx.Graph, like: fx.Node, x: fx.Node, axis: int) -> fx.Node:
    """`[.., count, S, ..] -> [.., count * S, ..]`."""
    if x.meta["val"].shape[axis] == 1:
        return call(graph, like, aten.select.int, x, axis, 0)
    shape = sizes(partial(call, graph, like), x)
    return call(graph, like, aten.reshape.default, x, [*shape[:axis], -1, *shape[axis + 2 :]])


_REWRITES: dict[Any, Callable[[fx.Graph, fx.Node, sympy.Symbol], None]] = {
    **dict.fromkeys(JOINS, _join),
    aten.slice.Tensor: _slice,
    **dict.fromkeys(SPLITS, _split),
}
