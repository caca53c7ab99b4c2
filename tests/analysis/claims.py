"""What a fact claims of a tensor, held against the tensor.

A graph is run on random inputs, then on inputs that differ in one row, in one sequence of the batch, in the order of
the batch, or in length. Every value of the graph is compared with what its fact says may have changed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor, fx

from kvpass.analysis.facts import Atom, Fact, Fill, Kind, index
from kvpass.analysis.sweep import Analyzed, sym
from kvpass.ir import Captured, Role
from kvpass.kernels.reference import evaluate
from tests.analysis.tools import BATCH, ROWS

CLOSE, ROUNDED = 1e-9, 1e-5  # between two float64 values; where another dtype has rounded one of them
PERTURBED = (1, 3, ROWS - 1)
VERY_NEGATIVE = -800.0  # exp() of it is zero in float64


@dataclass(frozen=True)
class Problem:
    """A value that is not what its fact says."""

    node: str
    target: Any
    claim: str

    def __str__(self) -> str:
        return f"{self.node} ({self.target}): {self.claim}"


class Values(fx.Interpreter):
    """Every value of a graph for one set of inputs, and the closed forms of its facts evaluated on it."""

    def __init__(self, analyzed: Analyzed, inputs: Sequence[Tensor], batch: int, rows: int) -> None:
        super().__init__(analyzed.captured.module, garbage_collect_values=False)
        self.analyzed, self.inputs = analyzed, list(inputs)
        captured = analyzed.captured
        self.sizes = {captured.seq: sympy.Integer(rows), captured.batch: sympy.Integer(batch)}
        self.batch, self.rows = batch, rows
        self.numbers: dict[Any, int] = {}
        nodes = [n for n in captured.module.graph.nodes if n.op == "placeholder"]
        tensors = iter(inputs)
        symbols = [i.role is Role.SYMBOL for i in captured.inputs]
        args = [self.number(sym(n.meta["val"])) if s else next(tensors) for n, s in zip(nodes, symbols, strict=True)]
        with torch.no_grad():
            self.run(*args)

    def number(self, size: Any) -> int:
        if isinstance(size, (int, sympy.Integer)):
            return int(size)
        if size not in self.numbers:
            self.numbers[size] = int(sympy.sympify(size).xreplace(self.sizes))
        return self.numbers[size]

    def by_atom(self, fact: Fact, value: Tensor) -> Tensor:
        """The value with one axis per atom, ghosts included."""
        return value.reshape([self.number(a.size) for a in fact.atoms])

    def grid(self, fact: Fact, k: int) -> Tensor:
        view = [-1 if j == k else 1 for j in range(len(fact.atoms))]
        return torch.arange(self.number(fact.atoms[k].size)).view(view)

    def row(self, fact: Fact, k: int) -> Tensor:
        return self.number(fact.atoms[k].start) + self.grid(fact, k)

    def bound(self, fact: Fact) -> Tensor:
        """The last row that each entry may depend on; -1 where it depends on none."""
        out = torch.full([self.number(a.size) for a in fact.atoms], -1)
        for k in fact.deps:
            out = torch.maximum(out, self.row(fact, k))
        return out

    def closed(self, fact: Fact, expr: sympy.Basic) -> Tensor:
        grids = [self.grid(fact, k) for k in range(len(fact.atoms))]
        if not expr.atoms(AppliedUndef):  # integers have no reciprocals
            grids = [grid.double() for grid in grids]
        symbols: dict[sympy.Basic, Any] = {index(k): grid for k, grid in enumerate(grids)}
        symbols |= {s: int(n) for s, n in self.sizes.items() if s.free_symbols}
        large = {n: sympy.Float(n) for n in expr.atoms(sympy.Integer) if abs(n) > 2**62}
        names = {leaf.func.__name__ for leaf in expr.atoms(AppliedUndef)}
        steps = [(n, s) for n, s in self.analyzed.steps.items() if f"v_{n.name}" in names] if names else []
        leaves = {f"v_{n.name}": self.by_atom(step.fact, self.env[n]) for n, step in steps}
        value = torch.as_tensor(evaluate(expr.xreplace(large), symbols, leaves))
        return value.expand([self.number(a.size) for a in fact.atoms])

    def meaningful(self, fact: Fact) -> Tensor:
        if fact.valid == sympy.true:
            return torch.ones([self.number(a.size) for a in fact.atoms], dtype=torch.bool)
        return self.closed(fact, fact.valid).bool()


def check(analyzed: Analyzed, inputs: Sequence[Tensor], batch: int = BATCH) -> list[Problem]:
    """Everything that is wrong with the facts of a graph, as far as these inputs show it."""
    base = Values(analyzed, inputs, batch, ROWS)
    problems = [Problem(n.name, n.target, text) for n, fact, x in _facts(base) for text in _content(base, fact, x)]
    for given, k in _sequences(analyzed.captured):
        for row in PERTURBED:
            other = list(inputs)
            other[k] = _perturbed(inputs[k], given.seq_axes[0], row)
            problems += _by_row(base, Values(analyzed, other, batch, ROWS), row)
    if batch > 1:
        problems += _by_batch(base)
    short = [_shortened(i, inputs[k]) for i, k in _tensors(analyzed.captured)]
    problems += _by_length(base, Values(analyzed, short, batch, ROWS - 2))
    return list(dict.fromkeys(problems))


def _facts(values: Values) -> Iterator[tuple[fx.Node, Fact, Tensor]]:
    for node, step in values.analyzed.steps.items():
        value = values.env[node]
        for fact, tensor in zip(step.facts, value if isinstance(value, (tuple, list)) else (value,), strict=False):
            yield node, fact, tensor


def _tensors(captured: Captured) -> list[tuple[Any, int]]:
    return [(i, k) for k, i in enumerate(i for i in captured.inputs if i.role is not Role.SYMBOL)]


def _sequences(captured: Captured) -> list[tuple[Any, int]]:
    """The sequence inputs that the graph reads, and their place among the tensors."""
    used = {n.name for n in captured.module.graph.nodes if n.op == "placeholder" and n.users}
    return [(i, k) for i, k in _tensors(captured) if i.role is Role.SEQUENCE and i.name in used]


# -- one set of inputs ----------------------------------------------------------------------------------------------


def _content(values: Values, fact: Fact, tensor: Tensor) -> Iterator[str]:
    """Shape, dtype, closed form, fill, and entries that are repeated."""
    shape = [values.number(s) for s in fact.shape()]
    if shape != list(tensor.shape) or fact.dtype is not tensor.dtype:
        yield f"shape {shape} {fact.dtype} is claimed for {list(tensor.shape)} {tensor.dtype}"
        return
    entries, kept = values.by_atom(fact, tensor), values.meaningful(fact)
    if fact.expr is not None and not _same(values.closed(fact, fact.expr), entries)[kept].all():
        yield f"closed form {fact.expr}"
    if fact.fill is not None:
        outside = ~values.closed(fact, fact.support).bool() & kept
        if not _filled(entries[outside], fact.fill):
            yield f"{fact.fill.value} outside {fact.support}"
    repeated = [k for k, atom in enumerate(fact.atoms) if atom.bcast and atom.kind is not Kind.SEQ]
    for k in repeated if fact.random is None else ():
        if not _same(entries, entries.narrow(k, 0, 1).expand(entries.shape))[kept].all():
            yield f"entries that are alike along atom {k} of {fact}"


def _filled(entries: Tensor, fill: Fill) -> bool:
    """NaN is let pass: 0 / 0 outside a support is the model's own defect in every row."""
    match fill:
        case Fill.ZERO:
            return bool(((entries == 0) | entries.isnan()).all())
        case Fill.NEG_INF:
            return bool(((entries == float("-inf")) | entries.isnan()).all())
        case Fill.NEG:
            return bool(((entries <= VERY_NEGATIVE) | entries.isnan()).all())


