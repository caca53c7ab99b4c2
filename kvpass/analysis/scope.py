"""Scope: the atoms of one op's operands under common names while a transfer rule aligns them.

Facts number their atoms from zero. To combine two facts, a scope opens each under fresh *labels*, unifies the labels
that walk together, splits the ones that a view splits, and closes the result as a fact again, together with the
*link* of every operand: for each of its atoms, the atom of the result that it became.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch
from sympy.logic.boolalg import Boolean

from kvpass import errors
from kvpass.analysis.expressions import Value, substitute, tidy
from kvpass.analysis.facts import (
    HALF,
    MASKS,
    NEGATIVE,
    ONE,
    ZERO,
    Atom,
    Cause,
    Expr,
    Fact,
    Fill,
    Kind,
    Prefix,
    Shift,
    index,
)
from kvpass.analysis.laws import Laws

Label = int
Dims = list[list[Label]]
Link = tuple[int | None, ...]


@dataclass
class Operand:
    """A fact opened in a scope. Labels in ``everything`` are read whole, whatever rows of the result are wanted."""

    fact: Fact
    dims: Dims
    ghosts: list[Label]
    everything: set[Label] = field(default_factory=set)

    @property
    def labels(self) -> list[Label]:
        return [label for dim in self.dims for label in dim] + self.ghosts


@dataclass
class Parts:
    """The properties of a result in the making, over labels.

    ``lowered``: an operand has very negative entries, which are ordinary ones of the result if it does not say so.
    """

    deps: set[Label] = field(default_factory=set)
    whole: Cause | None = None
    length: Cause | None = None
    batch: Cause | None = None
    random: Cause | None = None
    context: bool = False
    sequence: bool = False
    together: Cause | None = None
    expr: Value | None = None
    rounded: bool = False
    raw: frozenset[str] = frozenset()
    support: Boolean = sympy.true
    fill: Fill | None = None
    low: float | None = None
    large: bool = False
    lowered: bool = False
    undone: str | None = None
    valid: Boolean = sympy.true
    ahead: frozenset[Prefix] = frozenset()
    shift: Shift = field(default_factory=Shift)


def symbol(label: Label) -> sympy.Symbol:
    return sympy.Symbol(f"_{label}", integer=True, nonnegative=True)


def quotient(a: Expr, b: Expr) -> Expr | None:
    """``a / b`` where it is an integer polynomial, else None."""
    ratio = sympy.cancel(a / b) if (a.free_symbols or b.free_symbols) else a / b
    top, bottom = ratio.as_numer_denom()
    return ratio if bottom == 1 and all(c.is_integer for c in top.as_coefficients_dict().values()) else None


@dataclass(frozen=True)
class Axes:
    """What sizes say: the symbol of the sequence's length, and of the batch's size where it has one.

    ``lead`` entries stand before the first row where an axis holds more than the rows: a prefix of the context. They
    are rows ``-lead .. -1``, which depend on no row. ``laws`` gathers what is known of the leaf functions while a graph
    is swept; ``context`` says which of them are arguments without rows, by the name of the argument. ``flags``
    says the same of arguments of zeros and ones, and ``taken`` gathers the arguments for which it is used. ``bounds``
    gathers how large the entries behind leaf functions may be, ``learnt`` those that weights or buffers enter.
    ``sources`` says what the user calls an argument.
    """

    seq: sympy.Symbol
    batch: Expr
    lead: Expr = ZERO
    laws: Laws = field(default_factory=dict)
    context: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    bounds: dict[str, int] = field(default_factory=dict)
    learnt: set[str] = field(default_factory=set)
    sources: dict[str, str] = field(default_factory=dict)

    def start(self, size: Expr) -> Expr:
        """The row of the first entry of a new axis along the sequence."""
        return -self.lead if sympy.expand(size - self.seq - self.lead) == 0 else ZERO

    def kind(self, size: Expr) -> Kind:
        if size.has(self.seq):
            return Kind.SEQ
        return Kind.BATCH if size == self.batch and self.batch.free_symbols else Kind.FREE

    def atom(self, size: Expr, bcast: bool = False) -> Atom:
        """A new axis."""
        kind = self.kind(size)
        return Atom(kind, size, self.start(size) if kind is Kind.SEQ else ZERO, bcast)


class Scope:
    """Labels of one op. ``node`` names the op in causes."""

    def __init__(self, node: str, axes: Axes) -> None:
        self.node = node
        self.axes = axes
        self.atoms: dict[Label, Atom] = {}
        self.operands: list[Operand] = []
        self.subst: dict[sympy.Basic, sympy.Basic] = {}
        self.batch: Cause | None = None
        self.full: set[Label] = set()  # computed over all rows, narrowed afterwards
        self.split_of: dict[Label, tuple[Label, Label]] = {}
        self.same: dict[Label, Label] = {}

    # -- making labels -------------------------------------------------------------------------------------------

    def new(self, atom: Atom) -> Label:
        label = len(self.atoms)
        self.atoms[label] = atom
        return label

    def open(self, fact: Fact) -> Operand:
        dims = [[self.new(atom) for atom in dim] for dim in fact.dims]
        operand = Operand(fact, dims, [self.new(atom) for atom in fact.ghosts])
        self.operands.append(operand)
        return operand

    def fresh(self, size: Expr, bcast: bool = False) -> list[Label]:
        """Labels of a new axis: none where it has one entry, SEQ where its size speaks of the sequence.

        Entries that are all the same may be a merged axis as well: ``zeros(B * s, ..)``.
        """
        sizes = self._factors(size) if bcast else [size]
        return [self.new(self.axes.atom(part, bcast)) for part in sizes if part != 1]

    def _factors(self, size: Expr) -> list[Expr]:
        """A size as the batch, the sequence, and what is repeated for each row, if it is such a product."""
        seq, batch = self.axes.seq, self.axes.batch
        if batch.free_symbols and not size.has(seq):
            each = quotient(size, batch) if size.has(batch) else None
            return [size] if each is None or each.has(batch) else [batch, each]
        rest = quotient(size, seq) if size.has(seq) else None
        if rest is None or rest.has(seq):
            return [size]
        each = quotient(rest, batch)
        return [rest, seq] if each is None else [batch, seq, each]

    # -- reading operands ----------------------------------------------------------------------------------------

    def lift(self, operand: Operand, value: Value) -> Value:
        """A value over an operand's index variables, over labels."""
        if not value.free_symbols:
            return value
        return value.xreplace({index(k): symbol(label) for k, label in enumerate(operand.labels)})

    def deps(self, operand: Operand) -> set[Label]:
        labels = operand.labels
        return {labels[k] for k in operand.fact.deps}

    def raw(self, operand: Operand) -> frozenset[str]:
        """The arguments of the call whose numbers an operand is made of."""
        return operand.fact.raw | self.named(operand.fact.expr)

    def named(self, value: object) -> frozenset[str]:
        """The numbers of the caller that a value speaks of."""
        symbols = value.free_symbols if isinstance(value, sympy.Basic) else ()
        return frozenset(s.name for s in symbols if s.name in self.axes.bounds)

    def gather(self, operands: Iterable[Operand]) -> Parts:
        """The union of what operands depend on; expressions and supports are the rule's business."""
        parts = Parts()
        for op in operands:
            fact = op.fact
            parts.deps |= self.deps(op)
            parts.whole = parts.whole or fact.whole
            parts.length = parts.length or fact.length
            parts.batch = parts.batch or fact.batch
            parts.random = parts.random or fact.random
            parts.ahead |= fact.ahead
            parts.context = parts.context or fact.context
            parts.sequence = parts.sequence or fact.sequence
            parts.together = parts.together or fact.together
            parts.rounded = parts.rounded or fact.rounded
            parts.raw |= self.raw(op)
            parts.large = parts.large or fact.large
            parts.lowered = parts.lowered or fact.fill is Fill.NEG
            parts.undone = parts.undone or fact.undone
            if fact.valid != sympy.true:
                parts.valid = sympy.And(parts.valid, self.lift(op, fact.valid))
        return parts

    # -- aligning ------------------------------------------------------------------------------------------------

    def split(self, label: Label, inner: Expr) -> tuple[Label, Label]:
        """One free label as ``outer * inner + remainder``."""
        atom = self.atoms[label]
        outer_size = quotient(atom.size, inner)
        assert outer_size is not None
        a = self.new(replace(atom, size=outer_size))
        b = self.new(replace(atom, size=inner))
        self.split_of[label] = (a, b)
        self.subst[symbol(label)] = symbol(a) * inner + symbol(b)
        return a, b

    def size(self, labels: Sequence[Label]) -> Expr:
        total: Expr = ONE
        for label in labels:
            total = total * self.atoms[label].size
        return total

    def refine(self, a: list[Label], b: list[Label]) -> tuple[list[Label], list[Label]]:
        """Two label lists of equal total size, split so that they correspond one to one.

        Raises:
            UnsupportedShape: a sequence or batch atom would have to be split.
        """
        out_a: list[Label] = []
        out_b: list[Label] = []
        a = [x for x in a if self.atoms[x].size != 1]
        b = [x for x in b if self.atoms[x].size != 1]
        while a and b:
            x, y = a.pop(0), b.pop(0)
            sx, sy = self.atoms[x].size, self.atoms[y].size
            if sx != sy:
                x, y = self._cut_to_fit(x, y, a, b)
            out_a.append(x)
            out_b.append(y)
        return out_a, out_b

    def _cut_to_fit(self, x: Label, y: Label, a: list[Label], b: list[Label]) -> tuple[Label, Label]:
        """Split the larger of two leading labels; its tail goes back to its list.

        The *outer* part of a row-major axis comes first, so the larger one is cut at the other's size from the left.
        """
        ax, ay = self.atoms[x], self.atoms[y]
        for big, small, rest, swap in ((ax, ay, a, False), (ay, ax, b, True)):
            inner = quotient(big.size, small.size)
            if inner is not None and inner != 1 and big.kind is Kind.FREE:
                outer, tail = self.split(y if swap else x, inner)
                rest.insert(0, tail)
                return (x, outer) if swap else (outer, y)
        raise errors.UnsupportedShape(detail=f"axes of {ax} and {ay} entries do not correspond")

    def unify(self, a: Label, b: Label, b_varies: bool = True, a_varies: bool = True) -> Label:
        """Make two labels of one size walk together; returns the label of the result."""
        x, y = self.atoms[a], self.atoms[b]
        if x.kind is Kind.FREE and y.kind is not Kind.FREE:
            return self.unify(b, a, a_varies, b_varies)
        keep = a
        if x.kind is not Kind.FREE and y.kind is not Kind.FREE and x.kind is not y.kind:
            raise errors.AmbiguousAxes(detail="the batch axis and the sequence axis meet in one axis")
        if x.kind is Kind.BATCH and y.kind is Kind.FREE and b_varies and x.size != 1:
            self.batch = self.batch or Cause(self.node, "a value differs by the place in the batch", errors.MixesBatch)
        if x.kind is Kind.SEQ and y.kind is Kind.SEQ and x.start != y.start:
            keep = self._shift(a, b)
        elif x.bcast and not y.bcast:
            self.atoms[a] = replace(x, bcast=False)
        other = b if keep == a else a
        self.same[other] = keep
        self.subst[symbol(other)] = symbol(keep)
        return keep

    def _shift(self, a: Label, b: Label) -> Label:
        """SEQ labels with other first rows: the later one bounds both, and the earlier operand is read whole."""
        ahead = (self.atoms[a].start - self.atoms[b].start).is_nonnegative
        if ahead is None and not (self.atoms[b].start - self.atoms[a].start).is_nonnegative:
            raise errors.UnsupportedShape(detail="two slices of the sequence whose order is not known are combined")
        keep = a if ahead else b
        for operand in self.operands:
            operand.everything |= {label for label in operand.labels if label in (a, b)}
        self.full.add(keep)
        return keep

    def broadcast(self, operands: Sequence[Operand]) -> tuple[Dims, list[Label]]:
        """Right-aligned broadcasting: the dims and ghosts of the result."""
        rank = max((len(op.dims) for op in operands), default=0)
        dims: Dims = []
        ghosts = self.merge_ghosts([label for op in operands for label in op.ghosts])
        for k in range(rank):
            present = [(op, op.dims[k - rank + len(op.dims)]) for op in operands if k - rank + len(op.dims) >= 0]
            dims.append(self.broadcast_axis(present, ghosts))
        return dims, ghosts

    def broadcast_axis(self, present: list[tuple[Operand, list[Label]]], ghosts: list[Label]) -> list[Label]:
        """One axis of several operands: its labels in the result. Rows of size one join ``ghosts``, in place."""
        wide = [(op, dim) for op, dim in present if self.size(dim) != 1]
        units = [label for _, dim in present if self.size(dim) == 1 for label in dim]
        if not wide:
            return self.merge_ghosts(units)
        ghosts.extend(label for label in units if self.atoms[label].kind is Kind.SEQ)
        for label in units:
            self.subst.setdefault(symbol(label), ZERO)
        first, current = wide[0]
        owners: list[Operand] = [first]
        for op, dim in wide[1:]:
            current = self.pair(current, dim, owners, op)
            owners.append(op)
        return self.expanded(current)

    def pair(self, a: list[Label], b: list[Label], owners: list[Operand], other: Operand) -> list[Label]:
        """Refine and unify two axes of equal size."""
        left, right = self.refine(self.expanded(a), self.expanded(b))
        return [
            self.unify(x, y, self.varies(other, y), any(self.varies(op, x) for op in owners))
            for x, y in zip(left, right, strict=True)
        ]

    def varies(self, operand: Operand, label: Label) -> bool:
        """False where the operand is known to be the same along a label."""
        if self.atoms[label].bcast:
            return False
        if operand.fact.expr is None:
            return True
        value = self.lift(operand, operand.fact.expr)
        return symbol(label) in value.xreplace(self.subst).free_symbols

    def differ(self, labels: Iterable[Label], why: str = "a value differs by the place in the batch") -> None:
        """Entries along these labels differ in the result, even where the operand repeats one.

        ``why`` is said where a label is the batch.
        """
        for label in labels:
            atom = self.atoms[label]
            if atom.kind is not Kind.SEQ:
                self.atoms[label] = replace(atom, bcast=False)
            if atom.kind is Kind.BATCH and atom.size != 1:
                self.batch = self.batch or Cause(self.node, why, errors.MixesBatch)

    def expanded(self, labels: Sequence[Label]) -> list[Label]:
        """Labels with the split ones replaced by their parts and the unified ones by their representative."""
        out: list[Label] = []
        for label in labels:
            label = self.representative(label)
            out += self.expanded(self.split_of[label]) if label in self.split_of else [label]
        return out

    def representative(self, label: Label) -> Label:
        while label in self.same:
            label = self.same[label]
        return label

    def merge_ghosts(self, labels: Sequence[Label]) -> list[Label]:
        """Size-one labels; SEQ ones of the same row are one."""
        out: list[Label] = []
        for label in labels:
            atom = self.atoms[self.representative(label)]
            twin = next((o for o in out if self.atoms[o].kind is atom.kind and self.atoms[o].start == atom.start), None)
            if twin is None:
                out.append(label)
            elif twin != label:
                self.same[label] = twin
                self.subst[symbol(label)] = symbol(twin)
        return out

    # -- closing -------------------------------------------------------------------------------------------------

    def resolve(self, value: Value) -> Value:
        """Apply all splits and unifications to a value over labels."""
        for _ in range(len(self.subst) + 1):
            if not (value.free_symbols & self.subst.keys()):
                return value
            value = substitute(value, self.subst)
        return value

    def close(
        self, dims: Dims, ghosts: Sequence[Label], dtype: torch.dtype, parts: Parts
    ) -> tuple[Fact, dict[Label, int]]:
        """The fact with these axes, and the flat index that each label became."""
        dims = [self.expanded(dim) for dim in dims]
        used = {label for dim in dims for label in dim}
        tail = [g for g in dict.fromkeys(self.representative(g) for g in ghosts) if g not in used]
        order = [label for dim in dims for label in dim] + tail
        place = {label: k for k, label in enumerate(order)}
        assert len(place) == len(order), f"{self.node}: a label stands in two axes"
        final = {symbol(label): index(k) for label, k in place.items()}
        # x of an atom that left the value: it had one entry
        deps, whole = self._bounded(parts, place)

        def settle(value: Value) -> Value:
            value = self.resolve(value)
            return value if not value.free_symbols else substitute(value, final)

        fact = Fact(
            dims=tuple(tuple(self.atoms[label] for label in dim) for dim in dims),
            ghosts=tuple(self.atoms[label] for label in tail),
            dtype=dtype,
            deps=frozenset(deps),
            whole=whole,
            length=parts.length,
            batch=parts.batch or self.batch,
            random=parts.random,
            context=parts.context,
            sequence=parts.sequence,
            together=parts.together,
            expr=None if parts.expr is None else tidy(settle(parts.expr)),
            rounded=parts.rounded,
            raw=frozenset() if dtype is torch.bool else parts.raw,
            support=settle(parts.support),
            fill=parts.fill,
            low=NEGATIVE if parts.low is None else parts.low,
            large=dtype.is_floating_point and (parts.large or (parts.lowered and parts.fill not in MASKS)),
            undone=parts.undone if parts.fill not in MASKS else None,
            valid=settle(parts.valid),
            ahead=parts.ahead,
            shift=Shift() if dtype in HALF else self._shift_of(parts, place),  # rounded in steps of the length
        )
        return fact, place

    def _shift_of(self, parts: Parts, place: dict[Label, int]) -> Shift:
        def of(labels: frozenset[Label]) -> frozenset[int]:
            return frozenset(place[x] for label in labels for x in self.expanded([label]) if x in place)

        return Shift(of(parts.shift.affine), of(parts.shift.level))

    def _bounded(self, parts: Parts, place: dict[Label, int]) -> tuple[set[int], Cause | None]:
        deps, whole = set(), parts.whole
        for label in parts.deps:
            found = place.get(self.representative(label))
            if found is None:
                whole = whole or Cause(self.node, "a row that is no longer part of the value")
            else:
                deps.add(found)
        return deps, whole

    def link(self, operand: Operand, place: dict[Label, int]) -> Link:
        """For each atom of an operand, the atom of the result it became; None where it is read whole."""
        out: list[int | None] = []
        for label in operand.labels:
            free = self.expanded([label])
            one = free[0] if len(free) == 1 else None
            out.append(None if one is None or label in operand.everything else place.get(one))
        return tuple(out)
