"""The incremental graph, rebuilt from the outputs by demand.

``build(value, demand)`` returns the node of the new graph that holds the demanded rows of a captured value. Sizes are
recomputed from the axes, tables and ranges move by the number of cached rows, and a stored value that is asked for all
rows becomes "append the new rows, read all rows".
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy import functions as torch_sympy

from kvpass import errors
from kvpass.analysis.facts import Atom, Fact, Kind
from kvpass.analysis.sweep import Analyzed, source_of, sym
from kvpass.ir import KernelOps, Lowering, Role
from kvpass.transforms.attend import emit_attention
from kvpass.transforms.emit import SPECIAL, Context, plain
from kvpass.transforms.latent import Latent
from kvpass.transforms.plan import HEAVY, NEW, Demand, Plan, Slot, canonical, demand_of_operand
from kvpass.transforms.sides import Recognised

aten = torch.ops.aten


@dataclass(frozen=True)
class Incremental:
    """The rewritten graph.

    Its arguments are those of the captured graph, then ``rows`` (S) and ``start`` (P), which count a prefix of the
    context, then for each slot in order its
    pool, block table, run and write rows (`kvpass.cache.SlotView`).

    Attributes:
        origin: by node name, the captured node it came from.
        latents: by the value that holds its result, each attention that runs over stored latents.
    """

    plan: Plan
    module: fx.GraphModule
    origin: dict[str, str] = field(default_factory=dict)
    latents: Mapping[fx.Node, Latent] = field(default_factory=dict)


def rewrite(
    plan: Plan,
    kernels: KernelOps,
    attentions: Mapping[fx.Node, Recognised] | None = None,
    lower: Lowering = lambda *_: None,
    latents: Mapping[fx.Node, Latent] | None = None,
) -> Incremental:
    """Build the incremental graph of a plan.

    Args:
        kernels: what reads and writes pools and computes attention.
        attentions: by the value that holds its result, each attention that was recognised.
        lower: what makes a kernel of an attention; without it the reference computes them all.
        latents: by the value that holds its result, what each attention is made from that may run over latents.

    Raises:
        NotIncremental: an op cannot be computed for the new rows alone.
    """
    return Builder(plan, kernels, attentions or {}, lower, latents or {}).run()


class Builder:
    """State of one rewrite: the new graph and what has been built in it."""

    def __init__(
        self,
        plan: Plan,
        kernels: KernelOps,
        attentions: Mapping[fx.Node, Recognised],
        lower: Lowering,
        latents: Mapping[fx.Node, Latent],
    ) -> None:
        self.plan, self.kernels, self.attentions, self.lower = plan, kernels, attentions, lower
        self.latents = latents
        self.analyzed: Analyzed = plan.analyzed
        self.captured = plan.analyzed.captured
        self.graph = fx.Graph()
        self.done: dict[tuple[fx.Node, Demand], fx.Node] = {}
        self.numbers: dict[sympy.Basic, Any] = {}
        self.written: dict[str, fx.Node] = {}
        self.origin: dict[str, str] = {}
        self.masks: dict[Any, fx.Node] = {}
        self.called: dict[Any, fx.Node] = {}
        self.current: fx.Node | None = None

    def run(self) -> Incremental:
        self._placeholders()
        for slot in self.plan.slots:  # in graph order, so that recursion stays shallow
            self.pool(slot)
        outputs = []
        for value in self.analyzed.outputs:
            if isinstance(value, fx.Node) and value in self.analyzed.steps:
                outputs.append(self.build(value, frozenset(self.analyzed.fact(value).wide)))
            elif isinstance(value, fx.Node):
                outputs.append(self.number(sym(value.meta["val"])))
            else:
                outputs.append(value)
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        module = fx.GraphModule(self.captured.module, self.graph)
        return Incremental(self.plan, module, self.origin, self.latents)

    def _placeholders(self) -> None:
        self.inputs: dict[str, fx.Node] = {}
        roles = {i.name: i.role for i in self.captured.inputs}
        for node in self.captured.module.graph.nodes:
            if node.op != "placeholder":
                continue
            self.inputs[node.name] = self.graph.placeholder(node.name)
            if roles[node.name] is Role.SYMBOL:
                self.numbers.setdefault(sym(node.meta["val"]), self.inputs[node.name])
        self.rows, self.start = self.graph.placeholder("rows"), self.graph.placeholder("start")
        self.lead = self.captured.lead
        if self.lead != 0:
            self.numbers[self.captured.seq] = self.graph.call_function(
                operator.sub, (self.rows, self.number(self.lead))
            )
        self.numbers[self.captured.seq + self.lead] = self.rows
        self.p = sympy.Symbol("start", integer=True, nonnegative=True)
        self.numbers[self.p] = self.start
        self.slot_inputs = {
            slot.name: tuple(self.graph.placeholder(f"{kind}_{k}") for kind in ("pool", "table", "run", "place"))
            for k, slot in enumerate(self.plan.slots)
        }

    # -- numbers -------------------------------------------------------------------------------------------------

    def number(self, expr: Any) -> Any:
        """A sympy size as a node of the new graph, or as a Python number."""
        expr = sympy.sympify(expr)
        if expr in self.numbers:
            return self.numbers[expr]
        if expr.is_Integer:
            return int(expr)
        if expr.is_number:
            return float(expr)
        function = _FUNCTIONS.get(expr.func)
        if function is None:
            raise errors.NotIncremental(detail=f"the number {expr} cannot be computed in the rewritten graph")
        args = [self.number(arg) for arg in expr.args]
        out = args[0]
        if len(args) == 1:
            out = self.graph.call_function(function, (out,))
        for arg in args[1:]:
            out = self.graph.call_function(function, (out, arg))
        self.numbers[expr] = out
        return out

    def span(self, atom: Atom, everything: bool) -> tuple[sympy.Expr, sympy.Expr]:
        """The entries ``[lo, hi)`` of an atom that are computed."""
        if atom.kind is not Kind.SEQ or everything or not atom.grows:
            return sympy.Integer(0), atom.size
        if atom.start == -self.lead:
            return self.p, atom.size
        return sympy.Max(self.p - self.lead - atom.start, 0), atom.size

    def length(self, atom: Atom, everything: bool) -> sympy.Expr:
        lo, hi = self.span(atom, everything)
        return hi - lo

    def sizes(self, fact: Fact, demand: Demand) -> list[Any]:
        """The shape of a value under a demand."""
        out, k = [], 0
        for dim in fact.dims:
            size: sympy.Expr = sympy.Integer(1)
            for atom in dim:
                size = size * self.length(atom, k in demand)
                k += 1
            out.append(self.number(size))
        return out

    # -- values --------------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the new graph; an ATen op that has been called with the same arguments is that call."""
        pure = isinstance(target, torch._ops.OpOverload)
        key = (target, _hashable(args), _hashable(tuple(kwargs.items()))) if pure else None
        if key in self.called:
            return self.called[key]
        node = self.graph.call_function(target, args, kwargs)
        if key is not None:
            self.called[key] = node
        if self.current is not None:
            self.origin[node.name] = self.current.name
            node.meta["stack_trace"] = self.current.meta.get("stack_trace")
        return node

    def build(self, node: fx.Node, demand: Demand) -> fx.Node:
        """The demanded rows of a captured value."""
        demand = canonical(demand, self.analyzed.fact(node))
        found = self.done.get((node, demand))
        if found is None:
            self._build_operands(node, demand)
            found = self._finish(node, demand)
        return found

    def _build_operands(self, node: fx.Node, demand: Demand) -> None:
        """Deep graphs are built from the bottom, without recursion."""
        todo = [(node, demand)]
        while todo:
            here = todo[-1]
            missing = [] if here in self.done or self._is_read(*here) else self._missing(*here)
            if missing:
                todo.extend(missing)
                continue
            todo.pop()
            if todo and here not in self.done:
                self._finish(*here)

    def _finish(self, node: fx.Node, demand: Demand) -> fx.Node:
        outer, self.current = self.current, node
        made = self.done[node, demand] = self._make(node, demand)
        self.current = outer
        return made

    def _missing(self, node: fx.Node, demand: Demand) -> list[tuple[fx.Node, Demand]]:
        if node in self.attentions and not demand:
            return []
        step = self.analyzed.steps[node]
        out = []
        for k, operand in enumerate(step.operands):
            asked = canonical(
                demand_of_operand(step, k, self.analyzed.fact(operand), demand), self.analyzed.fact(operand)
            )
            if (operand, asked) not in self.done and (operand, asked) not in out:
                out.append((operand, asked))
        return out

    def _is_read(self, node: fx.Node, demand: Demand) -> bool:
        return bool(demand) and self.plan.slot_of(node) is not None

    def _make(self, node: fx.Node, demand: Demand) -> fx.Node:
        slot = self.plan.slot_of(node)
        if slot is not None and demand:
            return self.read(slot)
        if node in self.attentions and not demand:
            return emit_attention(self, self.attentions[node])
        if node.op == "placeholder":
            return self._narrow(
                self.inputs[node.name], self.analyzed.fact(node), set(self.analyzed.fact(node).wide), demand
            )
        if node.op == "get_attr":
            return self.graph.get_attr(str(node.target))
        return self._op(node, demand)

    def _op(self, node: fx.Node, demand: Demand) -> fx.Node:
        step = self.analyzed.steps[node]
        fact = step.fact
        if (
            demand == frozenset(fact.wide)
            and demand
            and node.target in HEAVY
            and node not in self.plan.free | self.plan.lifts
        ):
            raise errors.NotIncremental(detail=f"{node.name} would be computed for all rows in every call")
        computed = demand | (step.full & frozenset(fact.wide))
        context = Context(self, node, step, computed, iter(self.operands(node, demand)))
        made = SPECIAL.get(node.target, plain)(context)
        return self._narrow(made, fact, set(computed), demand)

    def operands(self, node: fx.Node, demand: Demand) -> list[fx.Node]:
        step = self.analyzed.steps[node]
        return [
            self.build(operand, demand_of_operand(step, k, self.analyzed.fact(operand), demand))
            for k, operand in enumerate(step.operands)
        ]

    def _narrow(self, made: fx.Node, fact: Fact, have: set[int], want: Demand) -> fx.Node:
        """From all rows to the new ones, on the axes that were computed in full."""
        for k in sorted(have - want):
            axis = next(d for d in range(len(fact.dims)) if k in fact.flat(d))
            if len(fact.dims[axis]) != 1:
                raise errors.NotIncremental(detail="new rows cannot be cut from a merged axis").at(
                    self.current.name if self.current else "", source_of(self.current) if self.current else ""
                )
            lo, hi = self.span(fact.atoms[k], False)
            made = self.call(aten.slice.Tensor, made, axis, self.number(lo), self.number(hi))
        return made

    # -- slots ---------------------------------------------------------------------------------------------------

    def pool(self, slot: Slot) -> fx.Node:
        """The slot's pool after the new rows were written."""
        if slot.name not in self.written:
            rows = self._behind_prefix(slot, self.build(slot.node, NEW))
            outer, self.current = self.current, slot.node
            flat = self._to_rows(slot, rows)
            pool, _, _, place = self.slot_inputs[slot.name]
            self.written[slot.name] = self.call(self.kernels.append, pool, flat, place, len(slot.before))
            self.current = outer
        return self.written[slot.name]

    def skipped(self, slot: Slot) -> sympy.Expr:
        """How many rows of a slot stand for a prefix that its value does not have."""
        fact = self.analyzed.fact(slot.node)
        return self.lead + fact.atoms[fact.rows[0]].start

    def _behind_prefix(self, slot: Slot, value: fx.Node) -> fx.Node:
        """The new rows of a value, behind zeros where the prefix has new rows and the value has none."""
        missing = sympy.Max(self.skipped(slot) - self.p, 0)
        if self.skipped(slot) == 0:
            return value
        axes = len(self.analyzed.fact(slot.node).dims) - slot.row - 1
        return self.call(aten.constant_pad_nd.default, value, [*(0 for _ in range(2 * axes)), self.number(missing), 0])

    def _to_rows(self, slot: Slot, value: fx.Node) -> fx.Node:
        """``[.., S, ..]`` in the captured axes to ``[*before, B * N, *after]``."""
        fact = self.analyzed.fact(slot.node)
        if slot.batch is None:
            return self._for_each_text(slot, value)
        before = [d for d in range(slot.row) if d != slot.batch]
        after = [d for d in range(slot.row + 1, len(fact.dims)) if d != slot.batch]
        order = [*before, slot.batch, slot.row, *after]
        if order != list(range(len(order))):
            value = self.call(aten.permute.default, value, order)
        return self.call(aten.reshape.default, value, [*slot.before, -1, *slot.after])

    def _for_each_text(self, slot: Slot, value: fx.Node) -> fx.Node:
        """Rows that are the same in every sequence: as many times as there are sequences."""
        axis, texts = len(slot.before), self.number(self.analyzed.captured.batch)
        rows = self.call(aten.reshape.default, value, [*slot.before, 1, -1, *slot.after])
        rows = self.call(aten.expand.default, rows, [*slot.before, texts, -1, *slot.after])
        return self.call(aten.flatten.using_ints, rows, axis, axis + 1)

    def read(self, slot: Slot) -> fx.Node:
        """All rows of a slot, in the captured axes."""
        pool = self.pool(slot)
        _, table, run, _ = self.slot_inputs[slot.name]
        dense = self.call(self.kernels.read, pool, table, run, self.rows, len(slot.before))  # [B, *before, S, *after]
        if self.skipped(slot) != 0:
            first = self.number(self.skipped(slot))
            dense = self.call(aten.slice.Tensor, dense, 1 + len(slot.before), first, self.rows)
        fact = self.analyzed.fact(slot.node)
        if slot.batch is None:  # the same in every sequence
            dense = self.call(aten.slice.Tensor, dense, 0, 0, 1)
        sizes, batch = self.sizes(fact, frozenset(fact.wide)), slot.batch
        if not batch:
            return self.call(aten.reshape.default, dense, sizes)
        lead = [sizes[batch], *sizes[:batch], *sizes[batch + 1 :]]
        return self.call(aten.movedim.int, self.call(aten.reshape.default, dense, lead), 0, batch)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    return (type(value), value)  # 1, 1.0 and True are three arguments


_FUNCTIONS: dict[Any, Any] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Max: max,
    sympy.Min: min,
    sympy.Pow: operator.pow,
    sympy.floor: int,
    torch_sympy.Max: max,
    torch_sympy.Min: min,
    torch_sympy.FloorDiv: operator.floordiv,
    sympy.Mod: operator.mod,
    torch_sympy.Mod: operator.mod,
    torch_sympy.PythonMod: operator.mod,
    torch_sympy.CleanDiv: operator.floordiv,
    torch_sympy.ToFloat: float,
    torch_sympy.IntTrueDiv: operator.truediv,
    torch_sympy.FloatTrueDiv: operator.truediv,
    torch_sympy.FloatPow: operator.pow,
    torch_sympy.PowByNatural: operator.pow,
    torch_sympy.OpaqueUnaryFn_sqrt: lambda x: x**0.5,
}
