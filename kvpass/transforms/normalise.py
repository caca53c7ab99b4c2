"""Remove what means nothing and spell what means the same the same way, before anything is analysed.

Identities go (clones, detaches, switched-off dropout, casts to the same dtype), ops with several outputs that are
only slices become slices, assertions on static metadata go. The rules and the rewrite then meet fewer spellings.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kvpass.analysis.sweep import arguments, dim_of, sym
from kvpass.ir import Captured
from kvpass.transforms.blocks import at_once
from kvpass.transforms.composites import decomposed
from kvpass.transforms.convolutions import unrolled
from kvpass.transforms.differences import distributed
from kvpass.transforms.experts import unsorted
from kvpass.transforms.masked import in_order
from kvpass.transforms.normalisers import respelled
from kvpass.transforms.relative import looked_up
from kvpass.transforms.sinks import separate
from kvpass.transforms.spell import JOINS, PADS, SPLITS, call, replace, size_of
from kvpass.transforms.streams import stacked
from kvpass.transforms.writes import joined

aten = torch.ops.aten

_IDENTITIES = (
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.positive.default,
)
_VIEWS = (aten.view.default, aten._unsafe_view.default)
ASSERTIONS = (aten._assert_tensor_metadata.default,)


def normalise(captured: Captured) -> None:
    """Rewrite the graph in place; every new node carries ``meta['val']`` and the user's line."""
    module = captured.module
    graph = module.graph
    decomposed(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ASSERTIONS:
            graph.erase_node(node)
        elif is_identity(node):
            node.replace_all_uses_with(arguments(node)[0])
            graph.erase_node(node)
        elif node.target in _VIEWS:
            node.target = aten.reshape.default  # without the clones a view may need a copy
        elif node.target is aten.type_as.default:
            node.target, node.args = aten._to_copy.default, (arguments(node)[0],)
            node.kwargs = {"dtype": node.meta["val"].dtype}
        elif node.target in (aten.eye.default, aten.eye.m):
            _by_place(graph, node)
        elif node.target is aten.baddbmm.default and node.kwargs.get("beta") == 0:
            _without_bias(graph, node)
        elif node.target in SPLITS or node.target is aten.unbind.int:
            _replace_pieces(graph, node)
    stacked(graph, captured.seq)
    joined(graph)
    at_once(graph)
    in_order(graph)
    looked_up(graph, captured.seq)
    unrolled(graph)
    respelled(captured)
    separate(graph)
    distributed(graph)
    unsorted(graph)
    graph.eliminate_dead_code()
    module.recompile()


def is_identity(node: fx.Node) -> bool:
    """Whether an op returns its first argument, or a copy of it."""
    if node.target in _IDENTITIES:
        return True
    if node.target in (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default):
        return not arguments(node)[2] or arguments(node)[1] == 0.0
    if node.target in (aten._to_copy.default, aten.to.dtype):
        source, result = arguments(node)[0].meta["val"], node.meta["val"]
        return bool(source.dtype == result.dtype and source.device == result.device)
    if node.target in (aten.expand.default, aten.view.default, aten._unsafe_view.default, aten.slice.Tensor):
        source, result = arguments(node)[0].meta["val"], node.meta["val"]
        return [sym(d) for d in source.shape] == [sym(d) for d in result.shape]
    if node.target in PADS:
        return all(size_of(size) == 0 for size in arguments(node)[1])
    return False


def _by_place(graph: fx.Graph, node: fx.Node) -> None:
    """The identity matrix by comparing places: rows of it are made by themselves."""
    value, sizes = node.meta["val"], arguments(node)
    with graph.inserting_before(node), value.fake_mode:
        rows, columns = (call(graph, node, aten.arange.default, n, device=value.device) for n in (sizes[0], sizes[-1]))
        made = call(graph, node, aten.eq.Tensor, call(graph, node, aten.unsqueeze.default, rows, 1), columns)
        made = call(graph, node, aten._to_copy.default, made, dtype=value.dtype)
    replace(node, made)


def _without_bias(graph: fx.Graph, node: fx.Node) -> None:
    """A bias that is multiplied by zero is not read, whatever it holds."""
    alpha = node.kwargs.get("alpha", 1)
    with graph.inserting_before(node):
        made = call(graph, node, aten.bmm.default, *arguments(node)[1:])
        if alpha != 1:
            made = call(graph, node, aten.mul.Tensor, made, alpha)
    replace(node, made)


def without_empty(graph: fx.Graph) -> None:
    """Joins lose pieces that have no entries: the half of a head that a rotary embedding leaves as it is, and what a
    cache of the model's own holds before the first row, which may be of any rank.
    """
    for node in list(graph.nodes):
        if node.target in JOINS:
            _without_empty(graph, node)


def _without_empty(graph: fx.Graph, node: fx.Node) -> None:
    pieces, axis = arguments(node)[0], dim_of(node, 1)
    kept = [piece for piece in pieces if (shape := piece.meta["val"].shape) != (0,) and sym(shape[axis]) != 0]
    if not kept or len(kept) == len(pieces):
        return
    with graph.inserting_before(node):
        made = kept[0] if len(kept) == 1 else call(graph, node, aten.cat.default, kept, axis)
        if made.meta["val"].dtype is not node.meta["val"].dtype:  # a piece without entries has a type all the same
            made = call(graph, node, aten._to_copy.default, made, dtype=node.meta["val"].dtype)
    replace(node, made)


def _pieces_of_split(node: fx.Node) -> tuple[int, list[Any]]:
    """The axis of a split and the length of each piece, from the shapes that were traced."""
    x, axis = arguments(node)[0].meta["val"], dim_of(node, 2)
    return axis % x.dim(), [piece.shape[axis] for piece in node.meta["val"]]


def _replace_pieces(graph: fx.Graph, node: fx.Node) -> None:
    """``split`` and a ``getitem`` become a ``slice``, or nothing; ``unbind`` and a ``getitem`` a ``select``."""
    sizes: list[Any]
    unbind = node.target is aten.unbind.int
    if unbind:
        axis, sizes = dim_of(node, 1), []
    else:
        axis, sizes = _pieces_of_split(node)
    if any(user.target is not operator.getitem for user in node.users):
        return
    if len(sizes) > 1 and not all(isinstance(size, int) for size in sizes):
        return
    x = arguments(node)[0]
    for user in list(node.users):
        k, new = arguments(user)[1], x
        if len(sizes) != 1:
            with graph.inserting_before(user):
                if unbind:
                    new = graph.call_function(aten.select.int, (x, axis, k))
                else:
                    start = sum(sizes[:k])
                    new = graph.call_function(aten.slice.Tensor, (x, axis, start, start + sizes[k]))
            new.meta = {**node.meta, **user.meta}
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)
