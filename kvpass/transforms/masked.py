"""Writes where a mask says, of the rows of a table in their order.

``masked_scatter(x, mask, source)`` writes the k-th row of ``source`` where the mask
holds for the k-th time: row ``i`` is the row of ``source`` at the number of rows before it at which the mask holds.
ATen counts through the whole batch, so the first row of a sequence is the number of rows that the sequences before it
fill; where that cannot be known from a sequence alone, the proof finds it in the sum over the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvpass.analysis.sweep import arguments, sym
from kvpass.transforms.spell import call, replace

aten = torch.ops.aten
_SAME_ROWS = (aten.expand.default, aten.unsqueeze.default, aten.clone.default, aten.alias.default)


def in_order(graph: fx.Graph) -> None:
    """Rewrite every ``masked_scatter`` into whole rows."""
    for node in list(graph.nodes):
        if node.target is not aten.masked_scatter.default:
            continue
        with graph.inserting_before(node):
            made = _in_order(graph, node)
        if made is not None:
            replace(node, made)


def _in_order(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Of a ``[B, S, D]`` mask that is the same along ``D``."""
    x, mask, source = arguments(node)
    shape, width = x.meta["val"].shape, source.meta["val"].shape[-1]
    rows = _of_rows(mask)
    if rows is None or len(shape) != 3 or [sym(d) for d in rows.meta["val"].shape] != [sym(d) for d in shape[:2]]:
        return None
    if sym(width) != sym(shape[-1]):
        return None

    def made(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(graph, node, target, *args, **kwargs)

    held = made(aten._to_copy.default, rows, dtype=torch.int64)
    place = made(aten.cumsum.default, held, 1)
    if sym(shape[0]) != 1:
        filled = made(aten.sum.dim_IntList, held, [1], True)
        before = made(aten.sub.Tensor, made(aten.cumsum.default, filled, 0), filled)
        place = made(aten.add.Tensor, place, before)
    place = made(aten.clamp.default, made(aten.sub.Tensor, place, 1), 0)
    table = made(aten.reshape.default, source, [-1, width])
    return made(aten.where.self, mask, made(aten.embedding.default, table, place), x)


def _of_rows(mask: fx.Node) -> fx.Node | None:
    """The ``[B, S]`` mask that a ``[B, S, D]`` one repeats along its last axis."""
    while mask.meta["val"].dim() == 3 and mask.target in _SAME_ROWS:
        before = arguments(mask)[0]
        shape, value = mask.meta["val"].shape, before.meta["val"]
        if value.dim() == 2 and arguments(mask)[1] not in (-1, 2):
            return None
        if value.dim() == 3 and [sym(d) for d in value.shape[:2]] != [sym(d) for d in shape[:2]]:
            return None
        mask = before
    return mask if mask.meta["val"].dim() == 2 else None