def _same(a: Tensor, b: Tensor) -> Tensor:
    if a.is_complex() or b.is_complex():
        return _same(a.real, b.real) & _same(a.imag if a.is_complex() else a.real * 0, b.imag)
    close = CLOSE if torch.float64 in (a.dtype, b.dtype) and a.dtype == b.dtype else ROUNDED
    return torch.isclose(a.double(), b.double(), rtol=close, atol=close, equal_nan=True)


# -- two sets of inputs ---------------------------------------------------------------------------------------------


def _perturbed(tensor: Tensor, axis: int, row: int) -> Tensor:
    out = tensor.clone()
    place = (slice(None),) * axis + (row,)
    if tensor.dtype is torch.bool:
        out[place] = ~out[place]
    elif tensor.is_floating_point():
        out[place] = torch.randn_like(out[place]) * 2 + 0.5
    else:
        out[place] = (out[place] + 1) % 5
    return out


def _by_row(base: Values, other: Values, row: int) -> Iterator[Problem]:
    """Row ``row`` of one input differs: entries bounded by earlier rows must not."""
    for (node, fact, a), (_, _, b) in zip(_facts(base), _facts(other), strict=True):
        if fact.whole is not None or fact.random is not None:
            continue
        kept = base.meaningful(fact) & other.meaningful(fact)
        changed = ~_same(base.by_atom(fact, a), base.by_atom(fact, b))
        if (changed & kept & (base.bound(fact) < row)).any():
            yield Problem(node.name, node.target, f"depends on a later row than {fact} says")


