"""Which keys a block of rows can see, derived from the support.

Each disjunct of the support becomes a range of ``j`` whose ends are nondecreasing functions of the row ``i``: for rows
``i0 .. i1`` the keys that can matter are ``low(i0) .. high(i1)``, and those that all of these rows see are
``low(i1) .. high(i0)``, where every conjunct became an end. A generator visits the first and masks only outside the
second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import sympy

from kvpass.ir import I, J
from kvpass.kernels.walk import FloorDiv

_MOST_RANGES = 4


@dataclass(frozen=True)
class Range:
    """Keys ``low(i) <= j < high(i)``.

    Attributes:
        low, high: over ``i``; nondecreasing. ``high`` is None where only the number of keys bounds it.
        exact: the range is the disjunct; else the disjunct must be evaluated at each key of it.
    """

    low: sympy.Expr
    high: sympy.Expr | None
    exact: bool


def ranges(support: sympy.Basic) -> tuple[Range, ...]:
    """Ranges, in ascending order of ``low``, whose union holds the support. None at all where it is false.

    Ranges may overlap: visit each from where the one before ended.
    """
    if support == sympy.false:
        return ()
    disjuncts = sympy.Or.make_args(support)
    if not any(d.has(sympy.Or) for d in disjuncts):
        found = sorted((_range(d) for d in disjuncts), key=lambda r: (r.low != 0, sympy.default_sort_key(r.low)))
        if len(found) <= _MOST_RANGES and all(_before(a.low, b.low) for a, b in pairwise(found)):
            return tuple(found)
    bounded = [_range(d) for d in _conjunctions(support)]
    low = sympy.Min(*(r.low for r in bounded))
    highs = [r.high for r in bounded]
    return (Range(low, None if None in highs else sympy.Max(*highs), False),)


def _conjunctions(support: sympy.Basic) -> Iterator[sympy.Basic]:
    """What each way to be true needs, at the least: parts of an inner ``Or`` are left out."""
    for disjunct in sympy.Or.make_args(support):
        yield sympy.And(*(term for term in sympy.And.make_args(disjunct) if not isinstance(term, sympy.Or)))


def _before(a: sympy.Expr, b: sympy.Expr) -> bool:
    return bool(a == 0 or sympy.expand(b - a).is_nonnegative)


def _range(conjunction: sympy.Basic) -> Range:
    lows: list[sympy.Expr] = [sympy.Integer(0)]
    highs: list[sympy.Expr] = []
    exact = True
    for term in sympy.And.make_args(conjunction):
        ends = _ends(term)
        if term == sympy.true:
            continue
        exact = exact and ends is not None
        low, high = ends or (None, None)
        lows += [] if low is None else [low]
        highs += [] if high is None else [high]
    return Range(sympy.Max(*lows), sympy.Min(*highs) if highs else None, exact)


_Ends = tuple[sympy.Expr | None, sympy.Expr | None]


def _ends(term: sympy.Basic) -> _Ends | None:
    """``(low, high)`` with ``low <= j < high`` exactly where a comparison holds; None where that is not known."""
    if not isinstance(term, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq)):
        return None
    difference = sympy.expand(term.lhs - term.rhs)
    for of_j, unit in _carriers(difference):
        factor = difference.coeff(of_j)
        rest = sympy.expand(difference - factor * of_j)
        if not factor.is_Integer or factor == 0 or rest.has(J):
            continue
        ends = _solved(term, factor, rest, unit)
        if ends is not None and all(end is None or _nondecreasing(end) for end in ends):
            return ends
    return None


def _carriers(difference: sympy.Expr) -> Iterator[tuple[sympy.Expr, int]]:
    """``j`` or ``floor(j / n)``, and how many keys share one value of it."""
    yield J, 1
    for part in difference.atoms(sympy.floor):
        size = J / part.args[0]
        if size.is_Integer:
            yield part, int(size)


def _solved(term: sympy.Basic, factor: sympy.Integer, rest: sympy.Expr, unit: int) -> _Ends | None:
    """The ends of ``factor * floor(j / unit) + rest <op> 0``."""
    strict = isinstance(term, (sympy.Lt, sympy.Gt))
    if isinstance(term, sympy.Eq):
        if abs(factor) != 1:
            return None
        value = -rest / factor
        return unit * value, unit * (value + 1)
    above = isinstance(term, (sympy.Ge, sympy.Gt))
    if factor < 0:
        factor, rest, above = -factor, -rest, not above
    # factor * x <= -rest, or factor * x >= -rest, of whole numbers
    if above:
        least = sympy.floor((-rest + (factor if strict else factor - 1)) / factor)
        return unit * least, None
    most = sympy.floor((-rest - (1 if strict else 0)) / factor)
    return None, unit * (most + 1)


def _nondecreasing(end: sympy.Expr) -> bool:
    if end.is_number or end == I:
        return True
    if end.is_Add or isinstance(end, (sympy.floor, sympy.Max, sympy.Min, FloorDiv)):
        return all(_nondecreasing(arg) for arg in end.args)
    if end.is_Mul:
        factor, rest = end.as_coeff_Mul()
        return bool(factor > 0) and _nondecreasing(rest)
    return False
