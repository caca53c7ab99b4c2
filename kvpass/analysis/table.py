"""The table of transfer rules, and what a rule gets to see.

A rule is one small function per ATen op (or per family that means the same): it aligns the operands' axes in the
scope and says what the result depends on. Rules are registered by decorator, here and nowhere else:

    @rule(aten.softmax.int)
    def softmax(op: Op) -> Out: ...

An op without a rule is refused by name. To add one, see ARCHITECTURE.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import fx

from kvpass import errors
from kvpass.analysis.expressions import (
    Value,
    branches,
    compare,
    constant,
    implies,
    is_boolean,
    minimal,
    simplify,
    substitute,
)
from kvpass.analysis.facts import NEGATIVE, PASSED, ZERO, Cause, Expr, Fill, Kind, Prefix
from kvpass.analysis.scope import Dims, Label, Operand, Parts, Scope, symbol


@dataclass
class Out:
    """A rule's result: axes, ghosts and properties over the scope's labels.

    ``detached`` says that the operands lend their shape only; their entries are not read.
    """

    dims: Dims
    parts: Parts
    ghosts: list[Label] = field(default_factory=list)
    detached: bool = False


@dataclass
class Op:
    """One call in the graph as a rule sees it: tensors are operands, symbolic numbers are sympy expressions."""

    node: fx.Node
    scope: Scope
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[tuple[Expr, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def shape(self) -> tuple[Expr, ...]:
        return self.shapes[0]

    def arg(self, k: int, name: str, default: Any = None) -> Any:
        """Positional or keyword argument, by the op's schema."""
        return self.args[k] if k < len(self.args) else self.kwargs.get(name, default)

    @property
    def operands(self) -> list[Operand]:
        return self.scope.operands

    def cause(self, why: str, error: type[errors.Refusal] = errors.DependsOnFuture) -> Cause:
        return Cause(self.node.name, why, error)

    def gather(self, numbers: bool = True) -> Parts:
        """What the operands depend on; ``numbers=False`` where symbolic arguments are only sizes."""
        parts = self.scope.gather(self.operands)
        for number in self.scalars() if numbers else ():
            parts.raw |= self.scope.named(number)
            if isinstance(number, sympy.Basic) and number.has(self.scope.axes.seq):
                parts.length = parts.length or self.cause(
                    f"{name_of(self.node)} uses the number of rows, {number}, as a number", errors.DependsOnLength
                )
            self.counts_texts(parts, number)
        return parts

    def counts_texts(self, parts: Parts, number: Any) -> None:
        """Note in ``parts`` that a result depends on the number of texts, where a number that the op is given does."""
        batch = self.scope.axes.batch
        if isinstance(number, sympy.Basic) and batch.free_symbols and number.has(batch):
            why = f"{name_of(self.node)} uses the size of the batch as a number"
            parts.batch = parts.batch or self.cause(why, errors.MixesBatch)

    def raw(self, *operands: Operand, numbers: bool = True) -> frozenset[str]:
        """The arguments of the call whose numbers these operands are made of, and the op's own ``numbers``."""
        given = map(self.scope.named, self.scalars() if numbers else ())
        return frozenset().union(*given, *map(self.scope.raw, operands))

    def reaches(self, operand: Operand, low: float) -> bool:
        """True of an operand whose ordinary entries may be as large as what is very negative, at most ``low``: known to
        be, or made of numbers of the call. Arguments of zeros and ones do not; they are taken for that from here on.
        """
        axes, names = self.scope.axes, self.raw(operand)
        if operand.fact.large or low <= -PASSED:
            return operand.fact.large
        if names and names <= set(axes.flags.values()):
            axes.taken.update(names)
            return False
        return bool(names)

    def undo(self, parts: Parts, operand: Operand) -> None:
        """Note in ``parts`` that a mask of finite numbers counts for nothing beside an operand."""
        sources = self.scope.axes.sources
        names = ", ".join(sorted(sources.get(name, name) for name in self.raw(operand)))
        of = f"numbers of any size ({names})" if names and not operand.fact.large else "numbers as large"
        parts.undone = f"a mask of finite numbers, where there are {of}, hides nothing: one of -inf would"

    def names_large(self) -> bool:
        """True where a number that the op is given makes ordinary ones as large as what masks are filled with."""
        numbers = (n for n in self.scalars() if isinstance(n, (int, float, sympy.Number)))
        return any(NEGATIVE >= -abs(n) > -math.inf for n in numbers)

    def counts_rows(self) -> bool:
        """True where the number of rows is one of the numbers that the op is given."""
        seq = self.scope.axes.seq
        return any(isinstance(n, sympy.Basic) and n.has(seq) for n in self.scalars())

    def scalars(self) -> Iterator[Any]:
        """Non-tensor arguments, flat."""
        for value in (*self.args, *self.kwargs.values()):
            yield from value if isinstance(value, (list, tuple)) else (value,)

    def known(self, operand: Operand) -> tuple[Boolean, Fill] | None:
        """``(support, fill)`` of an operand over labels, from its fact or from its closed form."""
        fact = operand.fact
        if fact.expr is not None:  # says everything, where it is there
            return support_of(self.scope.lift(operand, fact.expr))
        return None if fact.fill is None else (self.scope.lift(operand, fact.support), fact.fill)


