"""Demand and cut: which rows of which value are needed, and what must be remembered so that no row is computed twice.

A value is asked for its *new* rows or for *all* rows, per sequence axis. The backward sweep starts from what the caller
gets. A row value that is asked for all its rows is where the past is needed: somewhere between the inputs and that
value something must be stored. A minimum cut chooses what: the fewest bytes per row, as near to the demand as possible,
among the values whose rows are *proved* to depend on nothing but the rows up to their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import inf

import networkx as nx
import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from kvpass import errors
from kvpass.analysis.expressions import implies
from kvpass.analysis.facts import Atom, Fact, Kind, Prefix, index, product
from kvpass.analysis.sweep import Analyzed, Step, source_of
from kvpass.analysis.table import OF_THE_ROW_BELOW

aten = torch.ops.aten
Demand = frozenset[int]  # the SEQ atoms of a value that are asked for all rows; the others for the new ones
NEW: Demand = frozenset()

HEAVY = (
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.mv.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.scaled_dot_product_attention.default,
    aten.embedding.default,
)


LEAST_WORK = 8
"""Products of a number, up to which a row that depends on its place alone is computed anew in every call."""

MOVES = (aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default)
UNITS = (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)


@dataclass(frozen=True)
class Slot:
    """One stored value.

    Attributes:
        node: the value in the captured graph. ``row``: its sequence axis; ``batch``: its batch axis or None.
        before, after: sizes of a row's axes before and after the sequence axis, without the batch and size-one axes.
        is_output: the caller gets all its rows.
    """

    node: fx.Node
    row: int
    batch: int | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    dtype: torch.dtype
    is_output: bool = False

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.before + self.after

    @property
    def bytes_per_row(self) -> int:
        size = self.dtype.itemsize
        for d in self.shape:
            size *= d
        return size


@dataclass(frozen=True)
class Plan:
    """What to store and how to ask for it.

    Attributes:
        slots: in graph order.
        free: values that are cheap to rebuild from the inputs for all rows.
        tail: at least this many of the last rows must be computed in every call; a number, or made of those of a call.
        lifts: values that may be computed for all rows in a call, and are not stored, since a narrower one is.
        ahead: the rows of these prefixes are part of what every row is known by.
    """

    analyzed: Analyzed
    slots: tuple[Slot, ...]
    free: frozenset[fx.Node]
    tail: sympy.Expr
    lifts: frozenset[fx.Node] = frozenset()
    ahead: tuple[Prefix, ...] = ()

    @cached_property
    def _slots(self) -> dict[fx.Node, Slot]:
        return {slot.node: slot for slot in self.slots}

    @property
    def bytes_per_row(self) -> int:
        return sum(slot.bytes_per_row for slot in self.slots if not slot.is_output)

    def slot_of(self, node: fx.Node) -> Slot | None:
        return self._slots.get(node)


def canonical(demand: Demand, fact: Fact) -> Demand:
    """A demand without the atoms for which new and all are the same rows."""
    return demand & frozenset(fact.wide)


def demand_of_operand(step: Step, k: int, fact: Fact, demand: Demand) -> Demand:
    """What operand ``k`` (of this fact) is asked for when the op's result is asked for ``demand``."""
    asked = set()
    for atom, link in zip(fact.wide, [step.links[k][a] for a in fact.wide], strict=True):
        if link is None or link in step.full or (link in demand and link in step.fact.wide):
            asked.add(atom)
    return frozenset(asked)


def plan(analyzed: Analyzed, lifts: frozenset[fx.Node] = frozenset()) -> Plan:
    """Find the slots.

    Args:
        lifts: values that are to be made from something narrower, which is to be stored in their place.

    Raises:
        Refusal: a row that later rows need is not proved to depend on rows up to its own only.
    """
    free = _free_values(analyzed)
    sweep = _Sweep(analyzed, free)
    for node in _output_nodes(analyzed):
        for refusal in _read_above(analyzed, node):
            raise refusal
        sweep.ask(node, frozenset(analyzed.fact(node).wide))
    sweep.run()
    outputs = set(_output_nodes(analyzed))
    stored = {_before_moves(analyzed, node, outputs) for node in _cut(analyzed, free, sweep.sinks, lifts)}
    order = [n for n in analyzed.steps if n in stored]
    slots = tuple(_slot(analyzed, node, node in outputs and node in sweep.only_output) for node in order)
    if not slots:
        raise errors.NothingStored()
    ahead = frozenset[Prefix]().union(*(analyzed.fact(slot.node).ahead for slot in slots))
    return Plan(analyzed, slots, free, sympy.Max(1, *sweep.tails), lifts, tuple(sorted(ahead)))


