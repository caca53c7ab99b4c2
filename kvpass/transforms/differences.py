"""Sums of attention weights, taken apart: ``(a - c * b) @ v`` is ``a @ v - c * (b @ v)``.

Differential attention weighs the values with the difference of two softmaxes. Each of them is an attention of its own,
and each reads keys and values where they are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvpass.analysis.sweep import arguments, sym
from kvpass.transforms.sinks import SOFTMAX
from kvpass.transforms.spell import call, replace

aten = torch.ops.aten
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_SCALES = (aten.mul.Tensor, aten.div.Tensor)
_LAYOUT = (aten.reshape.default, aten._to_copy.default)


def distributed(graph: fx.Graph) -> None:
    """Rewrite every product of values with a sum of softmaxes as a sum of products."""
    for node in list(graph.nodes):
        if node.target is aten.matmul.default and _is_sum(*arguments(node)):
            with graph.inserting_before(node):
                made = _Products(graph, node).of(*arguments(node))
            replace(node, made)


def _is_sum(weights: fx.Node, values: fx.Node) -> bool:
    """True where a product can be taken apart down to single softmaxes."""
    same_rank = weights.meta["val"].dim() == values.meta["val"].dim()
    return same_rank and weights.target in (*_SUMS, *_SCALES, aten.select.int) and _leads_to_softmaxes(weights)


def _leads_to_softmaxes(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    args = arguments(node)
    if node.target in _SUMS:
        return not node.kwargs and _same_shape(*args) and all(map(_leads_to_softmaxes, args))
    if node.target in _SCALES:
        k = _scaled(node)
        return k is not None and _leads_to_softmaxes(args[k])
    if node.target is aten.select.int:
        rank = args[0].meta["val"].dim()
        fixed = isinstance(args[0].meta["val"].shape[args[1]], int)
        return fixed and args[1] % rank < rank - 2 and _leads_to_softmaxes(args[0])
    return _is_softmax(node)


def _is_softmax(node: fx.Node) -> bool:
    """A softmax over its last axis; whatever a view made of the axes before it."""
    while node.target in _LAYOUT:
        before, after = arguments(node)[0].meta["val"], node.meta["val"]
        if sym(before.shape[-1]) != sym(after.shape[-1]) or sym(before.shape[-2]) != sym(after.shape[-2]):
            return False
        node = arguments(node)[0]
    return node.target in SOFTMAX and arguments(node)[1] % node.meta["val"].dim() == node.meta["val"].dim() - 1


def _same_shape(a: Any, b: Any) -> bool:
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    a, b = a.meta["val"], b.meta["val"]
    return a.dtype == b.dtype and [sym(d) for d in a.shape] == [sym(d) for d in b.shape]


def _scaled(node: fx.Node) -> int | None:
    """Which factor the weights are, where the other one is the same for all keys of a row."""
    for k in (0, 1) if node.target is aten.mul.Tensor else (0,):
        weights, other = arguments(node)[k], arguments(node)[1 - k]
        if _same_shape(weights, node) and _is_column(other):
            return k
    return None


def _is_column(x: Any) -> bool:
    """A number, or a tensor of one entry for all keys."""
    value = x.meta["val"] if isinstance(x, fx.Node) else x
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 or bool(value.shape[-1] == 1)
    return isinstance(value, (int, float))


class _Products:
    """The products of one sum, each made once."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self.graph, self.like = graph, like
        self.made: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.columns: dict[tuple[fx.Node, int], fx.Node] = {}

    def of(self, weights: fx.Node, values: fx.Node) -> fx.Node:
        """``weights @ values``."""
        if (weights, values) not in self.made:
            self.made[weights, values] = self._of(weights, values)
        return self.made[weights, values]

    def _of(self, weights: fx.Node, values: fx.Node) -> fx.Node:
        args = arguments(weights)
        if weights.target in _SUMS:
            return self.call(weights.target, *(self.of(a, values) for a in args))
        if weights.target in _SCALES:
            k = _scaled(weights)
            factors = [self.of(a, values) if n == k else a for n, a in enumerate(args)]
            return self.call(weights.target, *factors)
        if weights.target is aten.select.int:
            axis = args[1] % args[0].meta["val"].dim()
            count = args[0].meta["val"].shape[axis]
            return self.call(aten.select.int, self.of(args[0], self.beside(values, axis, count)), axis, args[2])
        return self.call(aten.matmul.default, weights, values)

    def beside(self, values: fx.Node, axis: int, count: int) -> fx.Node:
        """The same values for every entry of an axis that only the weights have."""
        if (values, axis) not in self.columns:
            one = self.call(aten.unsqueeze.default, values, axis)
            sizes = [count if k == axis else -1 for k in range(one.meta["val"].dim())]
            self.columns[values, axis] = self.call(aten.expand.default, one, sizes)
        return self.columns[values, axis]

    def call(self, target: Any, *args: Any) -> fx.Node:
        return call(self.graph, self.like, target, *args)