OF_THE_ROW_BELOW = "reads what a shift by a view puts above the diagonal, which is of the row below"

Rule = Callable[[Op], "Out | list[Out]"]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a transfer rule for these overloads."""

    def register(function: Rule) -> Rule:
        for target in targets:
            assert target not in RULES, f"two rules for {target}"
            RULES[target] = function
        return function

    return register


def name_of(node: fx.Node) -> str:
    """``aten.softmax.int`` as the user would look it up."""
    return str(node.target)


def support_of(value: Value) -> tuple[Boolean, Fill] | None:
    """Where a closed form differs from a fill, the strongest fill first: -inf, very negative, zero."""
    if is_boolean(value):
        return value, Fill.ZERO
    parts = branches(value)
    for fill in (Fill.NEG_INF, Fill.NEG, Fill.ZERO):
        outside = [cond for val, cond in parts if val.is_number and Fill.of(val) is fill]
        if outside:
            kept = simplify(sympy.Not(sympy.Or(*outside)))
            return (kept if len(outside) == 1 else minimal(kept)), fill
    return None


def extremes(value: Value) -> list[Value]:
    """The numbers in a closed form that are as large as what masks are filled with, of either sign."""
    numbers = () if is_boolean(value) else (val for val, _ in branches(value) if val.is_number)
    return [val for val in numbers if abs(val) >= -NEGATIVE]


def lowest(value: Value) -> float:
    """What the very negative branches of a closed form are at most."""
    values = [val for val, _ in branches(value) if val.is_number]
    return max((float(val) for val in values if Fill.of(val) is Fill.NEG), default=NEGATIVE)


def expression(operand: Any, scope: Scope) -> Value | None:
    """An argument as a sympy value over labels: an operand's closed form, or a number."""
    if isinstance(operand, Operand):
        return None if operand.fact.expr is None else scope.lift(operand, operand.fact.expr)
    return constant(operand)


def row_labels(scope: Scope, labels: list[Label]) -> list[Label]:
    return [label for label in labels if scope.atoms[label].kind is Kind.SEQ]


def row_of(scope: Scope, label: Label) -> Expr:
    return scope.atoms[label].start + (symbol(label) if scope.atoms[label].size != 1 else ZERO)


def bounding_row(op: Op, j: Label, kept: list[Label], support: Boolean) -> Label | None:
    """The kept row that is proved to be no earlier than row ``j``, or than the end of a prefix; see `bound`."""
    return bound(op, j, kept, support)[0]


def bound(op: Op, j: Label, kept: list[Label], support: Boolean) -> tuple[Label | None, frozenset[Prefix]]:
    """The kept row that is proved to be no earlier than row ``j`` wherever ``support`` holds.

    This is the causality proof: ``support and row_j > row_i`` is contradictory, which `contradicts` decides after
    substituting ``row_j = row_i + 1 + d`` with ``d >= 0``. Where it is not, it may be so outside a prefix, whose
    length the caller says: then that is the second result.
    """
    scope = op.scope
    support = scope.resolve(support)
    beyond = sympy.Symbol("d", integer=True, nonnegative=True)
    prefixes = _prefixes(op, j, support)
    for i in row_labels(scope, kept):
        row = row_of(scope, i) + 1 + beyond
        later = {symbol(j): row - scope.atoms[j].start}
        # What is before row 0 reads no row.
        rest = sympy.And(substitute(support, later), compare("ge", row, ZERO))
        if implies(rest, sympy.false):
            return i, frozenset()
        for inside, prefix in prefixes.items():
            if implies(rest, substitute(inside, later)):
                return i, frozenset({prefix})
    return None, frozenset()


def _prefixes(op: Op, j: Label, support: Boolean) -> dict[Boolean, Prefix]:
    """Conditions in a support that say ``row_j < n`` of a number ``n`` that the caller gives for each sequence."""
    scope, out = op.scope, {}
    for term in support.atoms(sympy.LessThan):
        (leaf, *others) = term.atoms(AppliedUndef) or [None]
        name = None if leaf is None or others else scope.axes.context.get(leaf.func.__name__)
        offset = sympy.expand(term.rhs - term.lhs + symbol(j) - (leaf or ZERO)) + 1 + scope.atoms[j].start
        if name is not None and offset.is_Integer and all(_own_sequence(scope, place) for place in leaf.args):
            out[term] = Prefix(name, int(offset))
    return out


def _own_sequence(scope: Scope, place: Value) -> bool:
    """True of the index along the batch."""
    return any(place == symbol(label) and atom.kind is Kind.BATCH for label, atom in scope.atoms.items())


