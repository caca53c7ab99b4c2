"""One forward sweep: every value of the graph gets its fact, every op the links between its operands and its result."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import CeilToInt, FloatTrueDiv, FloorDiv, Max, Min, ToFloat

import kvpass.analysis.rules  # noqa: F401  (fills the table)
from kvpass import errors
from kvpass.analysis import rounding
from kvpass.analysis.buffers import closed_form
from kvpass.analysis.expressions import Value, constant
from kvpass.analysis.facts import NEGATIVE, Atom, Expr, Fact, Fill, Kind, index, leaf_name
from kvpass.analysis.forms import leaf_of, leaf_value, settle
from kvpass.analysis.repeats import Repeats
from kvpass.analysis.rules.opaque import of_context_alone, opaque
from kvpass.analysis.scope import Axes, Link, Scope, quotient
from kvpass.analysis.table import RULES, Op, Out
from kvpass.ir import Captured, Entries, Input, Role


@dataclass(frozen=True, slots=True)
class Step:
    """One op, understood.

    Attributes:
        facts: of each output; most ops have one.
        operands, links: the tensor arguments in order of occurrence, and for each of their atoms the atom of the
            result that it became (None: read whole).
        full: atoms of the result that are computed over all rows and narrowed afterwards.
    """

    facts: tuple[Fact, ...]
    operands: tuple[fx.Node, ...] = ()
    links: tuple[Link, ...] = ()
    full: frozenset[int] = frozenset()

    @property
    def fact(self) -> Fact:
        return self.facts[0]


@dataclass(frozen=True)
class Analyzed:
    """The captured graph with a step for every tensor value.

    Attributes:
        kinds: of each value a number, which it shares with those that are the same op on operands of the same facts:
            the layers of a stack repeat them. What weights hold does not enter.
        taken: inputs of which the facts say that they hold their `Entries`: to be looked at in every call.
    """

    captured: Captured
    steps: Mapping[fx.Node, Step]
    kinds: Mapping[fx.Node, int] = field(default_factory=dict)
    taken: frozenset[str] = frozenset()

    def fact(self, node: fx.Node) -> Fact:
        return self.steps[node].fact

    @cached_property
    def named(self) -> Mapping[str, fx.Node]:
        """The values by name."""
        return {node.name: node for node in self.steps}

    @cached_property
    def leaves(self) -> Mapping[str, fx.Node]:
        """The values by the name of the function that stands for their entries."""
        return {leaf_name(name): node for name, node in self.named.items()}

    @property
    def together(self) -> bool:
        """A row may depend on the contexts of other sequences: it is known by all of them, and by its place."""
        return any(fact.together is not None for step in self.steps.values() for fact in step.facts)

    @property
    def outputs(self) -> tuple[Any, ...]:
        return tuple(self.captured.module.graph.output_node().args[0])  # type: ignore[arg-type]


def sym(value: Any) -> Expr:
    """A size as sympy: SymInt, SymFloat, or a Python number."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return sympy.sympify(value)
    expr: Expr = value.node.expr
    if expr.has(Max, Min):
        expr = _guarded(expr, value.node.shape_env.guards)
    if expr.has(CeilToInt):
        expr = expr.replace(CeilToInt, _counted)
    return expr.replace(FloorDiv, _divided) if expr.has(FloorDiv) else expr


def _guarded(size: Expr, guards: list[Any]) -> Expr:
    """The symbol that a size is guarded to be equal to: ``64 - max(0, 64 - s)`` beside ``s`` rows."""
    pairs = (guard.expr.args for guard in guards if isinstance(guard.expr, sympy.Eq))
    equal = (b if a == size else a for a, b in pairs if size in (a, b))
    return next((other for other in equal if other.is_Symbol), size)


def _divided(a: Expr, b: Expr) -> Expr:
    """``(s * s) // s`` is ``s``, of sizes."""
    exact = quotient(a, b)
    return FloorDiv(a, b) if exact is None else exact


def _counted(size: Expr) -> Expr:
    """``ceil(float(s) / 1.0)``, the entries of ``arange(0.0, s)``, is ``s``: nothing is rounded by a power of two."""
    if isinstance(size, FloatTrueDiv):
        whole, step = size.args[0].replace(ToFloat, lambda n: n), size.args[1]
        whole = whole.replace(lambda n: n.is_Float and n == int(n), lambda n: sympy.Integer(int(n)))
        if whole.is_integer and step.is_number and abs(float(step)) in (1.0, 0.5, 0.25):
            return sympy.expand(whole * int(1 / step))
    return CeilToInt(size)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """``node.args``; FX types them so broadly that every use would need a cast."""
    return node.args


