"""Sizes, values and loops of a tape in C++."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch
from sympy import Expr
from torch.utils._sympy import functions as sizes

from kvpass.ir import is_dense

TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.bool: "bool",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
}


class NoWords(NotImplementedError):
    """C++ has no words for it: the op runs as it is written."""


@dataclass(frozen=True)
class Value:
    """A tensor in memory: entry ``i`` is entry ``offset + sum(i[k] * strides[k])`` of its buffer."""

    buffer: int
    dtype: torch.dtype
    sizes: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    offset: Expr = sympy.S.Zero

    @property
    def dense(self) -> bool:
        return is_dense(self.sizes, self.strides)

    @property
    def count(self) -> Expr:
        return sympy.Mul(*self.sizes)

    def across(self, shape: Sequence[Expr]) -> Value:
        """The same, broadcast to a shape."""
        more = len(shape) - len(self.sizes)
        strides = [sympy.S.Zero] * more + [
            sympy.S.Zero if size == 1 else stride for size, stride in zip(self.sizes, self.strides, strict=True)
        ]
        return Value(self.buffer, self.dtype, tuple(shape), tuple(strides), self.offset)


class Words:
    """Sizes and loops in C++, over the numbers of a call.

    Args:
        places: of the numbers, by symbol.
        rows: the number of new rows, where a function is made for some of them at a time (``first`` to ``last - 1``).
    """

    def __init__(self, places: Mapping[sympy.Symbol, int], rows: sympy.Symbol | None = None) -> None:
        self.places, self.rows = places, rows

    def size(self, expr: Any) -> str:
        expr = sympy.sympify(expr)
        if expr.is_Integer:
            return str(expr) if abs(expr) < 1 << 31 else f"INT64_C({expr})"
        if expr.is_Symbol:
            return f"s[{self.places[expr]}]"
        args = [self.size(arg) for arg in expr.args]
        if isinstance(expr, (sympy.Add, sympy.Mul)):
            sign = " + " if isinstance(expr, sympy.Add) else " * "
            return f"({sign.join(sorted(args))})"
        if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
            return "(" + " * ".join([args[0]] * int(expr.exp)) + ")"
        for kind, name in CALLS.items():
            if isinstance(expr, kind):
                return reduce(lambda a, b: f"{name}({a}, {b})", args)
        raise NoWords(f"the size {expr}")

    def at(self, value: Value, index: Sequence[str]) -> str:
        """Where an entry stands, by the index of each axis."""
        terms = [] if value.offset == 0 else [self.size(value.offset)]
        for stride, i in zip(value.strides, index, strict=True):
            if stride == 1:
                terms.append(i)
            elif stride != 0 and i != "0":
                terms.append(f"({i}) * {self.size(stride)}")
        return " + ".join(terms) or "0"

    def loops(self, shape: Sequence[Expr], body: Callable[[list[str]], str], first: str = "i", simd: str = "") -> str:
        """Nested loops around what ``body`` says for an index; no loop along an axis of one entry.

        ``simd`` says how the iterations of a single loop are reduced to ``y``, several of them at once.
        """
        index = ["0" if size == 1 else f"{first}{k}" for k, size in enumerate(shape)]
        row = self.row(shape)
        heads = [
            f"for (int64_t {i} = first; {i} < last; ++{i}) "
            if k == row and first == "i"
            else f"for (int64_t {i} = 0; {i} < {self.size(size)}; ++{i}) "
            for k, (i, size) in enumerate(zip(index, shape, strict=True))
            if i != "0"
        ]
        pragma = f'\n_Pragma("omp simd reduction({simd}:y)")\n' if simd and len(heads) == 1 else ""
        return pragma + "".join(heads) + "{ " + body(index) + " }"

    def row(self, shape: Sequence[Expr]) -> int | None:
        """The axis of the rows; None where there is none, or more than one."""
        found = [k for k, size in enumerate(shape) if size == self.rows]
        return found[0] if len(found) == 1 else None

    def merged(self, values: Sequence[Value]) -> list[Value]:
        """The same entries over fewer axes: neighbours that all values walk through as one become one."""
        shape = list(values[0].sizes)
        strides = [list(v.strides) for v in values]
        for k in reversed(range(len(shape))):
            if shape[k] == 1:
                for own in strides:
                    del own[k]
                del shape[k]
        k = len(shape) - 2
        while k >= 0:
            if self.rows not in shape[k : k + 2] and all(
                sympy.expand(own[k] - own[k + 1] * shape[k + 1]) == 0 for own in strides
            ):
                shape[k] = shape[k] * shape[k + 1]
                del shape[k + 1]
                for own in strides:
                    del own[k]
            k -= 1
        return [
            Value(v.buffer, v.dtype, tuple(shape), tuple(own), v.offset) for v, own in zip(values, strides, strict=True)
        ]


# Sizes that neither C++ nor Python says with an operator, and what their functions are called.
CALLS: Mapping[Any, str] = {
    sizes.FloorDiv: "floor_div",
    sizes.CleanDiv: "floor_div",
    sizes.PythonMod: "floor_mod",
    sizes.Mod: "floor_mod",
    sympy.Mod: "floor_mod",
    sizes.Max: "larger<int64_t>",
    sympy.Max: "larger<int64_t>",
    sizes.Min: "smaller<int64_t>",
    sympy.Min: "smaller<int64_t>",
}