def reduce_over(op: Op, parts: Parts, gone: list[Label], kept: list[Label], ignores: tuple[Fill, ...]) -> None:
    """Account in ``parts`` for combining all entries along the labels ``gone``.

    ``ignores`` lists the fills that the combination cannot see (zero for a sum, minus infinity for a maximum). A row
    axis is harmless where the support bounds it by a kept row; otherwise the result depends on every row and on their
    number.
    """
    support = parts.support if parts.fill in ignores else sympy.true
    for j in gone:
        atom = op.scope.atoms[j]
        if atom.kind is Kind.BATCH and atom.size != 1:
            parts.batch = parts.batch or op.cause(
                f"{name_of(op.node)} combines the sequences of a batch", errors.MixesBatch
            )
        if atom.kind is not Kind.SEQ:
            continue
        row, ahead = bound(op, j, kept, support)
        parts.ahead |= ahead
        _forget_row(op, parts, j, row, support)
    parts.support, parts.fill = _without(op, parts, gone)
    parts.undone = None


def _forget_row(op: Op, parts: Parts, j: Label, row: Label | None, support: Boolean) -> None:
    used = {label for label in parts.deps if op.scope.representative(label) == j}
    parts.deps -= used
    atom = op.scope.atoms[j]
    before = (atom.start + atom.size).is_nonpositive  # the first row: what stands there depends on none
    if row is None and not before:
        why = f"{name_of(op.node)} combines all rows of the sequence"
        if support != sympy.true:
            why += f"; the rows it keeps, {pretty(op.scope, support)}, are not all at or before its own"
        elif parts.undone is not None:
            why += f"; {parts.undone}"
        if used:
            parts.whole = parts.whole or op.cause(why)
        parts.length = parts.length or op.cause(why, errors.DependsOnLength)
    elif row is not None and used and not before:
        parts.deps.add(row)
    reads_rows(op, parts, [j], support)


def reads_rows(op: Op, parts: Parts, labels: Iterable[Label], support: Boolean = sympy.true) -> None:
    """Rows are read, where ``support`` holds, by other rows: all that are read must mean something.

    Raises:
        EmptyRow: some may not, and whatever is made of them is not what the model makes, the last row included.
        DependsOnFuture: some are none of that row's (`only_where`).
    """
    scope = op.scope
    terms = sympy.And.make_args(scope.resolve(parts.valid))
    rows = {symbol(label) for label in labels}
    mine = [term for term in terms if rows & term.free_symbols]
    if mine and not implies(scope.resolve(support), sympy.And(*mine)):
        if parts.whole is not None:  # which comes first, and says more
            raise parts.whole.refusal()
        if any(not term.atoms(AppliedUndef) for term in mine):
            raise errors.DependsOnFuture(detail=f"{name_of(op.node)} {OF_THE_ROW_BELOW}")
        raise errors.EmptyRow(detail=f"{name_of(op.node)} reads rows whose own mask may have kept no key")
    parts.valid = sympy.And(*(term for term in terms if term not in mine))


def _without(op: Op, parts: Parts, gone: list[Label]) -> tuple[Boolean, Fill | None]:
    support = op.scope.resolve(parts.support)
    if support.free_symbols & {symbol(j) for j in gone}:
        return sympy.true, None
    return support, parts.fill


def keeps_a_key(op: Op, parts: Parts, j: Label, i: Label | None, support: Boolean, fill: Fill | None) -> None:
    """With a finite fill a row that keeps no key turns into a mean over all keys: require row i to keep its own, or all
    to keep the first one.

    Where only the caller's data can empty the row (padding), such rows are marked meaningless instead; what weights or
    buffers have a part in is no padding.
    """
    if fill is not Fill.NEG or i is None:
        return
    scope = op.scope
    if substitute(scope.resolve(support), {symbol(j): ZERO}) == sympy.true:  # the first key is seen by all
        return
    own = row_of(scope, i) - scope.atoms[j].start
    diagonal = sympy.And(substitute(scope.resolve(support), {symbol(j): own}), compare("ge", own, ZERO))
    for term in sympy.And.make_args(simplify(diagonal)):
        if term == sympy.true:
            continue
        leaves = term.atoms(AppliedUndef)
        if leaves and not any(leaf.func.__name__ in scope.axes.learnt for leaf in leaves):
            parts.valid = sympy.And(parts.valid, term)
        else:
            when = "" if term == sympy.false else f" ({pretty(scope, sympy.Not(term))})"
            why = f"{name_of(op.node)} makes a mean over all rows of a row that keeps no key, not even its own{when}"
            parts.whole = parts.whole or op.cause(why, errors.EmptyRow)


def pretty(scope: Scope, value: Value) -> str:
    """A predicate over labels with ``j`` and ``i`` for the last and the last but one row symbol, ``b`` and ``h``."""
    labels = sorted(int(s.name[1:]) for s in value.free_symbols if s.name.startswith("_"))
    rows, names = [label for label in labels if scope.atoms[label].kind is Kind.SEQ], {}
    for label in labels:
        names[label] = "b" if scope.atoms[label].kind is Kind.BATCH else "h"
    names |= dict(zip(reversed(rows), ("j", "i"), strict=False))
    return str(
        value.xreplace({symbol(old): sympy.Symbol(new, integer=True, nonnegative=True) for old, new in names.items()})
    )
