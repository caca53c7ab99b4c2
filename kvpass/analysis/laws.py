"""Laws of running counts: what packed texts, ``cumsum(diff(positions) != 1)``, say about the positions in them.

A count of the rows at which a condition holds is the same at two rows only if the condition holds at no row after the
earlier one, up to the later one. Where the condition is ``f(k) - f(k-1) != c``, that makes ``f`` a straight line
between the two rows: ``f(i) - f(j) == c * (i - j)``. So "same text, and a position no later than mine" is causal,
whatever the caller's positions are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from kvpass.analysis.expressions import Value, branches, simplify
from kvpass.analysis.facts import Expr, Fact, index


@dataclass(frozen=True)
class Law:
    """Between rows of one count, ``moving`` grows by ``step`` a row. Both are over the count's own indices.

    Attributes:
        row: the index along the sequence.
        moving: the value that is a straight line.
        step: its slope.
    """

    row: sympy.Symbol
    moving: Value
    step: Expr


Laws = dict[str, Law]


def of_count(condition: Boolean, row: sympy.Symbol) -> Law | None:
    """The law of counting the rows at which ``condition`` holds, if it is of the form above."""
    for term in sympy.Or.make_args(simplify(condition.xreplace({row: row + 1}))):
        if not isinstance(term, sympy.Ne):
            continue
        gap = sympy.expand(term.lhs - term.rhs)
        for here in gap.atoms(AppliedUndef):
            before = here.xreplace({row: row - 1})
            for sign in (1, -1):
                rest = sympy.expand(gap - sign * (here - before))
                if rest.is_Integer:
                    return Law(row, before, -sign * rest)
    return None


def apply(value: Boolean, laws: Laws) -> Boolean:
    """An equivalent condition in which the laws of the counts that it compares are used."""
    if not laws or not isinstance(value, sympy.And):
        return value
    for term in value.args:
        for mapping in _consequences(term, laws):
            others = (simplify(other.xreplace(mapping)) for other in value.args if other != term)
            value = sympy.And(term, *others)
    return value


def _consequences(term: Boolean, laws: Laws) -> Iterator[dict[Value, Value]]:
    if not isinstance(term, sympy.Eq):
        return
    counts = sympy.Add.make_args(sympy.expand(term.lhs - term.rhs))
    if len(counts) != 2 or sympy.expand(counts[0] + counts[1]) == 0:
        return
    a, b = (c if isinstance(c, AppliedUndef) else -c for c in counts)
    if not (isinstance(a, AppliedUndef) and isinstance(b, AppliedUndef)) or sympy.expand(a - b) not in (
        term.lhs - term.rhs,
        term.rhs - term.lhs,
    ):
        return
    law = laws.get(a.func.__name__)
    if law is None or a.func != b.func:
        return
    at_a, at_b = ({index(k): place for k, place in enumerate(x.args)} for x in (a, b))
    moved = {s: (at_a[s], at_b[s]) for s in at_a if at_a[s] != at_b[s]}
    if set(moved) == {law.row}:
        there, here = moved[law.row]
        yield {law.moving.xreplace(at_b): law.moving.xreplace(at_a) - law.step * (there - here)}


def learn(laws: Laws, name: str, counted: Fact, axis: int) -> None:
    """Remember the law of the leaf ``name``: the running sum of a closed form along one axis."""
    atoms = counted.flat(axis)
    if len(atoms) != 1 or counted.expr is None:
        return
    steps = branches(counted.expr)
    if not all(value.is_Integer and value.is_nonnegative for value, _ in steps):
        return
    law = of_count(sympy.Or(*(held for value, held in steps if value != 0)), index(atoms[0]))
    if law is not None:
        laws[name] = law
