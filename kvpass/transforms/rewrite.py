"""The incremental graph, rebuilt from the outputs by demand.

``build(value, demand)`` returns the node of the new graph that holds the demanded rows of a captured value. Sizes are
recomputed from the axes, tables and ranges move by the number of cached rows, and a stored value that is asked for all
rows becomes "append the new rows, read all rows".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy import functions as torch_sympy

from kvpass import errors
from kvpass.analysis.facts import Atom, Fact, Kind
from kvpass.analysis.sweep import Analyzed, Step, source_of, sym
from kvpass.ir import KernelOps, Role
from kvpass.transforms.attend import emit_attention
from kvpass.transforms.plan import HEAVY, NEW, Demand, Plan, Slot, canonical, demand_of_operand
from kvpass.transforms.recognise import Recognised

aten = torch.ops.aten


@dataclass(frozen=True)
class Incremental:
    """The rewritten graph.

    Its arguments are those of the captured graph, then ``rows`` (S) and ``start`` (P), then for each slot in order its
    pool, block table, write pages and write offsets.

    Attributes:
        origin: by node name, the captured node it came from.
    """

    plan: Plan
    module: fx.GraphModule
    origin: dict[str, str] = field(default_factory=dict)


def rewrite(plan: Plan, kernels: KernelOps, attentions: Mapping[fx.Node, Recognised] | None = None) -> Incremental:
    """Build the incremental graph of a plan.

    Args:
        kernels: what reads and writes pools and computes attention.
        attentions: by the value that holds its result, each attention that was recognised.

    Raises:
        NotIncremental: an op cannot be computed for the new rows alone.
    """
    return Builder(plan, kernels, attentions or {}).run()


class Builder:
    """State of one rewrite: the new graph and what has been built in it."""

    def __init__(self, plan: Plan, kernels: KernelOps, attentions: Mapping[fx.Node, Recognised]) -> None:
        self.plan, self.kernels, self.attentions = plan, kernels, attentions
        self.analyzed: Analyzed = plan.analyzed
        self.captured = plan.analyzed.captured
        self.graph = fx.Graph()
        self.done: dict[tuple[fx.Node, Demand], fx.Node] = {}
        self.numbers: dict[sympy.Basic, Any] = {}
        self.written: dict[str, fx.Node] = {}
        self.origin: dict[str, str] = {}
        self.masks: dict[Any, fx.Node] = {}
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
        return Incremental(self.plan, module, self.origin)

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
        self.numbers[self.captured.seq] = self.rows
        self.p = sympy.Symbol("start", integer=True, nonnegative=True)
        self.numbers[self.p] = self.start
        self.slot_inputs = {
            slot.name: tuple(self.graph.placeholder(f"{kind}_{k}") for kind in ("pool", "table", "page", "offset"))
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
        if atom.kind is not Kind.SEQ or everything or atom.size.is_number:
            return sympy.Integer(0), atom.size
        if atom.start == 0:
            return self.p, atom.size
        return sympy.Max(self.p - atom.start, 0), atom.size

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
        node = self.graph.call_function(target, args, kwargs)
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
        if demand == frozenset(fact.wide) and demand and node.target in HEAVY and node not in self.plan.free:
            raise errors.NotIncremental(detail=f"{node.name} would be computed for all rows in every call")
        computed = demand | (step.full & frozenset(fact.wide))
        context = Context(self, node, step, computed, iter(self.operands(node, demand)))
        made = _SPECIAL.get(node.target, plain)(context)
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
            rows = self.build(slot.node, NEW)
            outer, self.current = self.current, slot.node
            flat = self._to_rows(slot, rows)
            pool, _, page, offset = self.slot_inputs[slot.name]
            self.written[slot.name] = self.call(self.kernels.append, pool, flat, page, offset, len(slot.before))
            self.current = outer
        return self.written[slot.name]

    def _to_rows(self, slot: Slot, value: fx.Node) -> fx.Node:
        """``[.., S, ..]`` in the captured axes to ``[B * N, *before, *after]``."""
        fact = self.analyzed.fact(slot.node)
        rest = [d for d in range(len(fact.dims)) if d not in (slot.batch, slot.row)]
        order = [*([] if slot.batch is None else [slot.batch]), slot.row, *rest]
        if order != list(range(len(order))):
            value = self.call(aten.permute.default, value, order)
        return self.call(aten.reshape.default, value, [-1, *slot.before, *slot.after])

    def read(self, slot: Slot) -> fx.Node:
        """All rows of a slot, in the captured axes."""
        pool = self.pool(slot)
        table = self.slot_inputs[slot.name][1]
        dense = self.call(self.kernels.read, pool, table, self.rows, len(slot.before))  # [B, *before, S, *after]
        fact = self.analyzed.fact(slot.node)
        if slot.batch in (None, 0):
            return self.call(aten.reshape.default, dense, self.sizes(fact, frozenset(fact.wide)))
        sizes = self.sizes(fact, frozenset(fact.wide))
        batch = slot.batch or 0
        lead = [sizes[batch], *sizes[:batch], *sizes[batch + 1 :]]
        return self.call(aten.movedim.int, self.call(aten.reshape.default, dense, lead), 0, batch)


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
    torch_sympy.ToFloat: float,
    torch_sympy.IntTrueDiv: operator.truediv,
    torch_sympy.FloatTrueDiv: operator.truediv,
    torch_sympy.FloatPow: operator.pow,
    torch_sympy.PowByNatural: operator.pow,
    torch_sympy.OpaqueUnaryFn_sqrt: lambda x: x**0.5,
}


# -- ops whose arguments speak of sizes or positions ---------------------------------------------------------------


@dataclass
class Context:
    """One op in the making: its step, the atoms computed in full, and its operands already built."""

    builder: Builder
    node: fx.Node
    step: Step
    everything: Demand
    operands: Any

    def args(self) -> tuple[Any, ...]:
        return tuple(self.convert(a) for a in self.node.args)

    def kwargs(self) -> dict[str, Any]:
        return {k: self.convert(v) for k, v in self.node.kwargs.items()}

    def convert(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            if arg in self.builder.analyzed.steps:
                return next(self.operands)
            return self.builder.number(sym(arg.meta["val"]))
        if isinstance(arg, (list, tuple)):
            return type(arg)(self.convert(a) for a in arg)
        return arg

    def sizes(self) -> list[Any]:
        return self.builder.sizes(self.step.fact, self.everything)


def plain(c: Context) -> fx.Node:
    """The same op on the demanded rows of its operands."""
    args = c.args()
    return c.builder.call(c.node.target, *args, **c.kwargs())


def _reshape(c: Context) -> fx.Node:
    return c.builder.call(aten.reshape.default, next(c.operands), c.sizes())


def _expand(c: Context) -> fx.Node:
    return c.builder.call(aten.expand.default, next(c.operands), c.sizes())


def _filled(c: Context) -> fx.Node:
    value = c.node.meta["val"]
    number = c.step.fact.expr
    if number is None:
        raise errors.NotIncremental(detail="a tensor filled with an unknown number")
    fill: Any = bool(number) if value.dtype is torch.bool else c.builder.number(number)
    if number in (sympy.oo, -sympy.oo):
        fill = float(number)
    return c.builder.call(aten.full.default, c.sizes(), fill, dtype=value.dtype, device=value.device)


def _arange(c: Context) -> fx.Node:
    """``arange(start, end, step)`` over the demanded entries."""
    args = [c.convert(a) for a in c.node.args]
    start, step = 0, 1
    if c.node.target is not aten.arange.default:
        start = args[0]
        step = args[2] if len(args) > 2 else c.node.kwargs.get("step", 1)
    value, b = c.node.meta["val"], c.builder
    atoms = c.step.fact.atoms
    lo, hi = b.span(atoms[0], 0 in c.everything) if atoms else (sympy.Integer(0), sympy.Integer(1))
    if isinstance(start, float) or isinstance(step, float):
        full = b.call(c.node.target, *args, dtype=value.dtype, device=value.device)
        return full if 0 in c.everything else b.call(aten.slice.Tensor, full, 0, b.number(lo), b.number(hi))
    first, last = _at(b, start, step, lo), _at(b, start, step, hi)
    return b.call(aten.arange.start_step, first, last, step, dtype=value.dtype, device=value.device)


def _at(b: Builder, start: Any, step: Any, place: sympy.Expr) -> Any:
    offset = b.number(place * step) if isinstance(step, int) else b.call(operator.mul, b.number(place), step)
    if start == 0 and not isinstance(start, fx.Node):
        return offset
    if not isinstance(start, fx.Node) and not isinstance(offset, fx.Node):
        return start + offset
    return b.call(operator.add, start, offset)


def _slice(c: Context) -> fx.Node:
    x = next(c.operands)
    b, source = c.builder, c.step.operands[0]
    before, after = b.analyzed.fact(source), c.step.fact
    axis = int(c.node.args[1]) % len(before.dims) if len(c.node.args) > 1 else 0  # type: ignore[call-overload]
    atom = _row_atom(before, axis)
    if atom is None:
        args = tuple(c.convert(a) for a in c.node.args[1:])
        return b.call(aten.slice.Tensor, x, *args)
    new = _row_atom(after, axis) or Atom(Kind.SEQ, sym(c.node.meta["val"].shape[axis]))
    whole = c.step.links[0][before.flat(axis)[0]] is None
    flat = after.flat(axis)
    everything = whole or (len(flat) > 0 and flat[0] in c.everything)
    offset = new.start - atom.start
    if before == after or sym(c.node.meta["val"].shape[axis]) == atom.size:
        return x
    asked = canonical(demand_of_operand(c.step, 0, before, c.everything), before)
    origin, _ = b.span(atom, before.flat(axis)[0] in asked)
    lo, hi = b.span(new, everything)
    return b.call(aten.slice.Tensor, x, axis, b.number(offset + lo - origin), b.number(offset + hi - origin))


def _row_atom(fact: Fact, axis: int) -> Atom | None:
    dim = fact.dims[axis]
    return dim[0] if len(dim) == 1 and dim[0].kind is Kind.SEQ else None


def _select(c: Context) -> fx.Node:
    x = next(c.operands)
    b, before = c.builder, c.builder.analyzed.fact(c.step.operands[0])
    axis = int(c.node.args[1]) % len(before.dims)  # type: ignore[call-overload]
    atom = _row_atom(before, axis)
    place = c.convert(c.node.args[2])
    if atom is None or atom.size.is_number:
        return b.call(aten.select.int, x, axis, place)
    where = sym(c.node.args[2].meta["val"]) if isinstance(c.node.args[2], fx.Node) else sympy.sympify(c.node.args[2])
    where = atom.size + where if where.is_negative else where
    asked = canonical(demand_of_operand(c.step, 0, before, c.everything), before)
    origin, _ = b.span(atom, before.flat(axis)[0] in asked)
    return b.call(aten.select.int, x, axis, b.number(where - origin))


def _triangle(c: Context) -> fx.Node:
    """Row and column indices start at the first computed entry: the diagonal moves with them."""
    x, b, fact = next(c.operands), c.builder, c.step.fact
    diagonal: Any = c.convert(c.node.args[1]) if len(c.node.args) > 1 else c.node.kwargs.get("diagonal", 0)
    firsts = []
    for axis in (-2, -1):
        flat = fact.flat(axis)
        firsts.append(b.span(fact.atoms[flat[0]], flat[0] in c.everything)[0] if len(flat) else sympy.Integer(0))
    moved = b.number(firsts[0] - firsts[1])
    if isinstance(moved, fx.Node) or isinstance(diagonal, fx.Node):
        moved = b.call(operator.add, moved, diagonal)
    else:
        moved = moved + diagonal
    return b.call(c.node.target, x, moved)


def _repeat(c: Context) -> fx.Node:
    if any(isinstance(a, fx.Node) for a in c.node.args[1]):  # type: ignore[union-attr]
        raise errors.NotIncremental(detail="repeat with a count that depends on the sequence")
    return plain(c)


def _sdpa(c: Context) -> fx.Node:
    """``is_causal`` counts indices from the upper left: spell it as a mask over rows."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    args = dict(zip(names, c.args(), strict=False)) | c.kwargs()
    if args.pop("is_causal", False):
        if args.get("attn_mask") is not None:
            raise errors.NotIncremental(detail="attn_mask beside is_causal")
        b, q = c.builder, c.builder.analyzed.fact(c.step.operands[0])
        k = b.analyzed.fact(c.step.operands[1])
        (i,), (j,) = q.dims[-2], k.dims[-2]
        device = c.node.meta["val"].device
        lo, hi = b.span(i, q.flat(-2)[0] in demand_of_operand(c.step, 0, q, c.everything))
        rows = b.call(aten.arange.start_step, b.number(lo), b.number(hi), 1, device=device)
        keys = b.call(aten.arange.start_step, 0, b.number(j.size), 1, device=device)
        args["attn_mask"] = b.call(aten.le.Tensor, keys, b.call(aten.unsqueeze.default, rows, 1))
    query, key, value = args.pop("query"), args.pop("key"), args.pop("value")
    return c.builder.call(aten.scaled_dot_product_attention.default, query, key, value, **args)


_SPECIAL: dict[Any, Callable[[Context], fx.Node]] = {
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.expand.default: _expand,
    aten.broadcast_to.default: _expand,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.tril.default: _triangle,
    aten.triu.default: _triangle,
    aten.repeat.default: _repeat,
    aten.scaled_dot_product_attention.default: _sdpa,
    **dict.fromkeys(
        (
            aten.zeros.default,
            aten.zeros_like.default,
            aten.new_zeros.default,
            aten.ones.default,
            aten.ones_like.default,
            aten.new_ones.default,
            aten.full.default,
            aten.full_like.default,
            aten.new_full.default,
            aten.scalar_tensor.default,
        ),
        _filled,
    ),
}
