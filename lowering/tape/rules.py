"""How an op is written as loops in C++: one rule for each op, or one for a family.

A rule gets the call by name and its operands as `Value`s, and says the body of a function whose operands are ``p0``,
``p1``, .. and whose result is ``out``. Each op is rounded to its own dtype, as PyTorch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from kvpass.lowering.tape.words import TYPES, NoWords, Value, Words

aten = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Access:
    """An entry of a value, in a loop over rows."""

    value: Value
    index: tuple[str, ...]
    row: str


@dataclass
class Writing:
    """One op in the making.

    Attributes:
        given: its arguments by name; tensors as `Value`, numbers that change from call to call as sympy.
        out: where its result belongs.
        operands: the values that it reads, in the order of ``p0``, ``p1``, ..
        by_rows: whether every loop goes through the rows.
        read, stored: what of which value, by index, and the index of the row.
    """

    words: Words
    given: dict[str, Any]
    out: Value
    operands: list[Value] = field(default_factory=list)
    by_rows: bool = True
    read: list[Access] = field(default_factory=list)
    stored: list[Access] = field(default_factory=list)
    _row: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def tensor(self, value: Any) -> Value:
        if not isinstance(value, Value):
            raise NoWords("a number where a tensor is read")
        if value.dtype not in TYPES:
            raise NoWords(f"{value.dtype}")
        return value

    def pointer(self, value: Value) -> str:
        """The name of an operand's memory."""
        for k, known in enumerate(self.operands):
            if known.buffer == value.buffer and known.dtype == value.dtype:
                return f"p{k}"
        self.operands.append(value)
        return f"p{len(self.operands) - 1}"

    def load(self, value: Value, index: Sequence[str]) -> str:
        self.read.append(Access(value, tuple(index), self._row))
        return f"ld({self.pointer(value)}[{self.words.at(value, index)}])"

    def store(self, index: Sequence[str], what: str, out: Value | None = None) -> str:
        self.stored.append(Access(out or self.out, tuple(index), self._row))
        return f"st(out[{self.words.at(out or self.out, index)}], {what});"

    def size(self, expr: Any) -> str:
        return self.words.size(expr)

    def loops(self, shape: Sequence[Any], body: Callable[[list[str]], str], first: str = "i", simd: str = "") -> str:
        if first != "i":
            return self.words.loops(shape, body, first, simd)
        row = self.words.row(shape)
        self.by_rows &= row is not None

        def of_row(index: list[str]) -> str:
            self._row = "" if row is None else index[row]
            return body(index)

        return self.words.loops(shape, of_row)


Rule = Callable[[Writing], str]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    def add(made: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, made))
        return made

    return add


def computed(dtype: torch.dtype) -> str:
    """What C++ computes with where a tensor has this dtype."""
    if dtype in _FLOATS:
        return "float"
    if dtype is torch.float64:
        return "double"
    if dtype in TYPES:
        return "int64_t"
    raise NoWords(f"{dtype}")


