"""Closed forms are exact, the numbers that a model computes are not: where do the two agree?

A sum of whole numbers is exact in float32 up to 2**24, a multiple of 0.03 is not. What is decided by such a number (a
mask that compares times in seconds, blocks of 0.8 seconds) may be decided otherwise than its closed form says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.functions.elementary.piecewise import Piecewise

from kvpass.analysis.expressions import Value, branches, number

ROWS = 1 << 18  # rows of a text for which closed forms are to hold
_BITS = {torch.float32: 24, torch.float64: 53, torch.int32: 31, torch.int64: 63}
_DECIDE = (
    "floor", "ceil", "round", "trunc", "fix", "frac", "floor_divide", "remainder", "fmod", "sign", "sgn", "heaviside",
)  # fmt: skip


class _Range(NamedTuple):
    """A number of at most this magnitude that is a whole number of such parts of one."""

    most: sympy.Rational
    parts: int


Bounds = Mapping[str, int]  # by leaf function, and of numbers that the caller passes


def bound_of(dtype: torch.dtype) -> int:
    """What the entries of a tensor that is data are at most: ids, counts and times are far from where integers wrap."""
    return _MOST.get(dtype, _MOST[torch.int64])


def wrapped(dtype: torch.dtype) -> int:
    """What the entries of a tensor are at most that may have wrapped."""
    return 1 << _BITS[dtype] if dtype in (torch.int32, torch.int64) else bound_of(dtype)


_MOST = {
    torch.bool: 1,
    torch.uint8: 255,
    torch.int8: 128,
    torch.int16: 1 << 15,
    torch.int32: 1 << 29,
    torch.int64: 1 << 53,
}
SMALL = (torch.uint8, torch.int8, torch.int16)  # each with a bound that no other dtype has


def is_own(leaf: Value, dtype: torch.dtype, bounds: Bounds) -> bool:
    """True of the entries of a tensor of small integers of this very dtype."""
    return dtype in SMALL and bounds.get(leaf.func.__name__) == _MOST[dtype]


def in_range(value: Value, dtype: torch.dtype) -> bool:
    """True of a number that a dtype of small integers has."""
    value, span = number(value), torch.iinfo(dtype)
    return bool(value.is_number and span.min <= value <= span.max)


def is_exact(expr: Value, dtype: torch.dtype, bounds: Bounds) -> bool:
    """True where a dtype holds every branch of a closed form without rounding or wrapping, for up to `ROWS` rows."""
    if dtype not in _BITS:
        return False
    return all(_fits(value, _BITS[dtype], bounds, not dtype.is_floating_point) for value, _ in branches(expr))


def is_decided(expr: Value, bounds: Bounds) -> bool:
    """True where float32 holds both sides of all comparisons in a condition."""
    sides = [side for rel in expr.atoms(Relational) for side in rel.args]
    return all(_fits(side, _BITS[torch.float32], bounds) for side in sides)


def is_below(expr: Value, most: float, bounds: Bounds) -> bool:
    """True where the magnitude of a closed form is known to be smaller, but for very negative numbers themselves."""
    found = [_range(value, bounds) for value, _ in branches(expr) if not value.is_number]
    return all(x is not None and x.most < most for x in found)


def decides(node: torch.fx.Node) -> bool:
    """True of ops on floats whose result jumps."""
    name = str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.").rstrip("_")
    return name in _DECIDE or bool(node.kwargs.get("rounding_mode"))


def _fits(value: Value, bits: int, bounds: Bounds, whole: bool = False) -> bool:
    if whole and value.is_number:
        return bool(-(1 << bits) <= value < 1 << bits)
    if not value.free_symbols and not value.atoms(AppliedUndef):
        return True  # a number is what the dtype has rounded it to
    found = _range(value, bounds)
    return found is not None and found.parts & (found.parts - 1) == 0 and found.most * found.parts <= 1 << bits


def _range(value: Value, bounds: Bounds) -> _Range | None:
    if isinstance(value, AppliedUndef):
        return _Range(sympy.Integer(bounds.get(value.func.__name__, _MOST[torch.int64])), 1)
    if value.is_Symbol:
        return _Range(sympy.Integer(bounds.get(value.name, ROWS)), 1)
    if value.is_Number:
        number = sympy.Rational(value) if value.is_finite else None
        return None if number is None else _Range(abs(number), int(number.q))
    if isinstance(value, Piecewise):
        return _joined([_range(inner, bounds) for inner, _ in value.args])
    inner = [_range(arg, bounds) for arg in value.args]
    if any(x is None for x in inner):
        return None
    known = [x for x in inner if x is not None]
    if isinstance(value, (sympy.Min, sympy.Max, sympy.Abs)):
        return _joined(known)
    if isinstance(value, (sympy.floor, sympy.ceiling)):
        return _Range(known[0].most + 1, 1)
    if isinstance(value, sympy.Mod):
        return _Range(known[1].most, math.lcm(*(x.parts for x in known)))
    if value.is_Add:
        return _Range(sympy.Add(*(x.most for x in known)), math.lcm(*(x.parts for x in known)))
    if value.is_Mul:
        return _Range(sympy.Mul(*(x.most for x in known)), math.prod(x.parts for x in known))
    if value.is_Pow and value.exp.is_Integer and value.exp > 0:
        return _Range(known[0].most ** int(value.exp), known[0].parts ** int(value.exp))
    return None


def _joined(ranges: Sequence[_Range | None]) -> _Range | None:
    known = [x for x in ranges if x is not None]
    if len(known) < len(ranges):
        return None
    return _Range(sympy.Max(*(x.most for x in known)), math.lcm(*(x.parts for x in known)))
