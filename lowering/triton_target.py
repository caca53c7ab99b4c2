"""Expressions of `ir.Attention` as text that Triton compiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch

from kvpass.ir import SCORE, Attention, B, H, I, J
from kvpass.kernels.walk import DIVIDE, NEGATE, FloorDiv

_READABLE = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


class Triton:
    """Expressions in Triton: indices are int32, scores fp32, all of them blocks that broadcast to ``[M, N]``."""

    def __init__(self, spec: Attention | None, row: str = "i") -> None:
        self.spec, self.names = spec, _NAMES | {I: row}

    @property
    def ops(self) -> Mapping[Any, Callable[..., str]]:
        return _OPS

    def number(self, value: sympy.Basic) -> str:
        if value in (sympy.true, sympy.false):
            return str(bool(value))
        if value.is_Integer:
            if abs(value) >= 1 << 31:
                raise NotImplementedError(f"the number {value}")
            return str(value)
        number = float(value)
        return repr(number) if abs(number) < float("inf") else f'float("{number}")'

    def symbol(self, symbol: sympy.Symbol) -> str:
        return self.names[symbol]

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
            places = {"b": "b", "h": "h", "i": "(i - start)", "j": "j"}
            indices = [places[letter] for letter in read.axes]
        # Where both sides of a choice are computed, the one not taken may index before the first entry.
        indices = [index if index in _INSIDE else f"tl.maximum({index}, 0)" for index in indices]
        terms = [f"tl.cast({index}, tl.int64) * reads[{k}][{axis}]" for axis, index in enumerate(indices[:-1], 1)]
        terms += indices[-1:] or ["0"]
        kind = "float32" if read.dtype.is_floating_point else "int64" if read.dtype is torch.int64 else "int32"
        return f"tl.load(reads[{k}][0] + ({' + '.join(terms)})).to(tl.{kind})"

    def sink(self) -> str:
        """The sink of head ``h``."""
        if self.spec is None or self.spec.sink is None:
            return 'float("-inf")'
        return self.entry(self.spec.sink, ["h"])

    def select(self, condition: str, yes: str, no: str) -> str:
        return f"tl.where({condition}, {yes}, {no})"


class Host(Triton):
    """Ends of ranges in Python, whose division rounds down."""

    @property
    def ops(self) -> Mapping[Any, Callable[..., str]]:
        return {
            **_OPS,
            FloorDiv: _infix("//"),
            sympy.Mod: _infix("%"),
            sympy.Max: _call("max"),
            sympy.Min: _call("min"),
        }


def _infix(sign: str) -> Callable[[str, str], str]:
    return lambda a, b: f"({a} {sign} {b})"


def _call(name: str) -> Callable[..., str]:
    return lambda *args: f"{name}({', '.join(args)})"


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


_NAMES = {B: "b", H: "h", J: "j", SCORE: "score"}
_INSIDE = ("b", "h", "i", "j", "(i - start)")
_OPS: Mapping[Any, Callable[..., str]] = {
    sympy.Add: _infix("+"),
    sympy.Mul: _infix("*"),
    sympy.Pow: _power,
    NEGATE: lambda a: f"(-{a})",
    DIVIDE: _infix("/"),
    FloorDiv: _call("floor_div"),
    sympy.Mod: _call("floor_mod"),
    sympy.And: _infix("&"),
    sympy.Or: _infix("|"),
    sympy.Xor: _infix("^"),
    sympy.Not: lambda a: f"(~{a})",
    sympy.Eq: _infix("=="),
    sympy.Ne: _infix("!="),
    sympy.Lt: _infix("<"),
    sympy.Le: _infix("<="),
    sympy.Gt: _infix(">"),
    sympy.Ge: _infix(">="),
    sympy.Max: _call("tl.maximum"),
    sympy.Min: _call("tl.minimum"),
    sympy.Abs: _call("tl.abs"),
    sympy.floor: _call("tl.floor"),
    sympy.tanh: _call("hyperbolic"),
    sympy.exp: _call("tl.exp"),
}