def _output_nodes(analyzed: Analyzed) -> list[fx.Node]:
    return [n for n in analyzed.outputs if isinstance(n, fx.Node) and n in analyzed.steps]


def _free_values(analyzed: Analyzed) -> frozenset[fx.Node]:
    free = set()
    for node, step in analyzed.steps.items():
        of_rows = bool(step.fact.deps or step.fact.whole) or _is_work(analyzed, node, step)
        heavy = node.target in HEAVY and of_rows
        if not heavy and all(operand in free for operand in step.operands):
            free.add(node)
    return frozenset(free)


def _is_work(analyzed: Analyzed, node: fx.Node, step: Step) -> bool:
    """True of a row that no token enters and that is less to keep than to compute: a projection of positions."""
    fact = step.fact
    if not step.operands or not fact.index_only() or len(fact.wide) != 1 or any(_obstacles(analyzed, node, fact)):
        return False
    atoms = analyzed.fact(step.operands[0]).atoms
    summed = product(tuple(a for a, link in zip(atoms, step.links[0], strict=True) if link is None))
    return bool(summed.is_Integer and summed >= LEAST_WORK)


class _Sweep:
    """The backward sweep: every (value, demand) that is reached, and the values that are asked for all rows."""

    def __init__(self, analyzed: Analyzed, free: frozenset[fx.Node]) -> None:
        self.analyzed, self.free = analyzed, free
        self.seen: set[tuple[fx.Node, Demand]] = set()
        self.todo: list[tuple[fx.Node, Demand]] = []
        self.sinks: dict[fx.Node, None] = {}
        self.only_output: set[fx.Node] = set()
        self.tails: set[sympy.Expr] = set()

    def ask(self, node: fx.Node, demand: Demand) -> None:
        demand = canonical(demand, self.analyzed.fact(node))
        if (node, demand) not in self.seen:
            self.seen.add((node, demand))
            self.todo.append((node, demand))

    def run(self) -> None:
        outputs = {node for node, _ in self.todo}
        self.only_output = set(outputs)
        while self.todo:
            node, demand = self.todo.pop()
            if demand and node in self.free:
                continue
            if demand and demand == frozenset(self.analyzed.fact(node).wide):
                self._all_rows(node, demand)
            else:
                self._through(node, demand)

    def _all_rows(self, node: fx.Node, demand: Demand) -> None:
        if len(demand) > 1:
            kept = ", since the model returns them, or keeps them as an attribute" if node in self.only_output else ""
            detail = f"pairs of rows are needed for all rows at once{kept}"
            raise errors.NotIncremental(detail=detail).at(node.name, source_of(node))
        self.sinks[node] = None
        self.ask(node, NEW)

    def _through(self, node: fx.Node, demand: Demand) -> None:
        step = self.analyzed.steps[node]
        self._note_tail(step)
        for k, operand in enumerate(step.operands):
            asked = demand_of_operand(step, k, self.analyzed.fact(operand), demand)
            if asked:
                self.only_output.discard(operand)
            self.ask(operand, asked)

    def _note_tail(self, step: Step) -> None:
        for atom in step.fact.atoms:
            if atom.kind is Kind.SEQ and not atom.grows and not atom.start.is_number:
                back = sympy.expand(self.analyzed.captured.seq - atom.start)
                if not back.has(self.analyzed.captured.seq):
                    self.tails.add(back)


# -- the cut --------------------------------------------------------------------------------------------------------