def real(value: Any) -> str:
    """A number of Python's."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"INT64_C({value})" if -(1 << 63) < value < 1 << 63 else _refuse(f"the number {value}")
    if isinstance(value, float):
        if math.isnan(value):
            return '__builtin_nan("")'
        return repr(value) if math.isfinite(value) else ("" if value > 0 else "-") + "__builtin_inf()"
    return _refuse(f"a {type(value).__name__}")


def _refuse(what: str) -> str:
    raise NoWords(what)


# ---- entry by entry ------------------------------------------------------------------------------------------------


def pointwise(w: Writing, values: Sequence[Any], formula: Callable[..., str], compute: str) -> str:
    """``out = formula(values)``, broadcast; operands are turned into the type ``compute`` first."""
    tensors = [w.tensor(v).across(w.out.sizes) for v in values if isinstance(v, Value)]
    out, *tensors = w.words.merged([w.out, *tensors])

    def body(index: list[str]) -> str:
        mine = iter(tensors)
        loaded = [
            f"{compute}({w.load(next(mine), index)})" if isinstance(v, Value) else f"{compute}({_number(w, v)})"
            for v in values
        ]
        return w.store(index, formula(*loaded), out)

    return w.loops(out.sizes, body)


def _number(w: Writing, value: Any) -> str:
    return w.size(value) if isinstance(value, sympy.Basic) else real(value)


def _compute(w: Writing, *values: Any) -> str:
    """The type of an arithmetic op: that of its result, or of its operands where the result is a truth value."""
    if w.out.dtype is not torch.bool:
        return computed(w.out.dtype)
    dtypes = [v.dtype for v in values if isinstance(v, Value)]
    exact = any(not d.is_floating_point for d in dtypes) or any(isinstance(v, sympy.Basic) for v in values)
    if torch.float64 in dtypes:
        return "double"
    if any(d.is_floating_point for d in dtypes):
        return "double" if exact else "float"
    return "double" if any(isinstance(v, float) for v in values) else "int64_t"


def _unary(formula: str) -> Rule:
    def made(w: Writing) -> str:
        (x,) = (w.given[name] for name in ("self", "input") if name in w.given)
        return pointwise(w, [x], formula.format, _compute(w, x))

    return made


for target, formula in {
    aten.exp.default: "exponential({0})",
    aten.exp2.default: "exponential({0} * decltype({0})(0.69314718055994530942))",
    aten.log.default: "logarithm({0})",
    aten.log2.default: "(logarithm({0}) * decltype({0})(1.4426950408889634))",
    aten.sin.default: "sine({0})",
    aten.cos.default: "cosine({0})",
    aten.tanh.default: "hyperbolic({0})",
    aten.sqrt.default: "root({0})",
    aten.rsqrt.default: "(1 / root({0}))",
    aten.reciprocal.default: "(1 / {0})",
    aten.erf.default: "error({0})",
    aten.sigmoid.default: "sigmoid({0})",
    aten.silu.default: "({0} * sigmoid({0}))",
    aten.relu.default: "larger({0}, decltype({0})(0))",
    aten.relu6.default: "smaller(larger({0}, decltype({0})(0)), decltype({0})(6))",
    aten.neg.default: "(-{0})",
    aten.abs.default: "magnitude({0})",
    aten.square.default: "({0} * {0})",
    aten.logical_not.default: "!{0}",
    aten.isnan.default: "({0} != {0})",
    aten.clone.default: "{0}",
    aten.contiguous.default: "{0}",
    aten.detach.default: "{0}",
    aten.lift_fresh_copy.default: "{0}",
    aten.alias.default: "{0}",
    aten.expand_copy.default: "{0}",
}.items():
    RULES[target] = _unary(formula)


@rule(aten.bitwise_not.default)
def _bitwise_not(w: Writing) -> str:
    return pointwise(w, [w["self"]], "!{0}".format if w.out.dtype is torch.bool else "~{0}".format, "int64_t")


@rule(
    aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout, aten.type_as.default
)  # fmt: skip
def _to_copy(w: Writing) -> str:
    x = w.tensor(w["self"])
    if w.out.dtype is torch.bool:
        return pointwise(w, [x], "({0} != 0)".format, "double" if x.dtype is torch.float64 else computed(x.dtype))
    # A float that becomes an integer is cut off; an integer goes through no float.
    return pointwise(w, [x], "{0}".format, computed(x.dtype))


@rule(aten.gelu.default)
def _gelu(w: Writing) -> str:
    if w["approximate"] == "tanh":
        formula = "({0} * T(0.5) * (1 + hyperbolic(T(0.7978845608028654) * ({0} + T(0.044715) * {0} * {0} * {0}))))"
    else:
        formula = "({0} * T(0.5) * (1 + error({0} * T(0.70710678118654752440))))"
    compute = computed(w.out.dtype)
    return pointwise(w, [w["self"]], formula.replace("T(", compute + "(").format, compute)


@rule(aten.softplus.default)
def _softplus(w: Writing) -> str:
    beta, limit = real(float(w["beta"])), real(float(w["threshold"]))
    compute = computed(w.out.dtype)
    name = "__builtin_log1pf" if compute == "float" else "__builtin_log1p"
    return pointwise(
        w,
        [w["self"]],
        lambda x: (
            f"({x} * {compute}({beta}) > {compute}({limit}) ? {x} "
            f": {name}(exponential({x} * {compute}({beta}))) / {compute}({beta}))"
        ),
        compute,
    )


@rule(aten.leaky_relu.default)
def _leaky(w: Writing) -> str:
    compute, slope = computed(w.out.dtype), real(float(w["negative_slope"]))
    return pointwise(w, [w["self"]], lambda x: f"({x} > 0 ? {x} : {x} * {compute}({slope}))", compute)


def _with_alpha(sign: str, turned: bool = False) -> Rule:
    def made(w: Writing) -> str:
        a, b, alpha = w["self"], w["other"], w.given.get("alpha", 1)
        if turned:
            a, b = b, a
        if w.out.dtype is torch.bool:
            raise NoWords("a sum of truth values")
        compute = computed(w.out.dtype)
        by = "" if alpha == 1 else f"{compute}({_number(w, alpha)}) * "
        return pointwise(w, [a, b], lambda x, y: f"({x} {sign} {by}{y})", compute)

    return made


for overload in ("Tensor", "Scalar"):
    RULES[getattr(aten.add, overload)] = _with_alpha("+")
    RULES[getattr(aten.sub, overload)] = _with_alpha("-")
    RULES[getattr(aten.rsub, overload)] = _with_alpha("-", turned=True)


def _binary(formula: str) -> Rule:
    def made(w: Writing) -> str:
        a, b = w["self"], w["other"]
        return pointwise(w, [a, b], formula.format, _compute(w, a, b))

    return made


def _comparison(sign: str) -> Rule:
    """A number of Python's is rounded to the type of the tensor that it is compared with; arithmetic does not do so."""

    def made(w: Writing) -> str:
        a, b = w["self"], w["other"]
        if isinstance(b, float) and isinstance(a, Value) and a.dtype.is_floating_point:
            b = float(torch.tensor(b, dtype=a.dtype))
        return pointwise(w, [a, b], f"({{0}} {sign} {{1}})".format, _compute(w, a, b))

    return made


