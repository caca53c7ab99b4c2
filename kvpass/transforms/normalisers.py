"""Softmax that is written out: each choice of its spelling is undone by itself, until one op is left.

    exp(x) / sum(exp(x))                       softmax(x), whatever is subtracted from a whole row first
    exp(x - logsumexp(x)), exp(log_softmax(x)) softmax(x)
    exp(x) * m, of 0 and 1                     exp(x with -inf where m is 0)
    exp2(x)                                    exp(x * log(2))
    (exp(x) @ v) / sum(exp(x))                 softmax(x) @ v

All of them are equations of real numbers that also hold for a row without keys, which is NaN on both sides. What only
looks like them is another function and stays as it is: a sum with an epsilon or a floor, zeros in the place of -inf
before `exp`, a maximum over keys that are masked after it, and a mask after a sum that holds the masked keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvpass.analysis.expressions import branches
from kvpass.analysis.rules.contraction import einsum_names, matmul_names
from kvpass.analysis.sweep import analyze, arguments, sym
from kvpass.ir import Captured
from kvpass.transforms.reductions import Reduction, before_shift, log_of_sum, moved, sum_of, unmoved
from kvpass.transforms.sides import PRODUCTS
from kvpass.transforms.spell import call, same

aten = torch.ops.aten
_LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_DIVISIONS = (aten.div.Tensor, aten.true_divide.Tensor)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_TRIANGLES = (aten.tril.default, aten.triu.default)
_NEG_INF = float("-inf")


@dataclass(frozen=True)
class Weights:
    """``exp(scores)`` where all of ``masks`` keep an entry, and zero elsewhere.

    A mask is a boolean value and whether it keeps an entry where it is true.
    """

    scores: fx.Node
    masks: tuple[tuple[fx.Node, bool], ...] = ()
    base: float = math.e

    def kept(self, mask: fx.Node, where: bool) -> Weights:
        return Weights(self.scores, (*self.masks, (mask, where)), self.base)


def respelled(captured: Captured) -> None:
    """Rewrite every softmax of a captured graph that is written out, in place."""
    graph = captured.module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (*_SOFTMAX, *_LOG_SOFTMAX):
            axis = arguments(node)[1] % node.meta["val"].dim()
            node.update_arg(0, before_shift(arguments(node)[0], axis))
        elif node.target in _DIVISIONS or node.target is aten.mul.Tensor:
            _quotient(captured, node)
        elif node.target is aten.exp.default:
            _of_logarithm(graph, node)


# -- what is divided by its sum -----------------------------------------------------------------------------------


def _quotient(captured: Captured, node: fx.Node) -> None:
    """``w / sum(w)`` and ``(w @ v) / sum(w)``, also as a product with the reciprocal."""
    for numerator, total in _fractions(node):
        found = sum_of(total)
        weights = None if found is None else _weights(captured, found.source)
        if found is None or weights is None:
            continue
        if same(numerator, found.source):
            if found.stands_beside() and _replaced(captured.module.graph, node, weights, found.axis):
                return
        elif _normalises(numerator, found):
            _divided_first(captured.module.graph, node, numerator, weights, found)
            return


def _fractions(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The ways to read a node as a numerator over a denominator."""
    a, b = arguments(node)[:2]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or node.kwargs:
        return []
    if node.target in _DIVISIONS:
        return [(a, b)]
    inverses = [(a, _inverted(b)), (b, _inverted(a))]
    return [(numerator, total) for numerator, total in inverses if total is not None]


def _inverted(node: fx.Node) -> fx.Node | None:
    """What a node is the reciprocal of."""
    args = arguments(node)
    if node.target is aten.mul.Tensor and args[1] == 1:  # 1 / x
        return _inverted(args[0])
    if node.target is aten.reciprocal.default or (node.target is aten.pow.Tensor_Scalar and args[1] == -1):
        return args[0]  # type: ignore[no-any-return]
    return None


