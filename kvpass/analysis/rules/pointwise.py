"""Pointwise ops: entry by entry, broadcast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from kvpass.analysis import rounding, shifts
from kvpass.analysis.expressions import Value, apply, boolean, branches, compare, constant, is_boolean, number, simplify
from kvpass.analysis.facts import MASKS, NEGATIVE, PASSED, Fill, Shift
from kvpass.analysis.kept import only_where
from kvpass.analysis.scope import Operand, Parts
from kvpass.analysis.table import Op, Out, expression, extremes, rule, support_of

aten = torch.ops.aten


def _op(*names: str) -> list[Any]:
    """All overloads of these ops that return a new tensor."""
    out = []
    for name in names:
        packet = getattr(aten, name, None)
        if packet is not None:
            out += [getattr(packet, o) for o in packet.overloads() if "out" not in o and "Dimname" not in o]
    return out


# Where the closed form of the result is computed from the closed forms of the operands.
_ARITHMETIC: dict[str, Callable[..., Value]] = {
    "neg": lambda a: -a,
    "abs": lambda a: sympy.Abs(a),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "multiply": lambda a, b: a * b,
    "floor_divide": lambda a, b: sympy.floor(a / b),
    "remainder": lambda a, b: a - b * sympy.floor(a / b),
    "minimum": lambda a, b: sympy.Min(a, b),
    "maximum": lambda a, b: sympy.Max(a, b),
    "square": lambda a: a * a,
}
_WITH_ALPHA: dict[str, Callable[[Value], Callable[..., Value]]] = {
    "add": lambda alpha: lambda a, b: a + alpha * b,
    "sub": lambda alpha: lambda a, b: a - alpha * b,
    "rsub": lambda alpha: lambda a, b: b - alpha * a,
}
_RELATIONAL = ("eq", "ne", "lt", "le", "gt", "ge")
_LOGICAL: dict[str, Callable[..., Boolean]] = {
    "__and__": sympy.And,
    "bitwise_and": sympy.And,
    "logical_and": sympy.And,
    "__or__": sympy.Or,
    "bitwise_or": sympy.Or,
    "logical_or": sympy.Or,
    "bitwise_xor": sympy.Xor,
    "__xor__": sympy.Xor,
    "logical_xor": sympy.Xor,
    "bitwise_not": sympy.Not,
    "logical_not": sympy.Not,
}
_KEEP_ZERO = (
    "neg", "abs", "square", "sqrt", "relu", "gelu", "silu", "tanh", "sin", "erf", "sign", "floor", "round", "relu6",
    "expm1", "log1p", "tan", "atan", "asinh", "leaky_relu", "elu", "mish", "hardswish", "_to_copy", "to", "ceil",
    "trunc",
)  # fmt: skip
_OTHERS = (
    "exp", "exp2", "log", "log2", "log10", "cos", "rsqrt", "reciprocal", "sigmoid", "softplus", "log_sigmoid", "pow",
    "isnan", "isinf", "isfinite", "erfinv", "erfc", "fmod", "atan2", "hypot", "lerp", "addcmul", "addcdiv",
    "clamp_max", "hardtanh", "hardsigmoid", "celu", "selu", "acos", "asin", "cosh", "sinh", "polar",
    "complex", "real", "imag", "conj", "angle", "logaddexp", "xlogy", "threshold", "frac", "sgn",
    "true_divide", "divide", "copy", "deg2rad", "rad2deg", "bitwise_left_shift", "bitwise_right_shift", "softshrink",
    "__lshift__", "__rshift__", "hardshrink", "logit", "special_expit", "clip",
)  # fmt: skip


_BOUNDED = (
    "sigmoid", "tanh", "sin", "cos", "erf", "erfc", "sign", "sgn", "atan", "hardsigmoid", "relu6", "frac",
    "special_expit",
)  # fmt: skip


# By which a temperature, or a slope, that the caller passes makes nothing larger than it was.
_FACTORS = ("mul", "multiply", "div", "true_divide", "divide")


def _name(op: Op) -> str:
    target: Any = op.node.target
    return str(target.overloadpacket.__name__)


def _values(op: Op, count: int) -> list[Value] | None:
    return _read(op, op.args[:count])


def _read(op: Op, args: Sequence[Any]) -> list[Value] | None:
    values = [expression(_held(op, arg), op.scope) for arg in args]
    return None if any(v is None for v in values) or _wrapped(op, args, values) else values


def _wrapped(op: Op, args: Sequence[Any], values: Sequence[Value]) -> bool:
    """True where a number beside small integers may be another one to PyTorch: -1 beside bytes is 255."""
    if any(x.fact.dtype.is_floating_point for x in op.operands) or any(isinstance(arg, float) for arg in args):
        return False
    tensors = [x for x in op.operands if x.dims] or op.operands
    dtype = reduce(torch.promote_types, [x.fact.dtype for x in tensors])
    others = [value for arg, value in zip(args, values, strict=True) if arg not in tensors]
    return dtype in rounding.SMALL and not all(rounding.in_range(value, dtype) for value in others)


def _lowest(op: Op) -> float:
    """What very negative entries are at most that come from the operands, or are filled in."""
    filled = [float(a) for a in op.args if isinstance(a, (int, float)) and Fill.of(a) is Fill.NEG]
    facts = [x.fact for x in op.operands]
    low = [fact.low for fact in facts if fact.fill is Fill.NEG]
    written = [fact.expr for fact in facts if fact.fill is None and fact.expr is not None]
    low += [float(value) for value in written if _is_low(value)]
    return max([*filled, *low], default=NEGATIVE)


def _is_low(value: Value) -> bool:
    return bool(value.is_number and value.is_real) and Fill.of(value) is Fill.NEG


def _held(op: Op, number: Any) -> Any:
    """A number beside tensors: in the precision in which they are computed with."""
    if not isinstance(number, float) or not math.isfinite(number):
        return number
    double = any(x.fact.dtype is torch.float64 for x in op.operands)
    held = number if double else torch.tensor(number, dtype=torch.float32).item()
    return held if math.isfinite(held) else number


def _finish(op: Op, parts: Parts, expr: Value | None) -> Out:
    dims, ghosts = op.scope.broadcast(op.operands)
    parts.expr = expr
    if parts.low is None:
        parts.low = _lowest(op)
    if _name(op) in _FACTORS:
        parts.raw = op.raw(*(x for x in op.operands if not x.fact.index_only()), numbers=False)
    if _name(op) in _BOUNDED:
        parts.large, parts.lowered, parts.raw = False, False, frozenset()
    return Out(dims, parts, ghosts)


@rule(*_op(*(n for n in _ARITHMETIC if n not in ("square", "minimum", "maximum") and n not in _KEEP_ZERO)))
def arithmetic(op: Op) -> Out:
    name, values = _name(op), _values(op, 2)
    parts = op.gather()
    combine = _ARITHMETIC[name]
    alpha = op.arg(2, "alpha", 1)
    if alpha != 1:
        combine = _WITH_ALPHA[name](sympy.sympify(alpha))
    # bool + bool is a disjunction, not a number
    expr = None if values is None or op.dtypes[0] is torch.bool else apply(combine, *values)
    if name in ("add", "sub") and alpha == 1:
        parts.support, parts.fill = _sum_support(op, parts)
        parts.large, parts.lowered = _sum_is_large(op)
    else:
        parts.large = parts.large or op.names_large() or any(_is_large(op, a) for a in op.args[:2])
        if name in _WITH_ALPHA:
            parts.support, parts.fill = _both_zero(_known(op))
    if name in ("mul", "multiply"):
        parts.support, parts.fill, parts.low = _product_support(op, name)
    out = _finish(op, parts, expr)
    if name in ("add", "sub", "mul", "multiply") and not op.counts_rows() and _keeps_fills(op, parts):
        combined = shifts.of_sum if name in ("add", "sub") else shifts.of_product
        parts.shift = combined(op.scope, op.operands)
    return out


def _keeps_fills(op: Op, parts: Parts) -> bool:
    """What is masked in an operand is masked in the result: a shift speaks of the other entries."""
    masked = any(x.fact.fill in (Fill.NEG_INF, Fill.NEG) for x in op.operands)
    return not masked or parts.fill in (Fill.NEG_INF, Fill.NEG)


@rule(*_op("div"))
def division(op: Op) -> Out:
    parts, values = op.gather(), _values(op, 2)
    mode = op.kwargs.get("rounding_mode")
    expr = None
    if values is not None and (mode == "floor" or (mode is None and not number(values[0]).has(sympy.S.Infinity))):
        expr = apply((lambda a, b: sympy.floor(a / b)) if mode == "floor" else (lambda a, b: a / b), *values)
    parts.support, parts.fill, parts.low = _product_support(op, "div")
    parts.large = parts.large or _is_large(op, op.args[0]) or _is_large(op, op.args[1], inverse=True)
    return _finish(op, parts, None if expr is not None and expr.has(sympy.zoo, sympy.nan) else expr)


def _known(op: Op) -> list[tuple[Boolean, Fill] | None]:
    return [op.known(a) if isinstance(a, Operand) else None for a in op.args[:2]]


def _sum_support(op: Op, parts: Parts) -> tuple[Boolean, Fill | None]:
    """Minus infinity (or a very negative number) plus anything stays so; zero plus zero is zero."""
    known = _known(op)
    if _name(op) == "sub" and known[1] is not None:
        if known[1][1] is not Fill.ZERO:
            return sympy.true, None  # x - (-inf)
        taken = _term(op, 1)
        known[1] = known[1] if taken is None else support_of(taken)
    low = [k for k in known if k is not None and k[1] is not Fill.ZERO]
    if low:
        masked = any(k[1] is Fill.NEG for k in low)
        cancels = next((a for k, a in enumerate(op.args[:2]) if masked and _may_cancel(op, k, _lowest(op))), None)
        if cancels is not None:
            if isinstance(cancels, Operand):
                op.undo(parts, cancels)
            return sympy.true, None
        fill = Fill.NEG_INF if all(k[1] is Fill.NEG_INF for k in low) else Fill.NEG
        return sympy.And(*(k[0] for k in low)), fill
    return _both_zero(known)


def _both_zero(known: Sequence[tuple[Boolean, Fill] | None]) -> tuple[Boolean, Fill | None]:
    """Where two terms are not both zero."""
    if len(known) == 2 and all(k is not None and k[1] is Fill.ZERO for k in known):
        return sympy.Or(*(k[0] for k in known if k is not None)), Fill.ZERO
    return sympy.true, None


def _sum_is_large(op: Op) -> tuple[bool, bool]:
    """Whether a term has large entries, and whether one has very negative ones, with its sign."""
    large = lowered = False
    for k, a in enumerate(op.args[:2]):
        term = _term(op, k)
        if isinstance(a, Operand) and term is None:
            large = large or a.fact.large or (k == 1 and _name(op) == "sub" and a.fact.fill is Fill.NEG)
            lowered = lowered or a.fact.fill is Fill.NEG
        elif term is not None:
            fills = [Fill.of(val) for val in extremes(term)]
            large, lowered = large or any(fill not in MASKS for fill in fills), lowered or Fill.NEG in fills
    return large, lowered


def _term(op: Op, k: int) -> Value | None:
    """The closed form of what is added, with its sign."""
    expr = expression(op.args[k], op.scope)
    return apply(lambda a: -a, expr) if expr is not None and k == 1 and _name(op) == "sub" else expr


def _may_cancel(op: Op, k: int, low: float) -> bool:
    """True of a term in closed form that may be large enough to bring a very negative entry back, or others down."""
    expr, term = _term(op, k), op.args[k]
    if expr is None:  # scores and what is learnt are of ordinary size
        return isinstance(term, Operand) and op.reaches(term, low)
    if low <= -PASSED and rounding.is_below(expr, PASSED, op.scope.axes.bounds):
        return False
    return any(not val.is_number or (abs(val) > 1000 and Fill.of(val) is None) for val, _ in branches(expr))


def _is_large(op: Op, number: Any, inverse: bool = False) -> bool:
    """True of a number, or a tensor that holds one, that makes ordinary ones as large as what masks are filled with."""
    expr = expression(number, op.scope)
    if expr is None or is_boolean(expr) or not expr.is_number or not expr.is_extended_real:
        return False
    return bool(0 < abs(expr) <= -1 / NEGATIVE if inverse else abs(expr) >= -NEGATIVE)


def _product_support(op: Op, name: str) -> tuple[Boolean, Fill | None, float]:
    """Zero times anything (finite) is zero; a very negative number times a positive one is one where it stays so."""
    tensors = [a for a in op.args[:2] if isinstance(a, Operand)]
    candidates = tensors if name in ("mul", "multiply") else tensors[:1] if op.args[0] is tensors[0] else []
    known = [k for k in map(op.known, candidates) if k is not None]
    zeros = [k for k in known if k[1] is Fill.ZERO]
    if zeros:
        return sympy.And(*(k[0] for k in zeros)), Fill.ZERO, NEGATIVE
    for x in candidates:
        mask, factor = op.known(x), expression(next(a for a in op.args[:2] if a is not x), op.scope)
        if mask is None or factor is None or not factor.is_number or not factor.is_positive:
            continue
        scale = float(factor) if name != "div" else 1 / float(factor)
        low = x.fact.low * scale
        if mask[1] is Fill.NEG_INF or low <= NEGATIVE:
            return *mask, min(low, NEGATIVE)
    return sympy.true, None, NEGATIVE


@rule(aten.min.other, aten.max.other, *_op("minimum", "maximum"))
def extremum(op: Op) -> Out:
    values, parts = _values(op, 2), op.gather()
    low = _name(op) in ("min", "minimum")
    for value, floor in () if low else (op.args[:2], op.args[1::-1]):
        if parts.fill is None:
            parts.support, parts.fill = _floored(op, value, floor)
    return _finish(op, parts, None if values is None else apply(sympy.Min if low else sympy.Max, *values))


def _floored(op: Op, value: Any, floor: Any) -> tuple[Boolean, Fill | None]:
    """Very negative entries that get a very negative floor stay very negative."""
    known = op.known(value) if isinstance(value, Operand) else None
    if known is None or known[1] is Fill.ZERO or _constant_fill(op, floor) is not Fill.NEG:
        return sympy.true, None
    return known[0], Fill.NEG


@rule(only_where)
def kept(op: Op) -> Out:
    """The first operand, of which no other entry may be read."""
    parts, known, held = op.gather(), op.known(op.operands[0]), expression(op.args[1], op.scope)
    if known is not None:
        parts.support, parts.fill = known
    parts.valid = sympy.And(parts.valid, sympy.false if held is None else boolean(held))
    return _finish(op, parts, None)


@rule(*_op(*_RELATIONAL))
def relational(op: Op) -> Out:
    values = _values(op, 2)
    return _finish(op, op.gather(), None if values is None else compare(_name(op), *values))


@rule(*_op(*_LOGICAL))
def logical(op: Op) -> Out:
    parts, values = op.gather(), _values(op, 2)
    if values is None:
        return _finish(op, parts, None)
    if op.dtypes[0] is torch.bool:
        return _finish(op, parts, simplify(_LOGICAL[_name(op)](*map(boolean, values))))
    bits = [_bit(op, value) for value in values]
    whole = _name(op) in ("bitwise_not", "logical_not") or any(bit is None for bit in bits)
    return _finish(op, parts, None if whole else number(simplify(_LOGICAL[_name(op)](*bits))))


def _bit(op: Op, value: Value) -> Boolean | None:
    """An integer that is zero or one as a truth value."""
    axes = op.scope.axes
    if isinstance(value, AppliedUndef) and value.func.__name__ in axes.flags:
        axes.taken.add(axes.flags[value.func.__name__])
        return boolean(value)
    values = {val for val, _ in branches(value)}
    return boolean(value) if values <= {sympy.Integer(0), sympy.Integer(1)} else None


@rule(*_op(*_KEEP_ZERO))
def keeps_zero(op: Op) -> Out:
    parts, name = op.gather(), _name(op)
    known = op.known(op.args[0])
    if known is not None and (known[1] is Fill.ZERO or (name in ("_to_copy", "to") and op.dtypes[0].is_floating_point)):
        parts.support, parts.fill = known
    if known is not None and name == "relu":
        parts.support, parts.fill, parts.lowered = known[0], Fill.ZERO, False
    value = expression(op.args[0], op.scope)
    expr = None
    if value is not None and name in _ARITHMETIC:
        expr = apply(_ARITHMETIC[name], value)
    elif value is not None and name in ("_to_copy", "to"):
        expr = _cast(value, op.dtypes[0])
    out = _finish(op, parts, expr)
    if name in ("_to_copy", "to") and op.dtypes[0].is_floating_point:
        parts.shift = shifts.opened(op.scope, op.operands[0])
    return out


def _cast(value: Value, dtype: torch.dtype) -> Value | None:
    if dtype is torch.bool:
        return boolean(value)
    value = number(value)
    if dtype.is_floating_point or dtype.is_complex or value.is_integer:
        return value
    return None


@rule(*_op(*(name for name in _OTHERS if hasattr(aten, name))))
def other(op: Op) -> Out:
    parts, name = op.gather(), _name(op)
    if name in ("addcmul", "addcdiv", "lerp"):
        parts.large = parts.large or op.names_large()
    known = op.known(op.args[0]) if isinstance(op.args[0], Operand) else None
    steep = name != "softplus" or (op.arg(1, "beta", 1) >= 1 and op.arg(2, "threshold", 20) >= 0)
    if known is not None and steep and name in ("exp", "exp2", "sigmoid", "softplus") and known[1] is not Fill.ZERO:
        parts.support, parts.fill, parts.lowered = known[0], Fill.ZERO, False
    elif (known is not None and known[1] is Fill.ZERO and name in ("true_divide", "divide")) or (
        known is not None and known[1] is Fill.ZERO and name == "pow" and _positive(op.args[1])
    ):
        parts.support, parts.fill = known
    elif name == "lerp":
        parts.support, parts.fill = _both_zero(_known(op))
    expr = None
    if name == "pow" and isinstance(op.args[1], int) and op.args[1] >= 0:
        value = expression(op.args[0], op.scope)
        expr = None if value is None else apply(lambda a: a ** op.args[1], value)
    if name == "log":
        expr = _logarithm(expression(op.args[0], op.scope))
        parts.support, parts.fill = (sympy.true, None) if expr is None else support_of(expr) or (sympy.true, None)
    return _finish(op, parts, expr)


@rule(*_op("nan_to_num"))
def nan_to_num(op: Op) -> Out:
    """Numbers stay what they are, and minus infinity becomes the lowest one, or the one that is given.

    Zeros of a softmax are NaN where a row kept no key: they are zeros after all only where NaN becomes zero.
    """
    parts, known, dtype = op.gather(), op.known(op.args[0]), op.dtypes[0]
    value = expression(op.args[0], op.scope)
    if not dtype.is_floating_point:
        parts.support, parts.fill = known or (sympy.true, None)
        return _finish(op, parts, value)
    lowest = torch.finfo(dtype).min if op.arg(3, "neginf") is None else op.arg(3, "neginf")
    fill = None if known is None else _refilled(known[1], Fill.of(lowest), zero=not op.arg(1, "nan"))
    if known is not None and fill is not None:
        parts.support, parts.fill = known[0], fill
    expr = None
    if value is not None and all(_fits(val, dtype) for val, _ in branches(value)):
        expr = apply(lambda a: constant(float(lowest)) if a == -sympy.oo else a, value)
    return _finish(op, parts, expr)


def _refilled(fill: Fill, lowest: Fill | None, zero: bool) -> Fill | None:
    """What entries are filled with after `nan_to_num`: very negative ones may have been minus infinity."""
    if fill is Fill.ZERO:
        return Fill.ZERO if zero else None
    if fill is Fill.NEG:
        return Fill.NEG if lowest in (Fill.NEG, Fill.NEG_INF) else None
    return lowest


def _fits(value: Value, dtype: torch.dtype) -> bool:
    """True of minus infinity, and of what a dtype does not turn into an infinity."""
    if value.is_number:
        return bool(value == -sympy.oo or (value.is_real and abs(value) <= torch.finfo(dtype).max))
    return bool(value.is_finite)


def _logarithm(value: Value | None) -> Value | None:
    """Of a mask of ones and zeros: zero and minus infinity."""
    if value is None or not {val for val, _ in branches(value)} <= {sympy.Integer(0), sympy.Integer(1)}:
        return None
    return apply(lambda a: sympy.Integer(0) if a == 1 else -sympy.oo, value)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


@rule(*_op("clamp", "clamp_min"))
def clamp(op: Op) -> Out:
    low, high = op.arg(1, "min"), op.arg(2, "max")
    values = _read(op, [op.args[0], *(b for b in (low, high) if b is not None)])
    expr = None
    if values is not None:
        expr = values[0]
        if low is not None:
            expr = apply(sympy.Max, expr, values[1])
        if high is not None and expr is not None:
            expr = apply(sympy.Min, expr, values[-1])
    parts = op.gather()
    if low is not None and high is None:
        parts.support, parts.fill = _floored(op, op.args[0], low)
    out = _finish(op, parts, expr)
    if all(isinstance(bound, (int, float)) and abs(bound) < -NEGATIVE for bound in (low, high)):
        parts.raw = frozenset()
    return out


@rule(*_op("where"))
def where(op: Op) -> Out:
    cond, yes, no = op.args
    return _choose(op, expression(cond, op.scope), yes, no)


@rule(*_op("masked_fill"))
def masked_fill(op: Op) -> Out:
    return _choose(op, expression(op.args[1], op.scope), op.args[2], op.args[0])


def _choose(op: Op, cond: Value | None, yes: Any, no: Any) -> Out:
    """``yes`` where ``cond``, else ``no``; either may be a number."""
    parts = op.gather()
    if cond is None:
        return _finish(op, parts, None)
    cond = boolean(cond)
    a, b = expression(yes, op.scope), expression(no, op.scope)
    expr = None
    if a is not None and b is not None:
        if op.dtypes[0] is torch.bool:
            expr = simplify(sympy.Or(sympy.And(cond, boolean(a)), sympy.And(sympy.Not(cond), boolean(b))))
        else:
            # under its own condition each branch is itself, whatever the other one holds
            expr = apply(lambda c, x, y: x if c == 1 else y, number(cond), number(a), number(b))
    parts.support, parts.fill = _chosen_support(op, cond, yes, no)
    parts.large = parts.large or any(_is_large(op, a) for a in (yes, no) if _constant_fill(op, a) not in MASKS)
    parts.lowered = parts.lowered or any(_constant_fill(op, a) is Fill.NEG for a in (yes, no))
    out = _finish(op, parts, expr)
    kept = next((x for x in (yes, no) if isinstance(x, Operand) and _constant_fill(op, x) is None), None)
    if kept is not None and parts.fill in (Fill.NEG_INF, Fill.NEG) and _only_length(op, kept):
        parts.shift = Shift(level=shifts.opened(op.scope, kept).level)
    return out


def _only_length(op: Op, kept: Operand) -> bool:
    """True where no other operand knows of the length."""
    return all(x is kept or x.fact.length is None for x in op.operands)


def _chosen_support(op: Op, cond: Boolean, yes: Any, no: Any) -> tuple[Boolean, Fill | None]:
    for keep, value, other_one in ((sympy.Not(cond), yes, no), (cond, no, yes)):
        fill = _constant_fill(op, value)
        if fill is None:
            continue
        inner = op.known(other_one) if isinstance(other_one, Operand) else None
        if inner is not None and inner[1] is not Fill.ZERO and fill is not Fill.ZERO:
            return sympy.And(keep, inner[0]), fill if fill is inner[1] else Fill.NEG
        if inner is not None and inner[1] is fill:
            return sympy.And(keep, inner[0]), fill
        return simplify(keep), fill
    return sympy.true, None


def _constant_fill(op: Op, value: Any) -> Fill | None:
    """The fill class of a number, or of an operand that is one number everywhere."""
    expr = expression(value, op.scope)
    if expr is None:
        return None
    expr = number(expr)
    return Fill.of(expr) if expr.is_number and expr.is_real is not None and expr is not sympy.nan else None
