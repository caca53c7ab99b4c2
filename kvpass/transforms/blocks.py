"""Rows that are computed block by block in a Python loop: computed at once.

``cat([f(x[:, :n]), f(x[:, n:])], 1)`` is ``f(x)``, where `f` treats rows alike. Where a block ends depends on how long
the text is, so block by block no row could be said to stay what it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.utils import _pytree as pytree

from kvpass.analysis.sweep import arguments, dim_of, sym
from kvpass.transforms.alike import SIZED, axis_of
from kvpass.transforms.spell import JOINS, SPLITS, call

aten = torch.ops.aten
Nodes: TypeAlias = tuple[fx.Node, ...]
Twin: TypeAlias = tuple[fx.Node, int | None]
"""The value of all blocks, and the axis along which they stand; no axis where all have the same."""


def at_once(graph: fx.Graph) -> None:
    """Replace every join of blocks along an axis of unknown length that are the same function of their part."""
    for node in list(graph.nodes):
        if node.target in JOINS and len(arguments(node)[0]) > 1:
            axis = dim_of(node, 1) % node.meta["val"].dim()
            pieces = tuple(arguments(node)[0])
            sizes = [piece.meta["val"].shape[axis] for piece in pieces]
            if all(isinstance(size, int) for size in sizes):
                continue
            twin = _Blocks(graph, node, [sym(size) for size in sizes]).twin(pieces)
            if twin is not None and twin[1] == axis:
                node.replace_all_uses_with(twin[0])
                graph.erase_node(node)


@dataclass
class _Blocks:
    """The parts of one join, and the values that stand for all of them."""

    graph: fx.Graph
    join: fx.Node
    sizes: list[Any]
    known: dict[Nodes, Twin | None] = field(default_factory=dict)

    def twin(self, nodes: Nodes) -> Twin | None:
        if nodes not in self.known:
            same = all(node is nodes[0] for node in nodes)
            self.known[nodes] = (nodes[0], None) if same else self._part(nodes) or self._computed(nodes)
        return self.known[nodes]

    def _part(self, nodes: Nodes) -> Twin | None:
        """``x[:, :n]``, ``x[:, n:]``, and so on, of one value, or its pieces by ``split``."""
        first = nodes[0]
        if any(node.op != "call_function" or node.target is not first.target for node in nodes):
            return None
        args = [arguments(node) for node in nodes]
        if any(a[0] is not args[0][0] for a in args):
            return None
        if first.target is operator.getitem and args[0][0].target in SPLITS:
            x, axis = arguments(args[0][0])[0], dim_of(args[0][0], 2)
            starts = self._starts() if [a[1] for a in args] == list(range(len(nodes))) else []
        elif first.target is aten.slice.Tensor and all(len(a) < 5 or a[4] == 1 for a in args):
            x, axis = args[0][0], dim_of(first, 1)
            if any(dim_of(node, 1) != axis for node in nodes):
                return None
            starts = [_size(a[2]) if len(a) > 2 and a[2] is not None else 0 for a in args]
        else:
            return None
        axis %= x.meta["val"].dim()
        sizes = [sym(node.meta["val"].shape[axis]) for node in nodes]
        whole = sum(sizes) == sym(x.meta["val"].shape[axis])
        return (x, axis) if whole and sizes == self.sizes and starts == self._starts() else None

    def _starts(self) -> list[Any]:
        return [sum(self.sizes[:k]) for k in range(len(self.sizes))]

    def _computed(self, nodes: Nodes) -> Twin | None:
        """The same op on the twins of what the parts are computed from."""
        first = nodes[0]
        if any(node.op != "call_function" or node.target is not first.target for node in nodes):
            return None
        if any(len(node.args) != len(first.args) or node.kwargs.keys() != first.kwargs.keys() for node in nodes):
            return None
        several = any(isinstance(a.meta.get("val"), (list, tuple)) for node in nodes for a in node.all_input_nodes)
        if several or not isinstance(first.meta.get("val"), torch.Tensor):
            return None
        axes: dict[fx.Node, int] = {}
        twins: dict[fx.Node, fx.Node] = {}
        columns = [_operands(node) for node in nodes]
        if any(len(column) != len(columns[0]) for column in columns):
            return None
        for operands in zip(*columns, strict=True):
            found = self.twin(operands)
            if found is None or twins.setdefault(operands[0], found[0]) is not found[0]:
                return None
            if found[1] is not None:
                axes[operands[0]] = found[1]
        if not axes:
            return (first, None) if _equal(map(_told_all, nodes)) else None
        axis = axis_of(first, axes)
        if axis is None or not self._alike(nodes, axis):
            return None
        args = _everywhere(first, axis)
        if args is None:
            return None

        def whole(a: fx.Node) -> fx.Node:
            return twins.get(a, a)

        with self.graph.inserting_before(self.join):
            kwargs = fx.map_arg(dict(first.kwargs), whole)
            made = call(self.graph, first, first.target, *fx.map_arg(args, whole), **kwargs)  # type: ignore[arg-type]
        shape = [sym(d) for d in first.meta["val"].shape]
        shape[axis] = sum(self.sizes)
        return (made, axis) if [sym(d) for d in made.meta["val"].shape] == shape else None

    def _alike(self, nodes: Nodes, axis: int) -> bool:
        """Whether nothing but the parts differs: no other size, and no number that is told to the op."""
        shapes = [[sym(size) for size in node.meta["val"].shape] for node in nodes]
        if [shape.pop(axis) for shape in shapes] != self.sizes or not _equal(shapes):
            return False
        return nodes[0].target in SIZED or _equal(map(_told_all, nodes))


def _everywhere(node: fx.Node, axis: int) -> tuple[Any, ...] | None:
    """The arguments of an op on all blocks: where it is told a shape, with whatever size the axis has. None where two
    of the sizes are not known."""
    if node.target not in SIZED:
        return node.args
    x, told = arguments(node)
    sizes = [now if size == -1 else size for now, size in zip(node.meta["val"].shape, told, strict=True)]
    sizes[axis] = -1
    return None if any(isinstance(size, torch.SymInt) for size in sizes) else (x, sizes)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that an op is given, place by place: one that it is given twice is there twice."""
    leaves = pytree.tree_leaves((node.args, dict(sorted(node.kwargs.items()))))
    return [a for a in leaves if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.Tensor)]


def _size(given: Any) -> Any:
    return sym(given.meta["val"]) if isinstance(given, fx.Node) else given


def _told_all(node: fx.Node) -> list[Any]:
    return _told(arguments(node)) + _told([value for _, value in sorted(node.kwargs.items())])


def _equal(values: Iterable[Any]) -> bool:
    first, *rest = values
    return all(value == first for value in rest)


def _told(args: Any) -> list[Any]:
    """All that is no tensor, flat."""
    if isinstance(args, (list, tuple)):
        return [told for a in args for told in _told(a)]
    if isinstance(args, fx.Node):
        return [] if isinstance(args.meta.get("val"), torch.Tensor) else [_size(args)]
    return [args]
