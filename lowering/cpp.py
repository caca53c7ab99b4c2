"""`ir.Attention` as C++: `kernels/cpu/attention.cpp` with the facts of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sympy
import torch

from kvpass import kernels
from kvpass.ir import SCORE, Attention, B, H, I, J
from kvpass.kernels.text import text
from kvpass.kernels.walk import DIVIDE, NEGATE, FloorDiv, Target, walk
from kvpass.lowering.bounds import Range, ranges
from kvpass.lowering.specialise import specialise

SOURCE = Path(next(iter(kernels.__path__))) / "cpu" / "attention.cpp"
ELEMENTS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_READABLE = {
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.bool: "uint8_t",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.float64: "double",
}
_TILE_BYTES = 16384  # of keys: a tile of keys and its scores stay in the first level of a cache
_LONGEST_TILE = 64


def source(spec: Attention) -> str:
    """The standalone module of a shape.

    Raises:
        NotImplementedError: an element type, a score or a mask that C++ has no words for; the message says which.
    """
    if spec.dtype not in ELEMENTS:
        raise NotImplementedError(f"elements of {spec.dtype}")
    if spec.softmax_dtype not in (None, torch.float32, spec.dtype):
        raise NotImplementedError(f"a softmax in {spec.softmax_dtype}")
    if max(spec.head_size, spec.value_size) > 1024:
        raise NotImplementedError(f"heads of {spec.head_size} and {spec.value_size}")
    found = ranges(spec.support)
    facts = {
        "general": False,
        "kv_heads": spec.kv_heads,
        "group": spec.group,
        "head_size": spec.head_size,
        "value_size": spec.value_size,
        "tile": tile(spec),
        "scale": _float(spec.scale),
        "empty_is_nan": _bool(spec.empty_is_nan),
        "plain_score": _bool(spec.score == SCORE),
        "has_sink": _bool(spec.sink is not None),
        "reads": max(1, len(spec.reads)),
        "half": torch.float16 in (spec.dtype, *(read.dtype for read in spec.reads)),
        "interleaved": _bool(spec.dtype is torch.bfloat16),
        "element": ELEMENTS[spec.dtype],
        "score": _function("float", "score", "float score, ", spec, spec.score),
        "visible": _function("bool", "visible", "", spec, spec.support),
        "sink": _sink(spec),
        "ranges": _ranges(found),
    }
    head = "".join(f"// {line}\n" for line in text(spec).splitlines())
    return head + "\n" + specialise(SOURCE.read_text(), facts, "//")


def tile(spec: Attention) -> int:
    """Rows of a tile of keys at the most: what the first level of a cache holds, and a power of two."""
    most = max(1, min(_LONGEST_TILE, _TILE_BYTES // (max(spec.head_size, spec.value_size) * spec.dtype.itemsize)))
    return 1 << (most.bit_length() - 1)


def _function(result: str, name: str, first: str, spec: Attention, expr: Any) -> str:
    target: Target[str] = Cpp(spec)
    body = walk(expr, target)
    return f"inline {result} {name}(const Call& call, {first}int b, int h, int i, int j) {{\n  return {body};\n}}"


def _sink(spec: Attention) -> str:
    place = "-INFINITE" if spec.sink is None else Cpp(spec).entry(spec.sink, ["h"])
    return f"inline float sink(const Call& call, int h) {{ return {place}; }}"


def _ranges(found: tuple[Range, ...]) -> str:
    target: Target[str] = Cpp(None)
    lows = "".join(f"  if (range == {k}) return {walk(r.low, target)};\n" for k, r in enumerate(found))
    highs = "".join(
        f"  if (range == {k}) return {'rows' if r.high is None else walk(r.high, target)};\n"
        for k, r in enumerate(found)
    )
    return (
        f"constexpr int RANGES = {len(found)};\n"
        f"constexpr bool EXACT[] = {{{', '.join(_bool(r.exact) for r in found) or 'false'}}};\n"
        f"inline int low(int range, int i) {{\n{lows}  return 0;\n}}\n"
        f"inline int high(int range, int i, int rows) {{\n{highs}  return rows;\n}}"
    )


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _float(value: float) -> str:
    if value != value:
        return '__builtin_nanf("")'
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "-INFINITE"
    digits = repr(float(torch.tensor(value, dtype=torch.float32)))
    return f"{digits}f"


class Cpp:
    """Expressions in C++: indices are ``int``, scores ``float``."""

    def __init__(self, spec: Attention | None) -> None:
        self.spec, self.ops = spec, _OPS

    def number(self, value: sympy.Basic) -> str:
        if value in (sympy.true, sympy.false):
            return _bool(bool(value))
        if value.is_Integer:
            if abs(value) >= 1 << 31:
                raise NotImplementedError(f"the number {value}")
            return str(value)
        return _float(float(value))

    def symbol(self, symbol: sympy.Symbol) -> str:
        return _NAMES[symbol]

    def read(self, name: str, indices: Iterator[str]) -> str:
        return self.entry(name, list(indices))

    def entry(self, name: str, indices: list[str]) -> str:
        """One entry of a read. The last axis is dense; in a score an axis that is not there is left out."""
        assert self.spec is not None
        k = next(k for k, read in enumerate(self.spec.reads) if read.name == name)
        read = self.spec.reads[k]
        if read.dtype not in _READABLE:
            raise NotImplementedError(f"a mask or bias of {read.dtype}")
        if read.axes and len(indices) == 4:
            places = {"b": "b", "h": "h", "i": "(i - int(call.start))", "j": "j"}
            indices = [places[letter] for letter in read.axes]
        terms = [f"{index} * call.reads[{k}].stride[{axis}]" for axis, index in enumerate(indices[:-1])]
        terms += indices[-1:] or ["0"]
        kind = _READABLE[read.dtype]
        value = f"static_cast<const {kind}*>(call.reads[{k}].data)[{' + '.join(terms)}]"
        return f"to_float({value})" if read.dtype in (torch.bfloat16, torch.float16) else f"({value})"

    def select(self, condition: str, yes: str, no: str) -> str:
        return f"({condition} ? {yes} : {no})"


def _infix(sign: str) -> Callable[[str, str], str]:
    return lambda a, b: f"({a} {sign} {b})"


def _call(name: str) -> Callable[..., str]:
    return lambda *args: f"{name}({', '.join(args)})"


_NAMES = {B: "b", H: "h", I: "i", J: "j", SCORE: "score"}
_OPS: Mapping[Any, Callable[..., str]] = {
    sympy.Add: _infix("+"),
    sympy.Mul: _infix("*"),
    sympy.Pow: lambda a, b: f"__builtin_powf({a}, {b})",
    NEGATE: lambda a: f"(-{a})",
    DIVIDE: lambda a, b: f"(float({a}) / float({b}))",
    FloorDiv: _call("floor_div"),
    sympy.Mod: _call("floor_mod"),
    sympy.And: _infix("&"),
    sympy.Or: _infix("|"),
    sympy.Xor: _infix("!="),
    sympy.Not: lambda a: f"(!{a})",
    sympy.Eq: _infix("=="),
    sympy.Ne: _infix("!="),
    sympy.Lt: _infix("<"),
    sympy.Le: _infix("<="),
    sympy.Gt: _infix(">"),
    sympy.Ge: _infix(">="),
    sympy.Max: lambda a, b: f"({a} > {b} ? {a} : {b})",
    sympy.Min: lambda a, b: f"({a} < {b} ? {a} : {b})",
    sympy.Abs: lambda a: f"({a} < 0 ? -{a} : {a})",
    sympy.floor: _call("__builtin_floorf"),
    sympy.tanh: _call("hyperbolic"),
    sympy.exp: _call("exponential"),
}