def _cut(
    analyzed: Analyzed, free: frozenset[fx.Node], sinks: dict[fx.Node, None], lifts: frozenset[fx.Node]
) -> set[fx.Node]:
    """The cheapest storable values that separate every heavy computation from every demand for all rows."""
    graph: nx.DiGraph = nx.DiGraph()
    for sink in sinks:
        graph.add_edge((sink, "out"), "demand")
        _grow(analyzed, free, graph, sink, lifts)
        _check_separable(graph, analyzed, sink)
    if not sinks:
        return set()
    _, (far, near) = nx.minimum_cut(graph, "work", "demand")  # of several minimum cuts the one nearest to the demand
    return {place[0] for place in near if place != "demand" and place[1] == "out" and (place[0], "in") in far}


def _before_moves(analyzed: Analyzed, node: fx.Node, outputs: set[fx.Node]) -> fx.Node:
    """The same rows before axes of size one were added or taken away, and before rows became columns.

    ``q @ k.transpose(-2, -1)`` asks for ``[B, H, D, S]``, of which a row is strewn all over the memory.
    """
    while node not in outputs and (
        node.target in UNITS or (node.target in MOVES and _rows_are_columns(analyzed, node))
    ):
        (operand,) = analyzed.steps[node].operands
        if _cost(analyzed, operand) != _cost(analyzed, node):
            break
        node = operand
    return node


def _rows_are_columns(analyzed: Analyzed, node: fx.Node) -> bool:
    slot = _slot(analyzed, node, False)
    return bool(slot.before) and not slot.after


def _grow(
    analyzed: Analyzed, free: frozenset[fx.Node], graph: nx.DiGraph, sink: fx.Node, lifts: frozenset[fx.Node]
) -> None:
    """Add the values behind a demand, up to the heavy ops."""
    graph.add_node("work")
    todo = [sink]
    while todo:
        node = todo.pop()
        if (node, "in") in graph:
            continue
        cost = inf if node in lifts else _cost(analyzed, node)
        graph.add_edge((node, "in"), (node, "out"), **({} if cost == inf else {"capacity": cost}))
        if node.target in HEAVY and node not in lifts:
            graph.add_edge("work", (node, "in"))
            continue
        for operand in analyzed.steps[node].operands:
            if operand not in free:
                graph.add_edge((operand, "out"), (node, "in"))
                todo.append(operand)


def _cost(analyzed: Analyzed, node: fx.Node) -> float:
    fact = analyzed.fact(node)
    several = isinstance(node.meta.get("val"), (list, tuple))  # what may be stored is one of them
    if several or next(_obstacles(analyzed, node, fact), None) is not None:
        return inf
    size = sympy.Mul(*(a.size for a in fact.atoms if a.kind is Kind.FREE))
    return int(size) * fact.dtype.itemsize


def storable(analyzed: Analyzed, node: fx.Node) -> bool:
    """True where rows of a value may be kept: row ``i`` is a function of the inputs' rows up to ``i``."""
    return _cost(analyzed, node) < inf


def _check_separable(graph: nx.DiGraph, analyzed: Analyzed, sink: fx.Node) -> None:
    """Raise if some heavy computation reaches the sink without passing a storable value."""
    seen, todo = set(), [(sink, "out")]
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        for there, _, data in graph.in_edges(here, data=True):
            if "capacity" in data:
                continue
            if there == "work":
                _refuse(analyzed, sink, here[0])
            todo.append(there)


def _refuse(analyzed: Analyzed, sink: fx.Node, node: fx.Node) -> None:
    for value in (node, sink):
        fact = analyzed.fact(value)
        for refusal in _obstacles(analyzed, value, fact):
            raise refusal
    raise errors.NotIncremental(detail=f"{sink.name} needs all rows of {node.name}, which cannot be stored").at(
        sink.name, source_of(sink)
    )