def dim_of(node: fx.Node, place: int) -> int:
    """The axis that an op is told, as its argument number ``place`` or by name; 0 where it is not."""
    args = arguments(node)
    return int(args[place] if len(args) > place else node.kwargs.get("dim", 0))  # type: ignore[arg-type]


def source_of(node: fx.Node) -> str:
    """The user's innermost line, ``file:line in function: code``; one of PyTorch's own where there is no other."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    found = ""
    for k in range(len(lines) - 1, -1, -1):
        if lines[k].startswith("File "):
            file, line, *where = [part.strip() for part in lines[k][5:].split(",")]
            code = f": {lines[k + 1]}" if k + 1 < len(lines) else ""
            path = file.strip('"')
            told = f"{path}:{line.removeprefix('line ')} {' '.join(where)}{code}"
            if not path.startswith(_TORCH):
                return told
            found = found or told
    return found


_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def analyze(captured: Captured, upto: fx.Node | None = None) -> Analyzed:
    """Facts for every value, or for one and what it is computed from.

    Raises:
        Refusal: an op has no rule, or splits the sequence; it names the node and the user's line.
    """
    context = {leaf_name(i.name): i.name for i in captured.of(Role.CONTEXT)}
    flags = {leaf_name(i.name): i.name for i in captured.inputs if i.entries is Entries.FLAGS}
    bounds = dict.fromkeys(_numbers(captured), rounding.bound_of(torch.int64))
    sources = {i.name: i.source for i in captured.inputs if i.source}
    for node in captured.module.graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta["val"], torch.Tensor) and node.name in sources:
            sources[str(sym(node.meta["val"]))] = sources[node.name]
    axes = Axes(captured.seq, captured.batch, captured.lead, {}, context, flags, bounds=bounds, sources=sources)
    steps: dict[fx.Node, Step] = {}
    inputs = {i.name: i for i in captured.inputs}
    repeats = Repeats()
    for node in captured.module.graph.nodes if upto is None else ancestry(upto):
        if _is_learnt(node, captured, inputs, axes):
            axes.learnt.add(leaf_name(node.name))
        try:
            step = _step(node, steps, captured, inputs, axes, repeats)
        except errors.Refusal as refusal:
            place = next((other for other in steps if other.name == refusal.node), node)
            raise refusal.at(node.name, source_of(place)) from None
        if step is not None:
            steps[node] = step
    return Analyzed(captured, steps, repeats.kinds, frozenset(axes.taken))


def _is_learnt(node: fx.Node, captured: Captured, inputs: Mapping[str, Input], axes: Axes) -> bool:
    """True of weights and buffers, of more than one entry, and of what they enter."""
    if node.op == "placeholder":
        return inputs[node.name].role is Role.CONSTANT and captured.constants[node.name].numel() > 1
    if node.op == "get_attr":
        tensor = attribute(captured.module, str(node.target))
        return isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    return any(leaf_name(operand.name) in axes.learnt for operand in node.all_input_nodes)


def _numbers(captured: Captured) -> set[str]:
    """The symbols of numbers that the caller passes, which may be of any size; others are sizes."""
    numbers, known = set[sympy.Symbol](), set[sympy.Symbol]()
    for node in captured.module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            known |= set[sympy.Symbol]().union(*(sym(size).free_symbols for size in value.shape))
        else:
            numbers |= sym(value).free_symbols
    return {symbol.name for symbol in numbers - known}


def ancestry(*nodes: fx.Node) -> list[fx.Node]:
    """Nodes and all that they are computed from, in the order of the graph."""
    found, todo = set(nodes), list(nodes)
    while todo:
        new = set(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return sorted(found)


def _step(
    node: fx.Node,
    steps: Mapping[fx.Node, Step],
    captured: Captured,
    inputs: Mapping[str, Input],
    axes: Axes,
    repeats: Repeats,
) -> Step | None:
    if node.op == "placeholder":
        given = inputs[node.name]
        if given.role is Role.SYMBOL:
            return None
        return _source(node, given.role, _input_fact(node, given, captured, axes), repeats)
    if node.op == "get_attr":
        tensor = attribute(captured.module, str(node.target))
        if not isinstance(tensor, torch.Tensor):
            return None
        return _source(node, Role.CONSTANT, _lifted_fact(node, tensor), repeats)
    if node.op == "output" or not _tensors(node):
        return None
    if node.target is operator.getitem:
        return _getitem(node, steps, repeats)
    return _call(node, steps, axes, repeats)


def _source(node: fx.Node, role: Role, fact: Fact, repeats: Repeats) -> Step:
    fact = repeats.shared(fact)
    return repeats.step(node, (role, fact), (), lambda: Step((fact,)))


def attribute(module: torch.nn.Module, path: str) -> Any:
    """The tensor, or the function, that a ``get_attr`` node names."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _input_fact(node: fx.Node, given: Input, captured: Captured, axes: Axes) -> Fact:
    if given.role is Role.CONSTANT:
        return _constant_fact(node, captured.constants[node.name])
    value = node.meta["val"]
    dims: list[tuple[Atom, ...]] = []
    for axis, size in enumerate(value.shape):
        if axis in given.seq_axes:
            dims.append((Atom(Kind.SEQ, sym(size)),))
        elif axis == given.batch_axis:
            dims.append((Atom(Kind.BATCH, sym(size)),))
        else:
            dims.append(() if size == 1 else (Atom(Kind.FREE, sym(size)),))
    fact = Fact(tuple(dims), value.dtype, context=given.role is Role.CONTEXT, sequence=given.role is Role.SEQUENCE)
    if given.role is Role.FORM and given.form is not None:  # the same for all texts
        places = dict(zip((index(0), index(1)), map(index, fact.rows), strict=True))
        same = tuple(tuple(a if a.kind is Kind.SEQ else replace(a, bcast=True) for a in dim) for dim in fact.dims)
        return replace(fact, dims=same, expr=given.form.xreplace(places))
    fact = replace(fact, deps=frozenset(fact.rows))
    if fact.dtype not in (torch.bool, torch.uint8, torch.int8) and (
        given.entries is None or not fact.dtype.is_floating_point
    ):
        fact = replace(fact, raw=frozenset({given.name}))
    if fact.dtype.is_floating_point and given.entries is not None:
        axes.taken.add(given.name)
        shown = sympy.Ne(leaf_of(node, fact), 0)
        if given.entries is Entries.MASK:  # how low the numbers are is not known
            return replace(fact, support=sympy.Not(shown), fill=Fill.NEG)
        fact = fact.with_expr(sympy.Piecewise((sympy.Integer(1), shown), (sympy.Integer(0), True)))
    return settle(fact, node, axes)


