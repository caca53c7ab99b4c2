"""Writes into parts of a tensor, as functional graphs spell them: joins of what is old and what is new.

``x[..., a:b] = y`` arrives as ``slice_scatter(x, copy(x[..., a:b], y), a, b)``, which is
``cat([x[..., :a], y, x[..., b:]])``, and ``x[mask] = 0`` is ``where(mask, 0, x)``. A tensor of which every part is
written is joined from what was written alone: how it was made, uninitialised perhaps, is forgotten.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from kvpass.analysis.sweep import arguments, sym
from kvpass.transforms.spell import JOINS, call, named, replace, size_of

aten = torch.ops.aten
_LAST = 2**63 - 1


def joined(graph: fx.Graph) -> None:
    """Rewrite every write into a range of known place."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.fill.Tensor:
            node.target = aten.copy.default
        if node.target is aten.copy.default:
            _copy(graph, node)
        elif node.target is aten.index_put.default:
            _chosen(graph, node)
        elif node.target in (aten.slice_scatter.default, aten.select_scatter.default):
            _scatter(graph, node)
    for node in list(graph.nodes):
        if node.target is aten.slice_scatter.default and node.users and _given(node).get("step", 1) != 1:
            _strided(graph, node)


def _copy(graph: fx.Graph, node: fx.Node) -> None:
    """The new entries, in the type of those that they replace."""
    old, new = (a.meta["val"] for a in arguments(node)[:2])
    made = arguments(node)[1]
    if [sym(d) for d in old.shape] != [sym(d) for d in new.shape]:
        return
    if old.dtype != new.dtype:
        with graph.inserting_before(node):
            made = call(graph, node, aten._to_copy.default, made, dtype=old.dtype)
    replace(node, made)


def _chosen(graph: fx.Graph, node: fx.Node) -> None:
    """``x[.., mask] = y`` is a choice between the two, where the same `y` is written wherever the mask is true."""
    x, indices, value, *accumulate = arguments(node)
    masks = [k for k, i in enumerate(indices) if i is not None]
    if len(masks) != 1 or any(accumulate) or node.kwargs:
        return
    (at,) = masks
    mask = indices[at]
    if mask.meta["val"].dtype is not torch.bool or value.meta["val"].dtype != x.meta["val"].dtype:
        return
    behind = x.meta["val"].dim() - at - mask.meta["val"].dim()
    sizes = list(value.meta["val"].shape)
    written = sizes[max(0, len(sizes) - behind) :]
    if any(size != 1 for size in sizes[: len(sizes) - len(written)]):
        return
    with graph.inserting_before(node):
        for _ in range(behind):
            mask = call(graph, node, aten.unsqueeze.default, mask, -1)
        for _ in range(len(sizes) - len(written)):
            value = call(graph, node, aten.squeeze.dim, value, 0)
        made = call(graph, node, aten.where.self, mask, value, x)
    replace(node, made)


def _scatter(graph: fx.Graph, node: fx.Node) -> None:
    base, new = arguments(node)[:2]
    given, value = _given(node), node.meta["val"]
    dim = given.get("dim", 0) % value.dim()
    size = value.shape[dim]
    if not isinstance(size, int):
        if _is_everything(given, value, new.meta["val"]):
            replace(node, new)
        elif not _scatter_rows(graph, node, dim):
            _scatter_first_rows(graph, node, dim)
        return
    if given.get("step", 1) != 1:
        _interleave(graph, node, dim, size, given["step"])
        return
    start, end = _bound(given.get("start", given.get("index")), 0, size), _bound(given.get("end"), size, size)
    if start is None or end is None or new.meta["val"].dtype != value.dtype:
        return
    with graph.inserting_before(node):
        if node.target is aten.select_scatter.default:
            end, new = start + 1, call(graph, node, aten.unsqueeze.default, new, dim)
        pieces = [*_range(graph, node, base, dim, 0, start), new, *_range(graph, node, base, dim, end, size)]
        made = pieces[0] if len(pieces) == 1 else call(graph, node, aten.cat.default, pieces, dim)
    replace(node, made)