for overload in ("Tensor", "Scalar"):
    RULES[getattr(aten.mul, overload)] = _binary("({0} * {1})")
for op, sign in {aten.eq: "==", aten.ne: "!=", aten.lt: "<", aten.le: "<=", aten.gt: ">", aten.ge: ">="}.items():
    for overload in ("Tensor", "Scalar"):
        RULES[getattr(op, overload)] = _comparison(sign)
RULES[aten.maximum.default] = _binary("larger({0}, {1})")
RULES[aten.minimum.default] = _binary("smaller({0}, {1})")


def _logical(sign: str) -> Rule:
    """Of truth values; and of whole numbers where the sign counts their bits."""

    def made(w: Writing) -> str:
        a, b = w["self"], w["other"]
        dtypes = {v.dtype for v in (a, b) if isinstance(v, Value)}
        if any(d.is_floating_point for d in dtypes):
            raise NoWords("bits of a float")
        return pointwise(w, [a, b], lambda x, y: f"({x} {sign} {y})", "int64_t")

    return made


for op, sign in {
    aten.bitwise_and: "&",
    aten.bitwise_or: "|",
    aten.bitwise_xor: "^",
    aten.__and__: "&",
    aten.__or__: "|",
}.items():
    for overload in ("Tensor", "Scalar"):
        if hasattr(op, overload):
            RULES[getattr(op, overload)] = _logical(sign)
RULES[aten.logical_and.default] = _binary("(({0} != 0) & ({1} != 0))")
RULES[aten.logical_or.default] = _binary("(({0} != 0) | ({1} != 0))")
RULES[aten.logical_xor.default] = _binary("(({0} != 0) ^ ({1} != 0))")


def _safe(w: Writing) -> None:
    """A division of whole numbers by nothing ends a process; the op of PyTorch's raises."""
    divisor = w["other"]
    if not w.out.dtype.is_floating_point and not (isinstance(divisor, int) and divisor > 0):
        raise NoWords("a division of whole numbers by what may be zero")


