"""Expressions of `ir.Attention` as text that Triton compiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from kvpass.ir import Attention, I, Read
from kvpass.kernels.walk import DIVIDE, NEGATE, FloorDiv
from kvpass.lowering.words import COMMON, NAMES, Words, call, infix


class Triton(Words):
    """Expressions in Triton: indices are int32, scores fp32, all of them blocks that broadcast to ``[M, N]``."""

    new_row = "(i - start)"

    def __init__(self, spec: Attention | None, row: str = "i") -> None:
        super().__init__(spec, NAMES | {I: row})

    @property
    def ops(self) -> Mapping[Any, Callable[..., str]]:
        return _OPS

    def boolean(self, value: bool) -> str:
        return str(value)

    def real(self, value: float) -> str:
        return repr(value) if abs(value) < float("inf") else f'float("{value}")'

    def load(self, k: int, read: Read, indices: list[str]) -> str:
        # Where both sides of a choice are computed, the one not taken may index before the first entry.
        indices = [index if index in _INSIDE else f"tl.maximum({index}, 0)" for index in indices]
        terms = [f"tl.cast({index}, tl.int64) * reads[{k}][{axis}]" for axis, index in enumerate(indices[:-1], 1)]
        terms += indices[-1:] or ["0"]
        kind = "float32" if read.dtype.is_floating_point else "int64" if read.dtype is torch.int64 else "int32"
        return f"tl.load(reads[{k}][0] + ({' + '.join(terms)})).to(tl.{kind})"

    def select(self, condition: str, yes: str, no: str) -> str:
        return f"tl.where({condition}, {yes}, {no})"


class Host(Triton):
    """Ends of ranges in Python, whose division rounds down."""

    @property
    def ops(self) -> Mapping[Any, Callable[..., str]]:
        return {
            **_OPS,
            FloorDiv: infix("//"),
            sympy.Mod: infix("%"),
            sympy.Max: call("max"),
            sympy.Min: call("min"),
        }


def _power(base: str, exponent: str) -> str:
    """Triton has no power: whole exponents are products, and a number to some power is an exponential."""
    try:
        if exponent in ("0.5", "(1/2)"):
            return f"tl.sqrt({base})"
        if exponent.lstrip("-").isdigit() and abs(int(exponent)) <= 16:
            product = " * ".join([base] * abs(int(exponent)))
            return f"({product})" if int(exponent) > 0 else f"(1.0 / ({product}))"
        return f"tl.exp2({math.log2(float(base))!r} * {exponent})"
    except ValueError as error:
        raise NotImplementedError(f"{base} to the power of {exponent}") from error


_INSIDE = ("b", "h", "i", "j", "(i - start)")
_OPS: Mapping[Any, Callable[..., str]] = {
    **COMMON,
    sympy.Pow: _power,
    NEGATE: lambda a: f"(-{a})",
    DIVIDE: infix("/"),
    FloorDiv: call("floor_div"),
    sympy.Mod: call("floor_mod"),
    sympy.Xor: infix("^"),
    sympy.Not: lambda a: f"(~{a})",
    sympy.Max: call("tl.maximum"),
    sympy.Min: call("tl.minimum"),
    sympy.Abs: call("tl.abs"),
    sympy.floor: call("tl.floor"),
    sympy.tanh: call("hyperbolic"),
    sympy.exp: call("tl.exp"),
}
