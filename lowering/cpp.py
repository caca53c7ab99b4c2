"""`ir.Attention` as C++: `kernels/cpu/attention.cpp` with the facts of one shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sympy
import torch

from kvpass import kernels
from kvpass.ir import SCORE, Attention, Read
from kvpass.kernels.text import text
from kvpass.kernels.walk import DIVIDE, NEGATE, FloorDiv, Target, walk
from kvpass.lowering.bounds import Range, ranges
from kvpass.lowering.specialise import specialise
from kvpass.lowering.words import COMMON, Words, call, infix, refuse

SOURCE = Path(next(iter(kernels.__path__))) / "cpu" / "attention.cpp"
ELEMENTS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_LARGEST_HEAD = 1024
_TYPES = ELEMENTS | {
    torch.bool: "uint8_t",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.float64: "double",
}
TILE = 64  # rows of a tile at the most, which lies in one page


def source(spec: Attention) -> str:
    """The standalone module of a shape.

    Raises:
        NotImplementedError: an element type, a score or a mask that C++ has no words for; the message says which.
    """
    refuse(spec, _LARGEST_HEAD)
    found = ranges(spec.support)
    facts = {
        "general": False,
        "kv_heads": spec.kv_heads,
        "group": spec.group,
        "head_size": spec.head_size,
        "value_size": spec.value_size,
        "tile": TILE,
        "scale": real(spec.scale),
        "empty_is_nan": _bool(spec.empty_is_nan),
        "plain_score": _bool(spec.score == SCORE),
        "has_sink": _bool(spec.sink is not None),
        "reads": max(1, len(spec.reads)),
        "half": torch.float16 in (spec.dtype, *(read.dtype for read in spec.reads)),
        "brain": spec.dtype is torch.bfloat16,
        "interleaved": _bool(spec.dtype is torch.bfloat16),
        "element": ELEMENTS[spec.dtype],
        "score": _function("float", "score", "float score, ", spec, spec.score),
        "visible": _function("bool", "visible", "", spec, spec.support),
        "sink": _sink(spec),
        "ranges": _ranges(found),
    }
    head = "".join(f"// {line}\n" for line in text(spec).splitlines())
    return head + "\n" + specialise(SOURCE.read_text(), facts, "//")


def _function(result: str, name: str, first: str, spec: Attention, expr: Any) -> str:
    target: Target[str] = Cpp(spec)
    body = walk(expr, target)
    return f"inline {result} {name}(const Call& call, {first}int b, int h, int i, int j) {{\n  return {body};\n}}"


def _sink(spec: Attention) -> str:
    return f"inline float sink(const Call& call, int h) {{ return {Cpp(spec).sink()}; }}"


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


def real(value: float) -> str:
    """A literal of the nearest ``float``."""
    if value != value:
        return '__builtin_nanf("")'
    if value in (float("inf"), float("-inf")):
        return "INFINITE" if value > 0 else "-INFINITE"
    return f"{float(torch.tensor(value, dtype=torch.float32))!r}f"


class Cpp(Words):
    """Expressions in C++: indices are ``int``, scores ``float``."""

    new_row = "(i - int(call.start))"

    @property
    def ops(self) -> Mapping[Any, Callable[..., str]]:
        return _OPS

    def boolean(self, value: bool) -> str:
        return _bool(value)

    def real(self, value: float) -> str:
        return real(value)

    def load(self, k: int, read: Read, indices: list[str]) -> str:
        terms = [f"{index} * call.reads[{k}].stride[{axis}]" for axis, index in enumerate(indices[:-1])]
        terms += indices[-1:] or ["0"]
        value = f"static_cast<const {_TYPES[read.dtype]}*>(call.reads[{k}].data)[{' + '.join(terms)}]"
        return f"to_float({value})" if read.dtype in (torch.bfloat16, torch.float16) else f"({value})"

    def select(self, condition: str, yes: str, no: str) -> str:
        return f"({condition} ? {yes} : {no})"


_OPS: Mapping[Any, Callable[..., str]] = {
    **COMMON,
    sympy.Pow: lambda a, b: f"__builtin_powf({a}, {b})",
    NEGATE: lambda a: f"(-{a})",
    DIVIDE: lambda a, b: f"(float({a}) / float({b}))",
    FloorDiv: call("floor_div"),
    sympy.Mod: call("floor_mod"),
    sympy.Xor: infix("!="),
    sympy.Not: lambda a: f"(!{a})",
    sympy.Max: lambda a, b: f"({a} > {b} ? {a} : {b})",
    sympy.Min: lambda a, b: f"({a} < {b} ? {a} : {b})",
    sympy.Abs: lambda a: f"({a} < 0 ? -{a} : {a})",
    sympy.floor: call("__builtin_floorf"),
    sympy.tanh: call("hyperbolic"),
    sympy.exp: call("exponential"),
}
