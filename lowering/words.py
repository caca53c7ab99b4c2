"""What the targets that print text have in common: names, numbers, and where an entry of a read stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch

from kvpass.ir import SCORE, Attention, B, H, I, J, Read

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)
READABLE = (*ELEMENTS, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NAMES = {B: "b", H: "h", I: "i", J: "j", SCORE: "score"}


def refuse(spec: Attention, largest_head: int) -> None:
    """Raises:
    NotImplementedError: no target has words for the element types or the sizes.
    """
    if spec.dtype not in ELEMENTS:
        raise NotImplementedError(f"elements of {spec.dtype}")
    if spec.softmax_dtype not in (None, torch.float32, spec.dtype):
        raise NotImplementedError(f"a softmax in {spec.softmax_dtype}")
    if max(spec.head_size, spec.value_size) > largest_head:
        raise NotImplementedError(f"heads of {spec.head_size} and {spec.value_size}")


class Words(ABC):
    """Expressions as text; indices are whole numbers of 32 bits.

    Attributes:
        new_row: the index of a row that counts from the first new one.
    """

    new_row: str

    def __init__(self, spec: Attention | None, names: Mapping[sympy.Basic, str] = NAMES) -> None:
        self.spec, self.names = spec, names

    @abstractmethod
    def boolean(self, value: bool) -> str: ...

    @abstractmethod
    def real(self, value: float) -> str: ...

    @abstractmethod
    def load(self, k: int, read: Read, indices: list[str]) -> str:
        """One entry of the read number ``k``, whose last axis is dense."""

    def number(self, value: sympy.Basic) -> str:
        if value in (sympy.true, sympy.false):
            return self.boolean(bool(value))
        if value.is_Integer:
            if abs(value) >= 1 << 31:
                raise NotImplementedError(f"the number {value}")
            return str(value)
        return self.real(float(value))

    def symbol(self, symbol: sympy.Symbol) -> str:
        return self.names[symbol]

    def read(self, name: str, indices: Iterator[str]) -> str:
        """In a score an axis that is not there is left out."""
        assert self.spec is not None
        given = list(indices)
        k, read = next((k, read) for k, read in enumerate(self.spec.reads) if read.name == name)
        if read.dtype not in READABLE:
            raise NotImplementedError(f"a mask or bias of {read.dtype}")
        if read.axes and len(given) == 4:
            places = {"b": "b", "h": "h", "i": self.new_row, "j": "j"}
            given = [places[letter] for letter in read.axes]
        return self.load(k, read, given)

    def sink(self) -> str:
        """The sink of head ``h``."""
        if self.spec is None or self.spec.sink is None:
            return self.real(float("-inf"))
        return self.read(self.spec.sink, iter(["h"]))


def infix(sign: str) -> Callable[[str, str], str]:
    return lambda a, b: f"({a} {sign} {b})"


def call(name: str) -> Callable[..., str]:
    return lambda *args: f"{name}({', '.join(args)})"


# What C, Triton and Python write alike.
COMMON: Mapping[Any, Callable[..., str]] = {
    sympy.Add: infix("+"),
    sympy.Mul: infix("*"),
    sympy.And: infix("&"),
    sympy.Or: infix("|"),
    sympy.Eq: infix("=="),
    sympy.Ne: infix("!="),
    sympy.Lt: infix("<"),
    sympy.Le: infix("<="),
    sympy.Gt: infix(">"),
    sympy.Ge: infix(">="),
}