@rule(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div(w: Writing) -> str:
    mode = w.given.get("rounding_mode")
    if mode is None:
        formula = "({0} / {1})"
    elif w.out.dtype.is_floating_point:
        raise NoWords("a division that rounds")
    else:
        formula = "({0} / {1})" if mode == "trunc" else "floor_div({0}, {1})"
    _safe(w)
    return pointwise(w, [w["self"], w["other"]], formula.format, computed(w.out.dtype))


@rule(aten.floor_divide.default, aten.floor_divide.Scalar)
def _floor_divide(w: Writing) -> str:
    if w.out.dtype.is_floating_point:
        raise NoWords("a division that rounds")
    _safe(w)
    return pointwise(w, [w["self"], w["other"]], "floor_div({0}, {1})".format, "int64_t")


@rule(aten.remainder.Tensor, aten.remainder.Scalar)
def _remainder(w: Writing) -> str:
    _safe(w)
    return pointwise(w, [w["self"], w["other"]], "floor_mod({0}, {1})".format, _compute(w, w["self"], w["other"]))


@rule(aten.pow.Tensor_Scalar)
def _pow(w: Writing) -> str:
    x, exponent = w["self"], w["exponent"]
    if isinstance(exponent, sympy.Basic):
        raise NoWords("a power that changes")
    compute = computed(w.out.dtype)
    if exponent in (1, 2, 3):
        return pointwise(w, [x], lambda v: "(" + " * ".join([v] * int(exponent)) + ")", compute)
    if compute == "int64_t":
        if exponent != int(exponent) or exponent < 0:
            raise NoWords("a power of whole numbers")
        return pointwise(w, [x], lambda v: f"whole_power({v}, {int(exponent)})", compute)
    formulas = {0.5: "root({0})", -0.5: "(1 / root({0}))", -1: "(1 / {0})", -2: "(1 / ({0} * {0}))"}
    formula = formulas.get(exponent, f"power({{0}}, {compute}({real(float(exponent))}))")
    return pointwise(w, [x], formula.format, compute)


@rule(aten.pow.Scalar)
def _pow_scalar(w: Writing) -> str:
    compute = computed(w.out.dtype)
    if compute == "int64_t":
        raise NoWords("a power of whole numbers")
    return pointwise(w, [w["self"], w["exponent"]], "power({0}, {1})".format, compute)


@rule(aten.pow.Tensor_Tensor)
def _pow_tensor(w: Writing) -> str:
    compute = computed(w.out.dtype)
    if compute == "int64_t":
        raise NoWords("a power of whole numbers")
    return pointwise(w, [w["self"], w["exponent"]], "power({0}, {1})".format, compute)


@rule(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default)
def _clamp(w: Writing) -> str:
    low = w.given.get("min", w.given.get("min_val"))
    high = w.given.get("max", w.given.get("max_val"))
    compute = computed(w.out.dtype)
    formula = "{0}"
    values = [w["self"]]
    for bound, name in ((low, "larger"), (high, "smaller")):
        if bound is not None:
            formula = f"{name}({formula}, {{{len(values)}}})"
            values.append(bound)
    return pointwise(w, values, formula.format, compute)


@rule(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(w: Writing) -> str:
    return _chosen(w, w["condition"], w["self"], w["other"])


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(w: Writing) -> str:
    return _chosen(w, w["mask"], w["value"], w["self"])


def _chosen(w: Writing, condition: Any, yes: Any, no: Any) -> str:
    if w.tensor(condition).dtype is not torch.bool:
        raise NoWords("a condition that is no truth value")
    return pointwise(w, [condition, yes, no], "({0} != 0 ? {1} : {2})".format, computed(w.out.dtype))


# ---- made from nothing ---------------------------------------------------------------------------------------------


def _fill(w: Writing, what: Any) -> str:
    (out,) = w.words.merged([w.out])
    text = _number(w, what)
    return w.loops(out.sizes, lambda index: w.store(index, f"{computed(w.out.dtype)}({text})", out))


@rule(
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
    aten.fill.Scalar,
    aten.scalar_tensor.default,
)
def _full(w: Writing) -> str:
    return _fill(w, w.given.get("fill_value", w.given.get("value", w.given.get("s"))))


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(w: Writing) -> str:
    return _fill(w, 0)


@rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(w: Writing) -> str:
    return _fill(w, 1)


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(w: Writing) -> str:
    start, step = w.given.get("start", 0), w.given.get("step", 1)
    compute = "int64_t" if computed(w.out.dtype) == "int64_t" else "double"
    return w.loops(
        w.out.sizes,
        lambda index: w.store(
            index, f"({compute}({_number(w, start)}) + {compute}({index[0]}) * {compute}({_number(w, step)}))"
        ),
    )


# ---- entries from other places -------------------------------------------------------------------------------------


@rule(
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten._reshape_copy.default, aten.view_copy.default,
)  # fmt: skip
def _reshape(w: Writing) -> str:
    """Where it is no view: the entries in their order."""
    x = w.tensor(w["self"])
    if not w.out.dense:
        raise NoWords("a result with holes")
    offset = w.size(w.out.offset)
    return f"int64_t at = {offset}; " + w.loops(x.sizes, lambda index: f"st(out[at++], {w.load(x, index)});")


def _copied(w: Writing, piece: Value, strides: Sequence[Any], offset: Any) -> str:
    """A piece of the result, which begins at ``offset`` there."""
    whole = Value(w.out.buffer, w.out.dtype, piece.sizes, tuple(strides), w.out.offset + offset)
    to, of = w.words.merged([whole, piece])
    return w.loops(to.sizes, lambda index: w.store(index, w.load(of, index), to))


@rule(aten.cat.default, aten.concat.default)
def _cat(w: Writing) -> str:
    pieces = [v for v in map(w.tensor, w["tensors"]) if len(v.sizes) == len(w.out.sizes)]
    axis, at, text = int(w["dim"]) % len(w.out.sizes), sympy.S.Zero, []
    for piece in pieces:
        text.append(_copied(w, piece, w.out.strides, at * w.out.strides[axis]))
        at = at + piece.sizes[axis]
    return "\n  ".join(text)


@rule(aten.stack.default)
def _stack(w: Writing) -> str:
    axis = int(w["dim"]) % len(w.out.sizes)
    strides = [s for d, s in enumerate(w.out.strides) if d != axis]
    pieces = enumerate(map(w.tensor, w["tensors"]))
    return "\n  ".join(_copied(w, piece, strides, k * w.out.strides[axis]) for k, piece in pieces)


@rule(aten.repeat.default)
def _repeat(w: Writing) -> str:
    x = w.tensor(w["self"])
    more = len(w.out.sizes) - len(x.sizes)

    def body(index: list[str]) -> str:
        own = [
            i if size == whole else "0" if size == 1 else f"{i} % {w.size(size)}"
            for i, size, whole in zip(index[more:], x.sizes, w.out.sizes[more:], strict=True)
        ]
        return w.store(index, w.load(x, own))

    return w.loops(w.out.sizes, body)


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(w: Writing) -> str:
    x, times = w.tensor(w["self"]), w["repeats"]
    if w["dim"] is None:
        raise NoWords("a repetition of all entries")
    axis = int(w["dim"]) % len(x.sizes)

    def body(index: list[str]) -> str:
        return w.store(index, w.load(x, _with(index, axis, f"{index[axis]} / {_number(w, times)}")))

    return w.loops(w.out.sizes, body)


def _checked(w: Writing, name: str, index: str, size: Any, wraps: bool = False) -> str:
    """Statements that make ``name`` a valid index, or end the call."""
    wrap = f"if ({name} < 0) {name} += {w.size(size)}; " if wraps else ""
    return f"int64_t {name} = {index}; {wrap}if ({name} < 0 || {name} >= {w.size(size)}) return OUT_OF_RANGE; "


def _with(index: Sequence[str], axis: int, other: str) -> list[str]:
    """An index in which one axis has another place."""
    return [*index[:axis], other, *index[axis + 1 :]]


def _but(x: Value, axis: int) -> list[Any]:
    """Sizes in which one axis has a single entry."""
    return [sympy.S.One if d == axis else size for d, size in enumerate(x.sizes)]


def _whole(value: Value) -> Value:
    if value.dtype not in (torch.int64, torch.int32):
        raise NoWords(f"indices of {value.dtype}")
    return value


@rule(aten.embedding.default)
def _embedding(w: Writing) -> str:
    weight, ids = w.tensor(w["weight"]), _whole(w.tensor(w["indices"]))
    many = len(ids.sizes)
    row = Value(weight.buffer, weight.dtype, weight.sizes[1:], weight.strides[1:], weight.offset)
    to = Value(w.out.buffer, w.out.dtype, w.out.sizes[many:], w.out.strides[many:])

    def body(index: list[str]) -> str:
        head = Value(w.out.buffer, w.out.dtype, w.out.sizes[:many], w.out.strides[:many], w.out.offset)
        place = f"const int64_t to = {w.words.at(head, index)}, of = j * {w.size(weight.strides[0])}; "
        inner = w.loops(
            row.sizes,
            lambda k: f"st(out[to + {w.words.at(to, k)}], ld({w.pointer(weight)}[of + {w.words.at(row, k)}]));",
            "k",
        )
        return _checked(w, "j", w.load(ids, index), weight.sizes[0]) + place + inner

    return w.loops(ids.sizes, body)


@rule(aten.index_select.default)
def _index_select(w: Writing) -> str:
    x, ids = w.tensor(w["self"]), _whole(w.tensor(w["index"]))
    axis = int(w["dim"]) % len(x.sizes)

    def body(index: list[str]) -> str:
        found = w.store(index, w.load(x, _with(index, axis, "j")))
        return _checked(w, "j", w.load(ids, [index[axis]]), x.sizes[axis]) + found

    return w.loops(w.out.sizes, body)


@rule(aten.gather.default)
def _gather(w: Writing) -> str:
    x, ids = w.tensor(w["self"]), _whole(w.tensor(w["index"]))
    axis = int(w["dim"]) % len(x.sizes)

    def body(index: list[str]) -> str:
        found = w.store(index, w.load(x, _with(index, axis, "j")))
        return _checked(w, "j", w.load(ids, index), x.sizes[axis]) + found

    return w.loops(w.out.sizes, body)


@rule(aten.index.Tensor)
def _index(w: Writing) -> str:
    """Whole axes, and neighbouring ones by tensors of places."""
    x, places = w.tensor(w["self"]), list(w["indices"])
    places += [None] * (len(x.sizes) - len(places))
    given = [k for k, p in enumerate(places) if p is not None]
    if not given or given != list(range(given[0], given[-1] + 1)):
        raise NoWords("places of axes that are apart")
    ids = [_whole(w.tensor(places[k])) for k in given]
    many = max(len(p.sizes) for p in ids)
    shape = w.out.sizes[given[0] : given[0] + many]
    ids = [p.across(shape) for p in ids]

    def body(index: list[str]) -> str:
        inner = index[given[0] : given[0] + many]
        own, text = [*index[: given[0]]], ""
        for axis, p in zip(given, ids, strict=True):
            text += _checked(w, f"j{axis}", w.load(p, inner), x.sizes[axis], wraps=True)
            own.append(f"j{axis}")
        return text + w.store(index, w.load(x, [*own, *index[given[0] + many :]]))

    return w.loops(w.out.sizes, body)


def _triangle(sign: str) -> Rule:
    def made(w: Writing) -> str:
        x = w.tensor(w["self"])
        diagonal = _number(w, w["diagonal"])
        return w.loops(
            w.out.sizes,
            lambda i: w.store(i, f"{i[-1]} - {i[-2]} {sign} {diagonal} ? {w.load(x, i)} : decltype({w.load(x, i)})(0)"),
        )

    return made


RULES[aten.tril.default], RULES[aten.triu.default] = _triangle("<="), _triangle(">=")


@rule(aten.constant_pad_nd.default, aten.pad.default)
def _pad(w: Writing) -> str:
    if w.given.get("mode", "constant") != "constant":
        raise NoWords("a padding that repeats entries")
    x, amounts, rank = w.tensor(w["self"]), list(w["pad"]), len(w.out.sizes)
    fill = w["value"] if w["value"] is not None else 0
    firsts = [amounts[2 * (rank - 1 - d)] if 2 * (rank - 1 - d) < len(amounts) else 0 for d in range(rank)]

    def body(index: list[str]) -> str:
        moved = [i if f == 0 else f"({i} - ({_number(w, f)}))" for i, f in zip(index, firsts, strict=True)]
        inside = " && ".join(
            f"{i} >= 0 && {i} < {w.size(size)}"
            for i, f, size, whole in zip(moved, firsts, x.sizes, w.out.sizes, strict=True)
            if f != 0 or size != whole
        )
        value = w.load(x, moved)
        return w.store(index, f"({inside or 'true'}) ? {value} : decltype({value})({_number(w, fill)})")

    return w.loops(w.out.sizes, body)


# ---- along an axis -------------------------------------------------------------------------------------------------


def _reduced(w: Writing, first: str, step: str, last: str = "{0}", simd: str = "") -> str:
    """``y = first``, then ``step`` for each entry ``x`` of the reduced axes, then ``last`` of ``y`` and the count."""
    (x,) = (w.tensor(w.given[name]) for name in ("self", "input") if name in w.given)
    dims = w.given.get("dim")
    dims = list(range(len(x.sizes))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = sorted(int(d) % len(x.sizes) for d in dims)
    kept = [d for d in range(len(x.sizes)) if d not in dims]
    keeps = bool(w.given.get("keepdim", False)) and len(w.out.sizes) == len(x.sizes)
    compute = computed(w.out.dtype if w.out.dtype is not torch.bool else x.dtype)
    if compute != computed(x.dtype) and computed(x.dtype) != "int64_t":
        raise NoWords("a sum in another type")

    def spread(index: Sequence[str], k: Sequence[str]) -> list[str]:
        by_axis = dict(zip((*kept, *dims), (*index, *k), strict=True))
        return [by_axis[d] for d in range(len(x.sizes))]

    def body(index: list[str]) -> str:
        def inner(k: list[str]) -> str:
            return step.format(f"{compute}({w.load(x, spread(index, k))})")

        place = spread(index, ["0"] * len(dims)) if keeps else index
        count = w.size(sympy.Mul(*[x.sizes[d] for d in dims]))
        inside = w.loops([x.sizes[d] for d in dims], inner, "k", simd if len(dims) == 1 else "")
        head = f"{compute} y = {first}; "
        return head + inside + w.store(place, last.format("y", count))

    return w.loops([x.sizes[d] for d in kept], body)


@rule(aten.sum.default, aten.sum.dim_IntList)
def _sum(w: Writing) -> str:
    return _reduced(w, "0", "y += {0};", simd="+")


@rule(aten.mean.default, aten.mean.dim)
def _mean(w: Writing) -> str:
    return _reduced(w, "0", "y += {0};", "{0} / decltype({0})({1})", simd="+")


@rule(aten.amax.default)
def _amax(w: Writing) -> str:
    lowest = "-__builtin_inf()" if w.out.dtype.is_floating_point else "INT64_MIN"
    return _reduced(w, lowest, "y = larger({0}, y);")


@rule(aten.amin.default)
def _amin(w: Writing) -> str:
    highest = "__builtin_inf()" if w.out.dtype.is_floating_point else "INT64_MAX"
    return _reduced(w, highest, "y = smaller({0}, y);")


@rule(aten.any.default, aten.any.dim, aten.any.dims)
def _any(w: Writing) -> str:
    return _reduced(w, "0", "y = y != 0 || {0} != 0;", "({0} != 0)")


@rule(aten.all.default, aten.all.dim, aten.all.dims)
def _all(w: Writing) -> str:
    return _reduced(w, "1", "y = y != 0 && {0} != 0;", "({0} != 0)")


@rule(aten.cumsum.default)
def _cumsum(w: Writing) -> str:
    x = w.tensor(w["self"])
    axis, compute = int(w["dim"]) % len(x.sizes), computed(w.out.dtype)
    if computed(x.dtype) != compute and computed(x.dtype) != "int64_t":
        raise NoWords("a sum in another type")

    def body(index: list[str]) -> str:
        def inner(k: list[str]) -> str:
            own = _with(index, axis, k[0])
            return f"y += {compute}({w.load(x, own)}); " + w.store(own, "y")

        return f"{compute} y = 0; " + w.loops([x.sizes[axis]], inner, "k")

    return w.loops(_but(x, axis), body)


def _normalised(log: bool, safe: bool = False) -> Rule:
    def made(w: Writing) -> str:
        x = w.tensor(w["self"])
        axis = int(w["dim"]) % len(x.sizes) if x.sizes else 0
        compute = computed(w.out.dtype)

        def body(index: list[str]) -> str:
            def over(step: Callable[[str, list[str]], str]) -> str:
                def inner(k: list[str]) -> str:
                    own = _with(index, axis, k[0])
                    return step(f"{compute}({w.load(x, own)})", own)

                return w.loops([x.sizes[axis]], inner, "k")

            empty = f"if (most == -{compute}(INFINITE)) most = 0; " if safe else ""
            total = "sum == 0 ? 0 : " if safe else ""
            result = (
                (lambda v, own: w.store(own, f"{v} - most - all"))
                if log
                else (lambda v, own: w.store(own, f"{total}exponential({v} - most) / sum"))
            )
            after = "const auto all = logarithm(sum); " if log else ""
            return (
                f"{compute} most = -INFINITE, sum = 0; "
                + over(lambda v, _: f"most = larger({v}, most);")
                + empty
                + over(lambda v, _: f"sum += exponential({v} - most);")
                + after
                + over(result)
            )

        return w.loops(_but(x, axis), body)

    return made


for target in (aten.softmax.int, aten._softmax.default):
    RULES[target] = _normalised(log=False)
for target in (aten.log_softmax.int, aten._log_softmax.default):
    RULES[target] = _normalised(log=True)
RULES[aten._safe_softmax.default] = _normalised(log=False, safe=True)


def _centred(w: Writing, mean: bool) -> str:
    x, shape = w.tensor(w["input"]), list(w["normalized_shape"])
    if len(shape) != 1:
        raise NoWords("a norm over several axes")
    compute, size = computed(w.out.dtype), w.size(x.sizes[-1])
    eps = w["eps"]
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    scale, shift = w.given.get("weight"), w.given.get("bias")

    def body(index: list[str]) -> str:
        def over(text: Callable[[str, str], str], simd: bool = True) -> str:
            def inner(k: list[str]) -> str:
                return text(f"{compute}({w.load(x, [*index, k[0]])})", k[0])

            return w.loops([x.sizes[-1]], inner, "k", "+" if simd else "")

        def result(v: str, k: str) -> str:
            y = f"({v} - middle) * by" if mean else f"{v} * by"
            if scale is not None:
                y = f"({y}) * {compute}({w.load(w.tensor(scale), [k])})"
            if shift is not None:
                y = f"{y} + {compute}({w.load(w.tensor(shift), [k])})"
            return w.store([*index, k], y)

        text = f"{compute} y = 0; "
        if mean:
            text += over(lambda v, _: f"y += {v};") + f"const {compute} middle = y / {size}; y = 0; "
        centred = "- middle" if mean else ""
        text += over(lambda v, _: f"y += ({v} {centred}) * ({v} {centred});")
        text += f"const {compute} by = 1 / root(y / {size} + {compute}({real(float(eps))})); "
        return text + over(result, simd=False)

    return w.loops(x.sizes[:-1], body)


RULES[aten.layer_norm.default] = lambda w: _centred(w, mean=True)
RULES[aten.rms_norm.default] = lambda w: _centred(w, mean=False)


# ---- products of little matrices -----------------------------------------------------------------------------------


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(w: Writing) -> str:
    """Straight loops: weights go to a kernel of their own, and what is left is small."""
    (a, b) = (w.tensor(w["self"]), w.tensor(w.given.get("other", w.given.get("mat2"))))
    if len(a.sizes) < 2 or len(b.sizes) < 2:
        raise NoWords("a product with a vector")
    compute = computed(w.out.dtype)
    a = a.across([*w.out.sizes[:-2], *a.sizes[-2:]])
    b = b.across([*w.out.sizes[:-2], *b.sizes[-2:]])

    def body(index: list[str]) -> str:
        *batch, i, j = index

        def inner(k: list[str]) -> str:
            return f"y += {compute}({w.load(a, [*batch, i, k[0]])}) * {compute}({w.load(b, [*batch, k[0], j])});"

        return f"{compute} y = 0; " + w.loops([a.sizes[-1]], inner, "k", "+") + w.store(index, "y")

    return w.loops(w.out.sizes, body)
