"""The ranges of keys that are derived from a support, against the support itself."""

import pytest
import sympy

from kvpass.ir import B, H, I, J
from kvpass.kernels.text import parse_expression
from kvpass.lowering.bounds import Range, ranges

ROWS = 41
SUPPORTS = {
    "True": 1,
    "j <= i": 1,
    "i - j >= 0": 1,
    "j - i <= 0": 1,
    "(j <= i) & (j > i - 8)": 1,
    "(j <= i) & (i - j < 8)": 1,
    "(j <= i) & Eq(floor(j/5), floor(i/5))": 1,
    "(j <= i) & (floor(j/5) >= floor(i/5) - 1)": 1,
    "Eq(j, i)": 1,
    "2*j <= i": 1,
    "3*j >= i - 9": 1,
    "(j <= i) & (j < 4)": 1,
    "(j < 4) & (j <= i) | (j <= i) & (j > i - 8)": 2,
    "(j <= i) & ((j < 4) | (j > i - 8))": 1,
    "(j <= i) & Eq(Mod(i - j, 3), 0)": 1,
    "(j <= i) & (j >= i - h)": 1,
    "(j <= i) & Ne(pad(b, j), 0)": 1,
    "j + i <= 20": 1,
    "False": 0,
}


def holds(support: sympy.Basic, i: int, j: int) -> bool:
    """Somewhere in the batch and the heads; reads may be anything."""
    value = support.xreplace({I: sympy.Integer(i), J: sympy.Integer(j), H: sympy.Integer(6), B: sympy.Integer(0)})
    value = value.replace(lambda e: isinstance(e, sympy.Ne), lambda e: sympy.true)
    return bool(value)


def end(value: sympy.Expr | None, i: int, default: int) -> int:
    return default if value is None else int(value.xreplace({I: sympy.Integer(i)}))


@pytest.mark.parametrize("source", SUPPORTS)
def test_ranges_hold_the_support(source: str) -> None:
    support = parse_expression(source)
    found = ranges(support)
    assert len(found) == SUPPORTS[source]
    for i in range(ROWS):
        kept = {j for j in range(ROWS) if holds(support, i, j)}
        inside = {j for r in found for j in range(end(r.low, i, 0), min(ROWS, end(r.high, i, ROWS)))}
        assert kept <= inside
        if all(r.exact for r in found):
            assert kept == inside
    for r in found:
        for value in (r.low, r.high):
            ends = [end(value, i, ROWS) for i in range(ROWS)]
            assert ends == sorted(ends)


def test_a_window_is_a_short_range() -> None:
    window = ranges(parse_expression("(j <= i) & (j > i - 8)"))
    assert window == (Range(sympy.Max(0, I - 7), I + 1, True),)


def test_padding_leaves_the_causal_range() -> None:
    padded = ranges(parse_expression("(j <= i) & Ne(pad(b, j), 0)"))
    assert padded == (Range(sympy.Integer(0), I + 1, False),)


def test_sinks_and_a_window_are_two_ranges() -> None:
    first, second = ranges(parse_expression("(j < 4) & (j <= i) | (j <= i) & (j > i - 8)"))
    assert first.high == sympy.Min(4, I + 1)
    assert second.low == sympy.Max(0, I - 7)
