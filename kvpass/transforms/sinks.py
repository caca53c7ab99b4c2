"""A column beside the keys that takes a share of the softmax and has no value: an attention sink that was learned.

It is written as ``softmax(cat([scores, sink], -1))[..., :-1]``. The softmax over one column more is the softmax over
the keys, times the share that the sink leaves to them::

    exp(s_j) / (sum_k exp(s_k) + exp(sink)) = softmax(s)_j * sigmoid(logsumexp(s) - sink)

and in this form each op is one that has a rule. A row whose keys are all masked keeps its zeros: the first factor is
ATen's safe softmax.
"""

from __future__ import annotations

import torch
from torch import fx

from kvpass.analysis.sweep import Analyzed, arguments, dim_of, sym
from kvpass.transforms.spell import JOINS, PADS, call, filled

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default)


def separate(graph: fx.Graph) -> None:
    """Rewrite every softmax with a sink among its columns that nobody reads behind it."""
    for node in list(graph.nodes):
        if node.target in SOFTMAX:
            _separate(graph, node)


def sink_of(analyzed: Analyzed, product: fx.Node, softmax: fx.Node) -> fx.Node | None:
    """The sink, where ``product`` is the weights of ``softmax`` times the share that one leaves to them."""
    operands = analyzed.steps[product].operands
    if product.target is not aten.mul.Tensor or softmax.target is not aten._safe_softmax.default or len(operands) != 2:
        return None
    share = operands[1]
    rest = arguments(share)[0] if share.target is aten.sigmoid.default else None
    if rest is None or rest.target is not aten.sub.Tensor or len(analyzed.steps[rest].operands) != 2:
        return None
    total, sink = arguments(rest)
    if total.target is not aten.logsumexp.default or arguments(total)[0] is not arguments(softmax)[0]:
        return None
    return sink if list(arguments(total)[1]) == [arguments(softmax)[1]] else None


def _separate(graph: fx.Graph, softmax: fx.Node) -> None:
    joined = arguments(softmax)[0]
    value = softmax.meta["val"]
    axis = arguments(softmax)[1] % value.dim()
    if joined.target in PADS:
        pieces, along = _padding_as_sink(graph, joined), value.dim() - 1
    elif joined.target in JOINS:
        pieces, along = list(arguments(joined)[0]), dim_of(joined, 1) % value.dim()
    else:
        return
    if len(pieces) != 2:
        return
    sizes = [sym(piece.meta["val"].shape[axis]) for piece in pieces]
    if along != axis or 1 not in sizes or sizes == [1, 1] or joined.meta["val"].dtype != value.dtype:
        return
    last = sizes[1] == 1
    scores, sink = pieces if last else reversed(pieces)
    if any(piece.meta["val"].dtype != value.dtype for piece in pieces):
        return
    cuts = list(softmax.users)
    if not cuts or not all(_cuts(cut, axis, 0 if last else 1, scores) for cut in cuts):
        return
    number = _constant(sink)
    with graph.inserting_before(softmax):
        sink = _unrepeated(graph, sink) if number is None else _of_heads(graph, softmax, scores, number)
    wide = torch.promote_types(value.dtype, torch.float32)  # half precision would round the logarithm of the sum
    with graph.inserting_before(softmax):
        if wide != value.dtype:
            scores, sink = (call(graph, softmax, aten._to_copy.default, x, dtype=wide) for x in (scores, sink))
        weights = call(graph, softmax, aten._safe_softmax.default, scores, axis)
        total = call(graph, softmax, aten.logsumexp.default, scores, [axis], True)
        rest = call(graph, softmax, aten.sub.Tensor, total, sink)
        share = call(graph, softmax, aten.sigmoid.default, rest)
        made = call(graph, softmax, aten.mul.Tensor, weights, share)
        if wide != value.dtype:
            made = call(graph, softmax, aten._to_copy.default, made, dtype=value.dtype)
    for cut in cuts:
        cut.replace_all_uses_with(made)
        graph.erase_node(cut)
    graph.erase_node(softmax)


def _unrepeated(graph: fx.Graph, sink: fx.Node) -> fx.Node:
    """A sink before it was repeated for every row, of the same rank."""
    repeated, behind = sink, 0
    if sink.target in (aten.reshape.default, aten.unsqueeze.default):
        repeated = arguments(sink)[0]
        rank, sizes = repeated.meta["val"].dim(), [sym(d) for d in sink.meta["val"].shape]
        behind = len(sizes) - rank
        if sizes != [sym(d) for d in repeated.meta["val"].shape] + [1] * behind:
            return sink
    once = arguments(repeated)[0] if repeated.target is aten.expand.default else None
    if once is None or once.meta["val"].dim() != repeated.meta["val"].dim():
        return sink
    for _ in range(behind):
        once = call(graph, sink, aten.unsqueeze.default, once, -1)
    return once


def _padding_as_sink(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """What was padded with one column, and that column, in their order; nothing where it is another padding."""
    (x, amounts), number = arguments(node)[:2], filled(node)
    if list(amounts) not in ([0, 1], [1, 0]) or number is None:
        return []
    with graph.inserting_before(node):
        column = _of_heads(graph, node, x, float(number))
    return [x, column] if amounts[0] == 0 else [column, x]


_CONSTANTS = {
    aten.zeros.default: 0.0,
    aten.zeros_like.default: 0.0,
    aten.new_zeros.default: 0.0,
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
}


def _constant(node: fx.Node) -> float | None:
    """The number that a tensor is filled with; as an integer the table says where it stands among the arguments."""
    found = _CONSTANTS.get(node.target)  # type: ignore[call-overload]
    number = arguments(node)[found] if isinstance(found, int) else found
    return float(number) if isinstance(number, (int, float)) else None


def _of_heads(graph: fx.Graph, like: fx.Node, scores: fx.Node, number: float) -> fx.Node:
    """One entry for each head of scores ``[B, .., S, S]``."""
    shape = [1, *(d if isinstance(d, int) else 1 for d in scores.meta["val"].shape[1:-2]), 1, 1]
    return call(graph, like, aten.new_full.default, scores, shape, number)


def _cuts(node: fx.Node, axis: int, start: int, scores: fx.Node) -> bool:
    """True for a slice of the columns of the scores."""
    args = arguments(node)
    if node.target is not aten.slice.Tensor or (len(args) > 4 and args[4] != 1):
        return False
    value = node.meta["val"]
    same = [sym(a) - sym(b) for a, b in zip(value.shape, scores.meta["val"].shape, strict=True)]
    return args[1] % value.dim() == axis and (args[2] or 0) == start and not any(same)