def _normalises(product: fx.Node, total: Reduction) -> bool:
    """True where ``product`` sums ``weights * values`` over the axis of the total, which stands beside its rows."""
    weights, axis, denominator = total.source, total.axis, total.names
    product, moves = unmoved(product)
    if product.target not in PRODUCTS or product.target is aten.baddbmm.default or any(m.kwargs for m in moves):
        return False
    factors = _factors(product)
    if len(factors) != 2 or same(factors[0], weights) == same(factors[1], weights):
        return False
    if product.target is aten.einsum.default:
        specs, out = einsum_names(str(arguments(product)[0]), [f.meta["val"].dim() for f in factors])
    else:
        *specs, out = matmul_names(*(f.meta["val"].dim() for f in factors))
    mine, other = specs if same(factors[0], weights) else reversed(specs)
    if (
        len(set(mine)) != len(mine)
        or mine[axis] in out
        or mine[axis] not in other
        or set(mine) - {mine[axis]} - set(out)
    ):
        return False
    names: list[int | None] = [mine.index(name) if name in mine else None for name in out]
    for move in reversed(moves):
        names = moved(move, names)
    beside = [None] * (len(names) - len(denominator)) + denominator
    return len(beside) == len(names) and all(a in (None, b) for a, b in zip(beside, names, strict=True))


def _factors(product: fx.Node) -> Sequence[fx.Node]:
    args = arguments(product)
    return args[1] if product.target is aten.einsum.default else args


def _replaced(graph: fx.Graph, node: fx.Node, weights: Weights, axis: int) -> bool:
    """Put the softmax in the place of the weights over their sum."""
    with graph.inserting_before(node):
        made = _softmax(graph, node, weights, axis)
    if _alike(made, node):
        node.replace_all_uses_with(made)
        return True
    return False


def _divided_first(graph: fx.Graph, node: fx.Node, product: fx.Node, weights: Weights, total: Reduction) -> None:
    """The product with the softmax in the place of a product over the sum of its weights."""
    bottom, moves = unmoved(product)
    with graph.inserting_before(node):
        made = _softmax(graph, node, weights, total.axis)
        if not (_alike(made, total.source) and _alike(product, node)):
            return
        old = next(factor for factor in _factors(bottom) if same(factor, total.source))
        for op in (bottom, *reversed(moves)):
            hole = old if op is bottom else arguments(op)[0]
            made = _copied(graph, op, hole, made)
    node.replace_all_uses_with(made)


def _copied(graph: fx.Graph, op: fx.Node, hole: fx.Node, value: fx.Node) -> fx.Node:
    """The same call with another value for one of its operands."""
    return graph.node_copy(op, lambda x: value if x is hole else x)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return bool(x.dtype == y.dtype) and [sym(d) for d in x.shape] == [sym(d) for d in y.shape]


def _softmax(graph: fx.Graph, like: fx.Node, weights: Weights, axis: int) -> fx.Node:
    """The softmax whose numerators are the weights."""
    scores = weights.scores if weights.masks else before_shift(weights.scores, axis)
    if weights.base != math.e:
        scores = call(graph, like, aten.mul.Tensor, scores, math.log(weights.base))
    for mask, where in weights.masks:
        hidden = call(graph, like, aten.logical_not.default, mask) if where else mask
        scores = call(graph, like, aten.masked_fill.Scalar, scores, hidden, _NEG_INF)
    return call(graph, like, aten.softmax.int, scores, axis)


# -- exponentials and their masks ---------------------------------------------------------------------------------


def _weights(captured: Captured, node: fx.Node) -> Weights | None:
    """A value as masked exponentials, or None."""
    args = arguments(node)
    if node.target is aten.exp.default:
        return Weights(args[0])
    if node.target is aten.exp2.default:
        return Weights(args[0], base=2.0)
    if node.target is aten.pow.Scalar and args[0] > 0:
        return Weights(args[1], base=float(args[0]))
    reader = _MASKINGS.get(node.target)
    if reader is None or node.kwargs:
        return None
    for inner, mask, where in reader(captured, node):
        weights = _weights(captured, inner)
        if weights is not None:
            return weights.kept(mask, where)
    return None