def _scatter_rows(graph: fx.Graph, node: fx.Node, dim: int) -> bool:
    """``x[:, k:] = y`` and ``x[:, :-k] = y``, along an axis of unknown length; False of another write."""
    base, new = arguments(node)[:2]
    given, value = _given(node), node.meta["val"]
    start, end = given.get("start") or 0, given.get("end")
    end = 0 if end in (None, _LAST) else end
    known = isinstance(start, int) and isinstance(end, int) and start >= 0 >= end
    if "index" in given or given.get("step", 1) != 1 or not known or new.meta["val"].dtype != value.dtype:
        return False
    if sym(new.meta["val"].shape[dim]) - (sym(value.shape[dim]) - start + end) != 0:
        return False
    with graph.inserting_before(node):
        before = [call(graph, node, aten.slice.Tensor, base, dim, 0, start)] if start else []
        after = [call(graph, node, aten.slice.Tensor, base, dim, end, _LAST)] if end else []
        made = call(graph, node, aten.cat.default, [*before, new, *after], dim)
    replace(node, made)
    return True


def _scatter_first_rows(graph: fx.Graph, node: fx.Node, dim: int) -> None:
    """``x[:, k] = y`` and ``x[:, k:k + n] = y``, along an axis of unknown length: a choice by the index."""
    base, new = arguments(node)[:2]
    given, value = _given(node), node.meta["val"]
    start, count = given.get("index", given.get("start")) or 0, sympy.Integer(1)
    if not isinstance(start, int) or start < 0 or given.get("step", 1) != 1:
        return
    if new.meta["val"].dtype != value.dtype:
        return
    if "index" not in given:
        end, count = given.get("end"), sym(new.meta["val"].shape[dim])
        if end is None or size_of(end) != start + count:
            return
    behind = value.dim() - 1 - dim
    with graph.inserting_before(node), value.fake_mode:
        make = partial(call, graph, node)
        place = make(aten.arange.default, make(aten.sym_size.int, base, dim), device=value.device)
        place = make(aten.sub.Tensor, place, start) if start else place
        many: Any = int(count) if count.is_Integer else make(aten.sym_size.int, new, dim)
        written = make(aten.logical_and.default, make(aten.ge.Scalar, place, 0), make(aten.lt.Scalar, place, many))
        new = _source(make, new)
        if "index" in given and new.meta["val"].dim() > behind:
            new = make(aten.unsqueeze.default, new, new.meta["val"].dim() - behind)
        elif count != 1 and new.meta["val"].dim() > behind and new.meta["val"].shape[-1 - behind] != 1:
            last = make(operator.sub, many, 1) if isinstance(many, fx.Node) else many - 1
            new = make(aten.index_select.default, new, -1 - behind, make(aten.clamp.default, place, 0, last))
        for _ in range(behind):
            written = make(aten.unsqueeze.default, written, -1)
        made = make(aten.where.self, written, new, _without_turn(make, base, dim, 0 if start else many))
    replace(node, made)


def _source(make: Callable[..., fx.Node], new: fx.Node) -> fx.Node:
    """What is written, before it is repeated to the sizes of what was there."""
    if new.target is not aten.copy.default:
        return new
    source, dtype = arguments(new)[1], new.meta["val"].dtype
    return source if source.meta["val"].dtype is dtype else make(aten._to_copy.default, source, dtype=dtype)


def _without_turn(make: Callable[..., fx.Node], base: fx.Node, dim: int, count: Any) -> fx.Node:
    """``x.roll(k, dim)`` of which the first ``count >= k`` entries are not read: zeros stand where the last ones do."""
    if base.target is not aten.roll.default:
        return base
    given, rank = named(base), base.meta["val"].dim()
    (by, *others), axes = given["shifts"], [d % rank for d in given["dims"]]
    if others or axes != [dim] or not isinstance(by, int) or not isinstance(count, int) or not 0 < by <= count:
        return base
    padded = make(aten.constant_pad_nd.default, given["self"], [0, 0] * (rank - 1 - dim) + [by, 0], 0)
    return make(aten.slice.Tensor, padded, dim, 0, -by)


def _is_everything(given: dict[str, Any], value: Any, new: Any) -> bool:
    """``x[:] = y`` along an axis of unknown length."""
    ends = given.get("start") in (None, 0) and given.get("end") in (None, _LAST) and given.get("step", 1) == 1
    same = [sym(d) for d in value.shape] == [sym(d) for d in new.shape] and value.dtype == new.dtype
    return "index" not in given and ends and same