def _lifted_fact(node: fx.Node, tensor: torch.Tensor) -> Fact:
    """A tensor that the model's code wrote down; a single number is that number."""
    fact = _constant_fact(node, tensor)
    if tensor.numel() != 1 or tensor.is_complex():
        return fact
    return fact.with_expr(constant(tensor.item()))


def _constant_fact(node: fx.Node, tensor: torch.Tensor) -> Fact:
    dims = tuple(() if size == 1 else (Atom(Kind.FREE, sympy.Integer(size)),) for size in tensor.shape)
    fact = Fact(dims, tensor.dtype)
    expr = closed_form(tensor, lambda: leaf_of(node, fact)) if tensor.numel() != 1 else _one_number(node, tensor)
    if expr is None and tensor.dim() <= 4 and not tensor.is_floating_point() and not tensor.is_complex():
        return fact.with_expr(leaf_value(node, fact))
    return replace(fact, expr=expr, large=expr is None and _is_large(tensor))


def _is_large(tensor: torch.Tensor) -> bool:
    """True of a table in which numbers stand that are as large as what masks are filled with."""
    dtype = tensor.dtype
    if not tensor.numel() or not dtype.is_floating_point or dtype is torch.float4_e2m1fn_x2:  # which has no `finfo`
        return False
    if torch.finfo(dtype).max < -NEGATIVE:
        return False
    given = tensor.detach()
    least, most = torch.aminmax(given.float() if dtype.itemsize == 1 else given)
    return bool(least <= NEGATIVE or most >= -NEGATIVE)


def _one_number(node: fx.Node, tensor: torch.Tensor) -> Value | None:
    """A number that stands in a tensor; of the model's own only what a mask is filled with, others are learnt."""
    if tensor.is_complex() or tensor.dtype is torch.float64:
        return None
    number = tensor.item()
    if node.op == "get_attr" or (tensor.is_floating_point() and Fill.of(-abs(number)) in (Fill.NEG, Fill.NEG_INF)):
        return constant(number)
    return None


def _read_by_their_own(op: Op, fact: Fact) -> None:
    """One row that may have kept no key is not combined with later ones; `reads_rows` sees to tables of rows.

    Raises:
        EmptyRow: it is.
    """
    for operand in op.operands:
        if operand.fact.valid == sympy.true:
            continue
        for one in (a for a in operand.fact.atoms if a.kind is Kind.SEQ and a.size == 1):
            others = [a for a in fact.atoms if a.kind is Kind.SEQ and (a.size, a.start) != (1, one.start)]
            if not all(sympy.expand(one.start - a.start - a.size + 1).is_nonnegative for a in others):
                raise errors.EmptyRow(detail=f"{op.node.target} reads a row whose own mask may have kept no key")