Masking = list[tuple[fx.Node, fx.Node, bool]]


def _filled(captured: Captured, node: fx.Node) -> Masking:
    inner, mask, fill = arguments(node)[:3]
    return [(inner, mask, False)] if _number(fill) == 0 else []


def _chosen(captured: Captured, node: fx.Node) -> Masking:
    condition, yes, no = arguments(node)[:3]
    if _number(no) == 0:
        return [(yes, condition, True)]
    return [(no, condition, False)] if _number(yes) == 0 else []


def _number(arg: Any) -> Any:
    """A number, or what a tensor is filled with."""
    if not isinstance(arg, fx.Node):
        return arg
    fills = {aten.full.default: 1, aten.full_like.default: 1, aten.scalar_tensor.default: 0}
    if arg.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return 0
    return arguments(arg)[fills[arg.target]] if arg.target in fills else None


def _multiplied(captured: Captured, node: fx.Node) -> Masking:
    """A factor that is zero or one everywhere, as its closed form says."""
    out: Masking = []
    a, b = arguments(node)[:2]
    for inner, factor in ((a, b), (b, a)):
        if not (isinstance(inner, fx.Node) and isinstance(factor, fx.Node)):
            continue
        if _weights(captured, inner) is None or not _zero_or_one(captured, factor):
            continue
        with captured.module.graph.inserting_before(node):
            truth = factor
            if factor.meta["val"].dtype is not torch.bool:
                truth = call(captured.module.graph, node, aten.ne.Scalar, factor, 0)
        out.append((inner, truth, True))
    return out


def _triangle(captured: Captured, node: fx.Node) -> Masking:
    graph, inner = captured.module.graph, arguments(node)[0]
    if _weights(captured, inner) is None:
        return []
    with graph.inserting_before(node):
        ones = call(graph, node, aten.ones_like.default, inner, dtype=torch.bool)
        mask = call(graph, node, node.target, ones, *arguments(node)[1:])  # type: ignore[arg-type]
    return [(inner, mask, True)]


def _zero_or_one(captured: Captured, node: fx.Node) -> bool:
    if node.meta["val"].dtype is torch.bool:
        return True
    expr = analyze(captured, upto=node).fact(node).expr
    return expr is not None and all(value in (0, 1) for value, _ in branches(expr))


_MASKINGS: dict[Any, Callable[[Captured, fx.Node], Masking]] = {
    **dict.fromkeys(_FILLS, _filled),
    **dict.fromkeys(_TRIANGLES, _triangle),
    aten.where.self: _chosen,
    aten.where.ScalarOther: _chosen,
    aten.where.ScalarSelf: _chosen,
    aten.mul.Tensor: _multiplied,
}


# -- in the space of logarithms -----------------------------------------------------------------------------------


def _of_logarithm(graph: fx.Graph, node: fx.Node) -> None:
    """The exponential of the logarithm of a softmax."""
    found = _log_softmax(arguments(node)[0])
    if found is None:
        return
    scores, axis = found
    with graph.inserting_before(node):
        made = call(graph, node, aten.softmax.int, before_shift(scores, axis), axis)
    if _alike(made, node):
        node.replace_all_uses_with(made)


def _log_softmax(node: fx.Node) -> tuple[fx.Node, int] | None:
    """``(x, axis)`` where a node is ``log_softmax(x)``: by name, or with the logarithm of the sum taken off."""
    args = arguments(node)
    if node.target in _LOG_SOFTMAX and node.meta["val"].dtype == args[0].meta["val"].dtype:
        return args[0], args[1] % node.meta["val"].dim()
    if node.target is not aten.sub.Tensor or len(args) != 2 or node.kwargs or not isinstance(args[1], fx.Node):
        return None
    found = log_of_sum(args[1])
    return found if found is not None and same(found[0], args[0]) else None