def _obstacles(analyzed: Analyzed, node: fx.Node, fact: Fact) -> Iterator[errors.Refusal]:
    """Why a value may not be stored. None of these: row ``i`` is a function of the inputs' rows up to ``i``."""
    for _, cause in fact.tainted():
        place = analyzed.named.get(cause.node, node)
        yield cause.refusal().at(cause.node, source_of(place))
    for refusal in _shape_obstacles(analyzed, fact):
        place = _origin(analyzed, node, type(refusal))
        yield refusal.at(place.name, source_of(place))
    yield from _read_above(analyzed, node)
    if not fact.valid.free_symbols <= set().union(*(f.free_symbols for f in fact.valid.atoms(AppliedUndef)), set()):
        yield errors.EmptyRow(detail=f"rows are meaningful only where {fact.valid}").at(node.name, source_of(node))


def _read_above(analyzed: Analyzed, node: fx.Node) -> Iterator[errors.Refusal]:
    """That entries which are not the row's own are kept, or returned (`only_where`)."""
    terms = sympy.And.make_args(analyzed.fact(node).valid)
    if any(term is not sympy.true and not term.atoms(AppliedUndef) for term in terms):
        yield errors.DependsOnFuture(detail=f"{node.target} {OF_THE_ROW_BELOW}").at(node.name, source_of(node))


def _origin(analyzed: Analyzed, node: fx.Node, error: type[errors.Refusal]) -> fx.Node:
    """The first value on the way to this one that has the same obstacle."""
    while error is errors.DependsOnFuture:
        earlier = (
            n
            for n in analyzed.steps[node].operands
            if any(type(e) is error for e in _shape_obstacles(analyzed, analyzed.fact(n)))
        )
        found = next(earlier, None)
        if found is None:
            return node
        node = found
    return node


def _shape_obstacles(analyzed: Analyzed, fact: Fact) -> Iterator[errors.Refusal]:
    rows = fact.rows
    if len(rows) == 1 and fact.deps and fact.atoms[rows[0]].start.is_positive:
        yield errors.DependsOnFuture(detail=f"row i depends on row i + {fact.atoms[rows[0]].start}")
    lead, seq = analyzed.captured.lead, analyzed.captured.seq
    tables = ((-lead, seq + lead), (sympy.S.Zero, seq))  # with what stands before the first row, and without
    if len(rows) != 1 or (fact.atoms[rows[0]].start, fact.atoms[rows[0]].size) not in tables:
        yield errors.NotIncremental(detail=f"a value of axes {fact} is not a table of one row per position")
        return
    own = rows[0]
    if sum(atom.kind is Kind.BATCH and atom.size != 1 for atom in fact.atoms) > 1:
        yield errors.MixesBatch(detail=f"in {fact} a row has entries of every sequence of the batch")
    for dim in fact.dims:
        if len(dim) > 1 and any(atom.kind is not Kind.FREE for atom in dim):
            yield errors.NotIncremental(detail=f"in {fact} the sequence is merged with another axis")
    for k in fact.deps - {own}:
        if not implies(sympy.true, sympy.Le(fact.position(k), fact.position(own))):
            later = str(
                fact.position(k).xreplace({index(own): sympy.Symbol("i"), analyzed.captured.seq: sympy.Symbol("S")})
            )
            yield errors.DependsOnFuture(detail=f"row i depends on row {later}, of S rows")
    for atom in fact.atoms:
        if atom.kind is Kind.FREE and not atom.size.is_number:
            yield errors.NotIncremental(detail=f"a row's size is not constant: {fact}")


def _slot(analyzed: Analyzed, node: fx.Node, is_output: bool) -> Slot:
    fact = analyzed.fact(node)
    row = next(d for d, dim in enumerate(fact.dims) if any(a.kind is Kind.SEQ for a in dim))
    batch = next((d for d, dim in enumerate(fact.dims) if any(a.kind is Kind.BATCH for a in dim)), None)

    def sizes(dims: range) -> tuple[int, ...]:
        out = [int(_size(fact.dims[d])) for d in dims if d not in (row, batch)]
        return tuple(size for size in out if size != 1)

    return Slot(node, row, batch, sizes(range(row)), sizes(range(row + 1, len(fact.dims))), fact.dtype, is_output)


def _size(dim: tuple[Atom, ...]) -> sympy.Expr:
    return sympy.Mul(*(atom.size for atom in dim))
