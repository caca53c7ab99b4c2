"""Closed forms are rewritten into shorter ones that say the same: looked at for every value of what they speak of."""

import itertools

import pytest
import sympy
from sympy.logic.boolalg import Boolean

from kvpass.analysis.expressions import chosen, implies, minimal, simplify, tidy

ROW, KEY = sympy.symbols("x0 x1", integer=True, nonnegative=True)
FLAG = sympy.Function("flag", integer=True)(KEY)
LATER, EARLIER = sympy.Le(ROW - KEY, -1), sympy.Le(KEY - ROW, 0)
HIDDEN, SHOWN = sympy.Eq(FLAG, 0), sympy.Ne(FLAG, 0)


def values(form: sympy.Basic) -> list[sympy.Basic]:
    places = itertools.product(range(4), range(4), range(-1, 3))
    return [form.xreplace({FLAG: sympy.Integer(f)}).subs({ROW: i, KEY: j}) for i, j, f in places]


@pytest.mark.parametrize(
    ("condition", "short"),
    [
        (sympy.Not(sympy.Or(sympy.And(SHOWN, LATER), sympy.And(HIDDEN, EARLIER), sympy.And(HIDDEN, LATER))), 2),
        (sympy.Or(sympy.And(SHOWN, EARLIER), sympy.And(SHOWN, LATER)), 1),
        (sympy.And(sympy.Or(HIDDEN, LATER), sympy.Or(SHOWN, LATER)), 1),
        (sympy.Not(sympy.And(sympy.Or(HIDDEN, LATER), EARLIER)), 2),
    ],
)
def test_conditions(condition: Boolean, short: int) -> None:
    for found in (minimal(condition), simplify(condition)):
        assert values(found) == values(condition)
    assert len(minimal(condition).atoms(sympy.core.relational.Relational)) == short


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("shift", range(-4, 5))
@pytest.mark.parametrize("of", ["query", "key", "both"])
def test_bounds_on_blocks(size: int, shift: int, of: str) -> None:
    """What is proved of a window by blocks holds for every pair of rows, and a window of earlier rows is proved."""
    query, key = (
        size * sympy.floor(row / size) if of in (name, "both") else row for row, name in ((ROW, "query"), (KEY, "key"))
    )
    seen = sympy.Le(key, query + shift)
    later = [(i, j) for i in range(12) for j in range(i + 1, 16) if seen.subs({ROW: i, KEY: j}) == sympy.true]
    ahead = sympy.Symbol("d", integer=True, nonnegative=True)
    proved = implies(seen.xreplace({KEY: ROW + 1 + ahead}), sympy.false)
    assert not (proved and later)
    assert proved or later or of != "query"


def test_a_value_under_its_own_condition() -> None:
    form = sympy.Piecewise((sympy.Integer(-10_000), sympy.Ne(FLAG, 1)), (1 - FLAG, True))
    assert values(tidy(form)) == values(form)
    assert tidy(form).args[-1][0] == 0


def test_choices_cover_everything_once() -> None:
    parts = list(chosen((1 - FLAG) * -10_000, [FLAG]))
    assert [value for value, _ in parts] == [-10_000, 0]
    assert values(sympy.Or(*(when for _, when in parts))) == [sympy.true] * 64
    assert values(sympy.And(*(when for _, when in parts))) == [sympy.false] * 64