def _given(node: fx.Node) -> dict[str, Any]:
    """Where a scatter writes."""
    names = ("dim", "index") if node.target is aten.select_scatter.default else ("dim", "start", "end", "step")
    return dict(zip(names, arguments(node)[2:], strict=False)) | node.kwargs


def _interleave(graph: fx.Graph, node: fx.Node, dim: int, size: int, step: int) -> None:
    """``x[..., ::2] = a; x[..., 1::2] = b``: every place is written, entries of the pieces by turns."""
    rank, pieces, at = node.meta["val"].dim(), dict[int, fx.Node](), node
    while at.target is aten.slice_scatter.default and len(pieces) < step:
        given = _given(at)
        start, end = _bound(given.get("start"), 0, size), _bound(given.get("end"), size, size)
        if given.get("dim", 0) % rank != dim or given.get("step", 1) != step or end != size:
            return
        if start is None or start >= step:
            return
        pieces.setdefault(start, arguments(at)[1])
        at = arguments(at)[0]
    shapes = {tuple(map(sym, piece.meta["val"].shape)) for piece in pieces.values()}
    types = {piece.meta["val"].dtype for piece in pieces.values()}
    if len(pieces) < step or size % step or len(shapes) > 1 or types != {node.meta["val"].dtype}:
        return
    with graph.inserting_before(node):
        turns = call(graph, node, aten.stack.default, [pieces[k] for k in range(step)], dim + 1)
        made = call(graph, node, aten.flatten.using_ints, turns, dim, dim + 1)
    replace(node, made)


def _strided(graph: fx.Graph, node: fx.Node) -> None:
    """``x[..., a:b:step] = y``: of each place and what was written next before it, one is taken."""
    base, new = arguments(node)[:2]
    given, value = _given(node), node.meta["val"]
    dim, step = given.get("dim", 0) % value.dim(), given["step"]
    size = value.shape[dim]
    if not isinstance(size, int) or new.meta["val"].dtype != value.dtype:
        return
    start, end = _bound(given.get("start"), 0, size), _bound(given.get("end"), size, size)
    if start is None or end is None:
        return
    last = start + step * new.meta["val"].shape[dim]
    with graph.inserting_before(node):
        each = call(graph, node, aten.repeat_interleave.self_int, new, step, dim)
        pieces = [
            *_range(graph, node, base, dim, 0, start),
            *_range(graph, node, each, dim, 0, min(last, size) - start),
        ]
        pieces += _range(graph, node, base, dim, last, size)
        spread = call(graph, node, aten.cat.default, pieces, dim)
        ones = call(graph, node, aten.new_ones.default, base, [size], dtype=torch.int64)
        place = call(graph, node, aten.sub.Tensor, call(graph, node, aten.cumsum.default, ones, 0), 1)
        turn = call(graph, node, aten.remainder.Scalar, call(graph, node, aten.sub.Tensor, place, start), step)
        written = call(graph, node, aten.eq.Scalar, turn, 0)
        for bound, limit in ((aten.ge.Scalar, start), (aten.lt.Scalar, end)):
            written = call(graph, node, aten.logical_and.default, written, call(graph, node, bound, place, limit))
        for _ in range(value.dim() - 1 - dim):
            written = call(graph, node, aten.unsqueeze.default, written, -1)
        made = call(graph, node, aten.where.self, written, spread, base)
    replace(node, made)


def _bound(place: Any, default: int, size: int) -> int | None:
    if place is None:
        return default
    if not isinstance(place, int):
        return None
    return max(0, min(place + size if place < 0 else place, size))


def _range(graph: fx.Graph, like: fx.Node, x: fx.Node, dim: int, low: int, high: int) -> list[fx.Node]:
    """Entries ``low .. high`` along an axis, from the pieces of a join where it is one."""
    if low >= high:
        return []
    rank, size = x.meta["val"].dim(), x.meta["val"].shape[dim]
    if (low, high) == (0, size):
        return [x]
    if x.target in JOINS and (arguments(x)[1] if len(arguments(x)) > 1 else 0) % rank == dim:
        out, at = [], 0
        for piece in arguments(x)[0]:
            length = piece.meta["val"].shape[dim]
            out += _range(graph, like, piece, dim, max(low - at, 0), min(high - at, length))
            at += length
        return out
    return [call(graph, like, aten.slice.Tensor, x, dim, low, high)]