def _apart(fact: Fact, op: Op) -> Fact:
    """An axis of as many entries as the batch and one, say, makes a value of the number of texts."""
    batch = op.scope.axes.batch
    for atom in fact.atoms if batch.free_symbols and fact.batch is None else ():
        if atom.kind is Kind.FREE and atom.size.has(batch):
            why = f"an axis of {atom.size} entries speaks of the number of texts"
            return replace(fact, batch=op.cause(why, errors.MixesBatch))
    return fact


def _of_one_context(fact: Fact, op: Op) -> Fact:
    """What mixes the sequences of the context alone is a function of the context of the whole batch."""
    known = all(x.fact.batch is None for x in op.operands)
    if fact.batch is None or not known or not fact.of_context():
        return fact
    return replace(fact, batch=None, together=fact.together or fact.batch)


def _getitem(node: fx.Node, steps: Mapping[fx.Node, Step], repeats: Repeats) -> Step:
    source, k = arguments(node)
    fact, full = steps[source].facts[k], steps[source].full
    step = Step((fact,), (source,), (tuple(range(len(fact.atoms))),), full)
    return repeats.step(node, (operator.getitem, fact, full), (source,), lambda: step)


def _call(node: fx.Node, steps: Mapping[fx.Node, Step], axes: Axes, repeats: Repeats) -> Step:
    tensors, operands = _tensors(node), list[fx.Node]()

    def given(arg: Any) -> Any:
        """An argument without the names of nodes: facts, sizes and numbers."""
        if isinstance(arg, fx.Node):
            if arg in steps:
                operands.append(arg)
                return steps[arg].fact
            return sym(arg.meta["val"]) if "val" in arg.meta else arg.name  # a branch of `torch.cond` has none
        if isinstance(arg, (list, tuple)):
            return type(arg)(given(a) for a in arg)
        return sym(arg) if isinstance(arg, torch.SymInt) else arg

    args = tuple(given(a) for a in node.args)
    kwargs = {k: given(a) for k, a in node.kwargs.items()}
    shapes = tuple(tuple(sym(d) for d in t.shape) for t in tensors)
    dtypes = tuple(t.dtype for t in tensors)

    def op() -> Op:
        scope = Scope(node.name, axes)
        return Op(node, scope, opened(args, scope), opened(kwargs, scope), shapes, dtypes)

    def compute() -> Step:
        return _ruled(node, op, tuple(operands))

    return repeats.step(node, (node.target, args, tuple(kwargs.items()), shapes, dtypes), operands, compute)


def _ruled(node: fx.Node, op: Callable[[], Op], operands: tuple[fx.Node, ...]) -> Step:
    """What the rule of an op says; a function of the context alone needs none."""
    try:
        rule = RULES.get(node.target)
        if rule is None:
            raise errors.UnknownOp(detail=f"{node.target}")
        seen = op()
        result = rule(seen)
        outs = result if isinstance(result, list) else [result]
        return _closed(seen, outs, () if outs[0].detached else operands)
    except errors.Refusal as refusal:
        seen = op()  # without what the rule had begun
        if not of_context_alone(seen):
            raise _came_first(seen, refusal) from None
        return _closed(seen, opaque(seen), operands)


def _came_first(op: Op, refusal: errors.Refusal) -> errors.Refusal:
    """Rows in a shape that no rule takes, but which all depend on all rows already: that says more."""
    causes = (x.fact.whole for x in op.operands if x.fact.rows)
    first = next(filter(None, causes), None) if isinstance(refusal, errors.UnsupportedShape) else None
    return refusal if first is None else first.refusal()


def opened(arg: Any, scope: Scope) -> Any:
    """An argument with its facts opened in a scope, in order."""
    if isinstance(arg, Fact):
        return scope.open(arg)
    if isinstance(arg, dict):
        return {k: opened(a, scope) for k, a in arg.items()}
    return type(arg)(opened(a, scope) for a in arg) if isinstance(arg, (list, tuple)) else arg


def _closed(op: Op, outs: list[Out], operands: tuple[fx.Node, ...]) -> Step:
    scope, facts = op.scope, []
    first: dict[int, int] = {}
    for k, out in enumerate(outs):
        fact, place = scope.close(out.dims, out.ghosts, op.dtypes[k], out.parts)
        if any(sympy.expand(a - b) != 0 for a, b in zip(fact.shape(), op.shapes[k], strict=True)):
            raise errors.UnsupportedShape(detail=f"{op.node.target}: {fact.shape()} was inferred for {op.shapes[k]}")
        _read_by_their_own(op, fact)
        fact = _apart(settle(fact, op.node, scope.axes) if len(outs) == 1 else fact, op)
        facts.append(_of_one_context(fact, op))
        first = first or place
    links = tuple(scope.link(x, first) for x in scope.operands) if operands else ()
    full = frozenset(first[scope.representative(x)] for x in scope.full if scope.representative(x) in first)
    return Step(tuple(facts), operands, links, full)
