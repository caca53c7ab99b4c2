"""Facts: what one value of the graph is known to be.

A value's axes are products of *atoms*. ``view(B*s, H*D)`` has two axes and four atoms, so merging and splitting axes
loses nothing. An atom of kind ``SEQ`` carries the position of its first entry: entry ``k`` stands at row
``start + k``. An atom that was selected away (``x[:, -1]``) stays in the fact as a *ghost*: it is in no axis, but the
value still belongs to a row.

Dependence is a set of SEQ atoms. An entry depends on the inputs at rows up to the largest of their coordinates; the
empty set means that it depends on no row at all. What cannot be bounded this way is a `Cause`: the first node after
which the bound was lost, and why.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean

from kvpass import errors

Expr: TypeAlias = sympy.Expr
ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


class Kind(enum.Enum):
    """What moving along an atom means."""

    FREE = "free"
    BATCH = "batch"
    SEQ = "seq"


@dataclass(frozen=True, slots=True)
class Atom:
    """One factor of an axis: ``size`` entries, the first at row ``start`` where the kind is SEQ.

    ``bcast`` says that every entry is the same (made by ``expand`` or ``repeat``): repeated heads are seen by it.
    """

    kind: Kind
    size: Expr
    start: Expr = ZERO
    bcast: bool = False

    @property
    def grows(self) -> bool:
        """False of a number of entries that a longer sequence leaves as it is, as of the last ``k`` rows."""
        return not self.size.is_number and bool(self.size.free_symbols & (self.start + self.size).free_symbols)

    def __str__(self) -> str:
        if self.kind is Kind.SEQ:
            return f"rows[{self.start}:{self.start + self.size}]" if self.start != 0 else f"rows[{self.size}]"
        return f"{'batch' if self.kind is Kind.BATCH else ''}{'~' if self.bcast else ''}{self.size}"


NEGATIVE = -1e4
PASSED = 1e30  # numbers that a caller passes are smaller than the lowest ones of float32 and bfloat16


class Fill(enum.Enum):
    """What entries outside a support are known to be."""

    ZERO = "0"
    NEG_INF = "-inf"
    NEG = "very negative"  # finite, at most -1e4: exp() of it beside any kept entry is exactly zero

    @staticmethod
    def of(value: object) -> Fill | None:
        """The class of a constant, or None: ``0 -> ZERO``, ``-inf -> NEG_INF``, ``<= -1e4 -> NEG``."""
        number = float(value)  # type: ignore[arg-type]
        if number == 0:
            return Fill.ZERO
        if number == float("-inf"):
            return Fill.NEG_INF
        return Fill.NEG if number <= NEGATIVE else None


@dataclass(frozen=True, slots=True)
class Cause:
    """The node at which a property was lost, how, and the refusal that names it."""

    node: str
    why: str
    error: type[errors.Refusal] = errors.DependsOnFuture

    def refusal(self) -> errors.Refusal:
        """The refusal that names it."""
        return self.error(node=self.node, detail=self.why)


def index(k: int) -> sympy.Symbol:
    """The index variable of flat atom ``k``."""
    return sympy.Symbol(f"x{k}", integer=True, nonnegative=True)


def leaf_name(node: str) -> str:
    """The function that stands for the entries of a node without a closed form."""
    return f"v_{node}"


HALF = (torch.float16, torch.bfloat16)
MASKS = (Fill.NEG_INF, Fill.NEG)


@dataclass(frozen=True, slots=True, order=True)
class Prefix:
    """The rows of a sequence below ``input + offset``; the input has a number for each sequence, or one for all."""

    input: str
    offset: int


@dataclass(frozen=True, slots=True)
class Shift:
    """Along which atoms (or labels) a value is affine, or level; see `kvpass.analysis.shifts`."""

    affine: frozenset[int] = frozenset()
    level: frozenset[int] = frozenset()

    def renamed(self, old: int, new: int) -> Shift:
        affine, level = (frozenset(new if k == old else k for k in kept) for kept in (self.affine, self.level))
        return Shift(affine, level)


@dataclass(frozen=True)
class Fact:
    """What is known of one tensor.

    Attributes:
        dims: the atoms of each axis, outermost first; an axis of size one may have none.
        ghosts: atoms of size one that are in no axis any more.
        deps: flat indices of the SEQ atoms that bound the rows it depends on.
        whole, length, batch, random: why it depends on rows beyond ``deps``, on the number of rows, on other
            sequences of the batch (or on its own place among them), on chance; None where it does not.
        shift: how the length, or the index, changes the entries along an axis.
        ahead: rows that an entry depends on as well, whatever its own row: the first ones of its sequence.
        context, sequence: it depends on an input of the context, on one that has the sequence axis.
        together: why it depends on the contexts of other sequences of the batch, or on its own place among them: such
            a row is known by the contexts of the whole batch.
        expr: closed form over ``index(k)`` and over the leaf functions of bool and integer values.
        raw: arguments whose numbers, which may be of any size, its entries are made of: moved, combined entry by entry,
            or summed. What a projection makes of features is a score, and of ordinary size.
        rounded: its entries are the closed form but for rounding: nothing can be told of what they decide.
        support, fill: outside ``support`` an entry is ``fill``.
        low: a very negative entry is at most this.
        large: other entries may be of that size as well, of either sign: they are made of such, or of large numbers.
        undone: why very negative entries that it is made of count for nothing.
        valid: entries outside it are meaningless in any implementation (fully masked rows of padding).
    """

    dims: tuple[tuple[Atom, ...], ...]
    dtype: torch.dtype
    ghosts: tuple[Atom, ...] = ()
    deps: frozenset[int] = frozenset()
    whole: Cause | None = None
    length: Cause | None = None
    batch: Cause | None = None
    random: Cause | None = None
    context: bool = False
    sequence: bool = False
    together: Cause | None = None
    expr: sympy.Basic | None = None
    rounded: bool = False
    raw: frozenset[str] = frozenset()
    support: Boolean = field(default=sympy.true)
    fill: Fill | None = None
    low: float = NEGATIVE
    large: bool = False
    undone: str | None = None
    valid: Boolean = field(default=sympy.true)
    ahead: frozenset[Prefix] = frozenset()
    shift: Shift = Shift()

    @cached_property
    def atoms(self) -> tuple[Atom, ...]:
        """All atoms, flat: axes first, then ghosts."""
        return tuple(atom for dim in self.dims for atom in dim) + self.ghosts

    @cached_property
    def real(self) -> int:
        """How many atoms stand in axes."""
        return sum(len(dim) for dim in self.dims)

    def flat(self, dim: int) -> range:
        """Flat indices of the atoms of one axis."""
        dim %= max(len(self.dims), 1)
        start = sum(len(d) for d in self.dims[:dim])
        return range(start, start + len(self.dims[dim]))

    def shape(self) -> tuple[Expr, ...]:
        return tuple(product(dim) for dim in self.dims)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Flat indices of the SEQ atoms that stand in axes."""
        return tuple(k for k, atom in enumerate(self.atoms[: self.real]) if atom.kind is Kind.SEQ)

    @cached_property
    def wide(self) -> tuple[int, ...]:
        """The rows among them whose number of entries grows with the sequence."""
        return tuple(k for k in self.rows if self.atoms[k].grows)

    def index_only(self) -> bool:
        """True where no input row matters: the value is a function of indices, weights and context."""
        return not self.deps and not self.ahead and self.whole is None

    def of_context(self) -> bool:
        """True of a value of the context: no input of the sequence matters, and one of the context does."""
        return self.context and not self.sequence

    def position(self, k: int) -> Expr:
        """The row at which entry ``index(k)`` of SEQ atom ``k`` stands."""
        return self.atoms[k].start + (index(k) if self.atoms[k].size != 1 else ZERO)

    def tainted(self) -> Iterator[tuple[str, Cause]]:
        """The lost properties, by name."""
        for name in ("random", "batch", "whole", "length"):
            cause = getattr(self, name)
            if cause is not None:
                yield name, cause

    def with_expr(self, expr: sympy.Basic | None) -> Fact:
        return replace(self, expr=expr)

    def __str__(self) -> str:
        axes = ", ".join("·".join(map(str, dim)) or "1" for dim in self.dims)
        text = f"[{axes}]"
        if self.expr is not None:
            text += f" = {self.expr}"
        if self.whole is not None:
            text += f" whole({self.whole.node})"
        elif self.deps:
            text += " row" if len(self.deps) == 1 else " pair"
        if self.fill is not None:
            text += f" {self.fill.value} outside {self.support}"
        if self.valid != sympy.true:
            text += f" where {self.valid}"
        for name, cause in self.tainted():
            if name != "whole":
                text += f" {name}({cause.node})"
        return text


def product(atoms: tuple[Atom, ...]) -> Expr:
    size: Expr = ONE
    for atom in atoms:
        size = size * atom.size
    return size
