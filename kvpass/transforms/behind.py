"""Keys that are no rows and stand behind those of the rows: put before them.

``cat([k, memory])``, of keys, values and masks: a learnt key (`nn.MultiheadAttention` with `add_bias_kv`), or keys of
an encoder in one softmax with the text's. The text grows in the middle of such an axis, so no place in it would keep
its meaning. Softmax does not care in which order keys stand, and before the first row they have one (`Captured.lead`).

Every value with such an axis has a *twin* whose axis begins with what stood at its end. Nothing is changed unless each
way through the graph ends where the order is forgotten: in a sum over the axis.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from kvpass.analysis.sweep import arguments, dim_of, sym
from kvpass.transforms.alike import REDUCTIONS, SOFTMAX, axis_of, told_axes
from kvpass.transforms.normalise import ASSERTIONS, is_identity
from kvpass.transforms.spell import JOINS, PADS, call, filled, named

aten = torch.ops.aten


def turned(graph: fx.Graph, rows: sympy.Symbol) -> None:
    """Rewrite in place.

    Args:
        rows: the length of the text.
    """
    found = _Turned(graph, rows)
    if all(found.understood(node) for node in list(graph.nodes)):
        for node, twin in found.forgotten.items():
            node.replace_all_uses_with(twin)
    graph.eliminate_dead_code()


@dataclass
class _Turned:
    """What was found so far.

    Attributes:
        twins: of each value with such an axis, the other order, and that axis.
        forgotten: values that do not depend on the order, computed from the other one.
    """

    graph: fx.Graph
    rows: sympy.Symbol
    twins: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)
    forgotten: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def understood(self, node: fx.Node) -> bool:
        axes = {a: self.twins[a][1] for a in node.all_input_nodes if a in self.twins}
        if axes and node.target is aten.sym_size.int:  # the same in any order
            self.forgotten[node] = self._with_twins(node)
            return True
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return not axes or node.target in ASSERTIONS
        if self._joined(node, axes) or not axes:
            return True
        if self._summed(node, axes):
            self.forgotten[node] = self._with_twins(node)
            return True
        along = node.target in SOFTMAX and told_axes(node) == set(axes.values())
        axis = next(iter(axes.values())) if along or is_identity(node) else axis_of(node, axes)
        if axis is not None:
            self.twins[node] = self._with_twins(node), axis
        return axis is not None

    def _with_twins(self, node: fx.Node) -> fx.Node:
        def turn(a: fx.Node) -> fx.Node:
            return self.twins[a][0] if a in self.twins else a

        with self.graph.inserting_before(node):
            args, kwargs = fx.map_arg(node.args, turn), fx.map_arg(dict(node.kwargs), turn)
            return call(self.graph, node, node.target, *args, **kwargs)  # type: ignore[arg-type]

    def _joined(self, node: fx.Node, axes: dict[fx.Node, int]) -> bool:
        """All rows, and something beside them; or what is so made already, and more behind it."""
        args, last = arguments(node), node.meta["val"].dim() - 1
        if node.target in JOINS and len(args[0]) > 1:
            return self._behind(node, args[0][0], list(args[0][1:]), dim_of(node, 1) % (last + 1), axes)
        if node.target not in PADS or filled(node) is None or not args[1]:
            return False
        x, (before, after, *others) = args[:2]
        pairs = sum(sym(size) == self.rows for size in x.meta["val"].shape) + len(axes) > 1
        one_side = isinstance(before, int) and isinstance(after, int) and min(before, after) == 0 < max(before, after)
        if not pairs or not one_side or any(others):
            return False
        with self.graph.inserting_before(node):
            column = self._column(node, x, before or after, filled(node))
            if before and not axes:
                self.forgotten[node] = call(self.graph, node, aten.cat.default, [column, x], last)
        return not axes if before else self._behind(node, x, [column], last, axes)

    def _behind(self, node: fx.Node, first: fx.Node, rest: list[fx.Node], axis: int, axes: dict[fx.Node, int]) -> bool:
        if len(axes) > (first in axes) or any(sym(piece.meta["val"].shape[axis]).has(self.rows) for piece in rest):
            return False
        if not self._is_text(first, axis, axes):
            return False
        with self.graph.inserting_before(node):
            made = call(self.graph, node, aten.cat.default, [*rest, *self._pieces(first, axis)], axis)
        self.twins[node] = made, axis
        return True

    def _column(self, node: fx.Node, x: fx.Node, count: int, number: Any) -> fx.Node:
        """So many entries of one number on the last axis."""
        one = call(self.graph, node, aten.slice.Tensor, x, x.meta["val"].dim() - 1, 0, 1)
        full = call(self.graph, node, aten.full_like.default, one, number)
        return call(self.graph, node, aten.expand.default, full, [-1] * (x.meta["val"].dim() - 1) + [count])

    def _is_text(self, x: fx.Node, axis: int, axes: dict[fx.Node, int]) -> bool:
        return axes.get(x, axis) == axis and (x in axes or sym(x.meta["val"].shape[axis]) == self.rows)

    def _pieces(self, first: fx.Node, axis: int) -> list[fx.Node]:
        """What the twin of the first piece is joined from: one join says how much stands before the rows."""
        if first not in self.twins:
            return [first]
        twin = self.twins[first][0]
        return list(arguments(twin)[0]) if twin.target in JOINS else [twin]

    def _summed(self, node: fx.Node, axes: dict[fx.Node, int]) -> bool:
        """True where the axis is summed over, or its largest entry taken."""
        args = arguments(node)
        dims = {a: a.meta["val"].dim() for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)}
        if node.target in REDUCTIONS:
            return told_axes(node) == {axes[args[0]]}
        if node.target in (aten.matmul.default, aten.bmm.default) and min(dims.values()) > 1 and len(dims) == 2:
            return axes == {args[0]: dims[args[0]] - 1, args[1]: dims[args[1]] - 2}
        if node.target is aten.scaled_dot_product_attention.default:
            given = named(node)
            mask = given["attn_mask"]
            want = {given[name]: dims[given[name]] - 2 for name in ("key", "value")}
            if mask is not None and (mask in axes or mask.meta["val"].shape[-1] != 1):
                want[mask] = dims[mask] - 1
            return axes == want and not given["is_causal"] and given["query"] not in axes and given["dropout_p"] == 0
        return False