def _by_batch(base: Values) -> Iterator[Problem]:
    """Other contents of the first sequence, and two sequences exchanged."""
    order = [1, 0, *range(2, base.batch)]
    axes = [(k, i.batch_axis) for i, k in _tensors(base.analyzed.captured) if i.batch_axis is not None]
    exchanged, first = list(base.inputs), list(base.inputs)
    for k, axis in axes:
        exchanged[k] = exchanged[k].index_select(axis, torch.tensor(order))
        first[k] = _perturbed(first[k], axis, 0)
    swapped = Values(base.analyzed, exchanged, base.batch, base.rows)
    changed = Values(base.analyzed, first, base.batch, base.rows)
    for (node, fact, a), (_, _, b), (_, _, c) in zip(_facts(base), _facts(swapped), _facts(changed), strict=True):
        if fact.batch is not None or fact.together is not None or fact.random is not None:
            continue
        x, y, z = (base.by_atom(fact, t) for t in (a, b, c))
        kept = base.meaningful(fact)
        mine = [k for k, atom in enumerate(fact.atoms) if atom.kind is Kind.BATCH and base.number(atom.size) > 1]
        if fact.expr is not None:
            continue  # a closed form says exactly where the place in the batch matters
        for k in mine:
            y = y.index_select(k, torch.tensor(order))
        if not _same(x, y)[kept].all():
            yield Problem(node.name, node.target, "depends on the place in the batch")
        others = torch.ones(x.shape, dtype=torch.bool)
        for k in mine:
            others &= base.grid(fact, k) > 0
        if (~_same(x, z) & others & kept).any():
            yield Problem(node.name, node.target, "depends on another sequence of the batch")


def _shortened(given: Any, tensor: Tensor) -> Tensor:
    for axis in given.seq_axes:
        tensor = tensor.narrow(axis, 0, ROWS - 2)
    return tensor


def _by_length(long: Values, short: Values) -> Iterator[Problem]:
    """The same text without its last rows: entries of the rows that are left must not differ."""
    for (node, fact, a), (_, _, b) in zip(_facts(long), _facts(short), strict=True):
        if fact.whole is not None or fact.length is not None or fact.random is not None:
            continue
        x, y = long.by_atom(fact, a), short.by_atom(fact, b)
        kept_x, kept_y = long.meaningful(fact), short.meaningful(fact)
        for k, atom in enumerate(fact.atoms):
            at_x, at_y = _common(atom, long, short)
            x, kept_x = x.index_select(k, at_x), kept_x.index_select(k, at_x)
            y, kept_y = y.index_select(k, at_y), kept_y.index_select(k, at_y)
        if (~_same(x, y) & kept_x & kept_y).any():
            yield Problem(node.name, node.target, f"depends on the number of rows, which {fact} does not say")


def _common(atom: Atom, long: Values, short: Values) -> tuple[Tensor, Tensor]:
    """The entries of an atom that stand for the same row of both texts."""
    (first, size), (other, count) = ((v.number(atom.start), v.number(atom.size)) for v in (long, short))
    if atom.kind is not Kind.SEQ:
        return torch.arange(min(size, count)), torch.arange(min(size, count))
    rows = [r for r in range(other, min(other + count, short.rows)) if first <= r < first + size]
    return torch.tensor(rows, dtype=torch.long) - first, torch.tensor(rows, dtype=torch.long) - other


def kind_of(fact: Fact) -> str:
    """A fact in one word: the first property that was lost, or how many rows an entry stands for."""
    for name, _ in fact.tainted():
        return name
    return {0: "index", 1: "row", 2: "pair"}.get(len(fact.deps), "many")
