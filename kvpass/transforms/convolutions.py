"""Short convolutions and windows over the rows: a sum over their taps, each a row some steps back times a weight.

``conv(pad(x, (c - 1, 0)))`` and ``conv(x, padding=c - 1)[..., :s]`` are ``sum_t w[t] * x[i - shift_t]``. A row some
steps back is a padding with as much taken from the other end, which has a rule; a tap that looks ahead is one too, and
is refused by it. ``unfold(pad(x, (c - 1, 0)), c, 1)`` is the rows themselves, beside each other.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from kvpass.analysis.sweep import arguments, sym
from kvpass.transforms.spell import PADS, call, filled, named, sizes

aten = torch.ops.aten
_MOST_TAPS = 32


def unrolled(graph: fx.Graph) -> None:
    """Rewrite every convolution, and every window, over an axis of unknown length that keeps its length."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (aten.conv1d.default, aten.convolution.default):
            _unroll(graph, node)
        elif node.op == "call_function" and node.target is aten.conv2d.default:
            _mix(graph, node)
        elif node.target is aten.unfold.default:
            _unfold(graph, node)


def _unroll(graph: fx.Graph, node: fx.Node) -> None:
    given = named(node)
    weight, bias = given["weight"], given["bias"]
    stride, padding, dilation = (given[k][0] for k in ("stride", "padding", "dilation"))
    x, left = _unpadded(given["input"], 1, padding)
    value, shape = x.meta["val"], weight.meta["val"].shape
    transposed = given.get("transposed", False)
    length = sym(value.shape[-1])
    ends = _kept(node, length)
    if value.dim() != 3 or length.is_number or not ends or stride != 1 or transposed or shape[2] > _MOST_TAPS:
        return
    with graph.inserting_before(node):
        shifts = [left + padding - tap * dilation for tap in range(shape[2])]
        parts = [_tap(graph, node, _back(graph, node, x, by, 1), weight, tap) for tap, by in enumerate(shifts)]
        total = parts[0]
        for part in parts[1:]:
            total = call(graph, node, aten.add.Tensor, total, part)
        if bias is not None:
            total = call(graph, node, aten.add.Tensor, total, call(graph, node, aten.unsqueeze.default, bias, 1))
    for end in ends:
        end.replace_all_uses_with(total)


def _tap(graph: fx.Graph, like: fx.Node, row: fx.Node, weight: fx.Node, tap: int) -> fx.Node:
    """Rows ``[B, C, S]`` times one tap of the weight, ``[O, C / groups]``."""
    factor = call(graph, like, aten.select.int, weight, 2, tap)
    (outs, each_in), channels = factor.meta["val"].shape, row.meta["val"].shape[1]
    groups = channels // each_in
    if groups == channels == outs:  # depthwise
        return call(graph, like, aten.mul.Tensor, row, factor)
    if groups == 1:
        return call(graph, like, aten.matmul.default, factor, row)
    texts, _, rows = sizes(partial(call, graph, like), row)
    apart = call(graph, like, aten.reshape.default, row, [texts, groups, channels // groups, rows])
    factor = call(graph, like, aten.reshape.default, factor, [groups, outs // groups, each_in])
    product = call(graph, like, aten.matmul.default, factor, apart)
    return call(graph, like, aten.reshape.default, product, [texts, outs, rows])


def _mix(graph: fx.Graph, node: fx.Node) -> None:
    """A convolution over single points mixes channels: heads of scores (talking heads)."""
    given = named(node)
    x, weight = given["input"], given["weight"]
    told = {given["groups"], *given["stride"], *given["dilation"]}
    size = weight.meta["val"].shape
    if x.meta["val"].dim() != 4 or tuple(size[2:]) != (1, 1) or told != {1} or any(given["padding"]):
        return
    with graph.inserting_before(node):
        last = call(graph, node, aten.permute.default, x, [0, 2, 3, 1])
        matrix = call(graph, node, aten.reshape.default, weight, [size[0], size[1]])
        mixed = call(graph, node, aten.linear.default, last, matrix, given["bias"])
        made = call(graph, node, aten.permute.default, mixed, [0, 3, 1, 2])
    node.replace_all_uses_with(made)


def _unfold(graph: fx.Graph, node: fx.Node) -> None:
    padded, axis, size, step = arguments(node)
    rank = padded.meta["val"].dim()
    behind = rank - axis % rank
    x, left = _unpadded(padded, behind)
    length = sym(x.meta["val"].shape[axis])
    if step != 1 or size > _MOST_TAPS or length.is_number or sym(node.meta["val"].shape[axis % rank]) != length:
        return
    with graph.inserting_before(node):
        taps = [_back(graph, x, x, left - tap, behind) for tap in range(size)]
        made = call(graph, node, aten.stack.default, taps, rank)
    node.replace_all_uses_with(made)


def _unpadded(x: fx.Node, behind: int, padding: int = 0) -> tuple[fx.Node, int]:
    """What was padded with zeros along the axis that is number ``behind`` from the end, and by how much before it.

    Rows that were taken from its end are none that a result of as many rows reaches, unless zeros were put in their
    place afterwards, by another pad or by the convolution's own ``padding``.
    """
    source, left, right = x, 0, padding
    while (ends := _ends(source, behind)) is not None:
        before, after = ends
        if before < 0 or (after < 0 and right > 0):
            break
        source, left, right = arguments(source)[0], left + before, right + after
    return source, left


def _ends(x: fx.Node, behind: int) -> tuple[int, int] | None:
    """How many zeros an op puts before and behind one axis, and nothing else; fewer than none where it cuts."""
    rank = x.meta["val"].dim()
    if x.target is aten.slice.Tensor:
        given = named(x)
        start, end, along = given["start"], given["end"], given["dim"] % rank == rank - behind
        cut = along and not start and given["step"] == 1 and isinstance(end, int) and end < 0
        return (0, end) if cut else None
    if x.target not in PADS or filled(x) != 0:
        return None
    amounts, place = list(arguments(x)[1]), 2 * (behind - 1)
    both = [*amounts, 0, 0][place : place + 2] if place <= len(amounts) else [0, 0]
    if any([*amounts[:place], *amounts[place + 2 :]]) or not all(isinstance(amount, int) for amount in both):
        return None
    return both[0], both[1]


def _kept(node: fx.Node, length: Any) -> list[fx.Node]:
    """Where the result has as many rows as what was convolved: itself, or the first rows of it."""
    if sym(node.meta["val"].shape[-1]) == length:
        return [node]
    users = list(node.users)
    for user in users:
        args = arguments(user)
        if user.target is not aten.slice.Tensor or args[1] % 3 != 2 or args[2] or (len(args) > 4 and args[4] != 1):
            return []
        if sym(user.meta["val"].shape[-1]) != length:
            return []
    return users


def _back(graph: fx.Graph, like: fx.Node, x: fx.Node, steps: int, behind: int) -> fx.Node:
    """Row ``i - steps`` at row ``i``, zero before the first. Traced, it would ask whether there are so many rows."""
    if steps == 0:
        return x
    amounts = [*([0, 0] * (behind - 1)), steps, -steps]
    node = graph.call_function(aten.constant_pad_nd.default, (x, amounts))
    node.meta = {**like.meta, "val": x.meta["val"]}
    return node
