"""The text form of `kvpass.ir.Attention`: what `dump` prints, what tests write, and what a kernel is named by.

    attention heads=9 kv_heads=3 head_size=64 value_size=64 dtype=float32 scale=0.125
      read load_bias: float32[h, j]
      score = score + load_bias(b, h, i, j)
      support = (j <= i) & (j > i - 8)

`parse` is the inverse of `text`: the expressions are compared by structure, numbers to the last bit.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

import sympy
import torch
from sympy.printing.str import StrPrinter

from kvpass.ir import SCORE, Attention, B, H, I, J, Read, Step

_DEFAULTS = {f.name: f.default for f in fields(Attention)}
_EXPRESSIONS = ("score", "support")


def text(spec: Attention) -> str:
    """The text form; what has its default is left out."""
    words = []
    for f in fields(Attention):
        value = getattr(spec, f.name)
        if f.name not in (*_EXPRESSIONS, "reads") and value != _DEFAULTS[f.name]:
            words.append(f"{f.name}={_word(value)}")
    lines = ["attention " + " ".join(words)]
    for read in spec.reads:
        lines.append(f"  read {read.name}: {_word(read.dtype)}[{', '.join(read.axes)}]")
    lines += [f"  {name} = {expression(getattr(spec, name))}" for name in _EXPRESSIONS]
    return "\n".join(lines) + "\n"


def _word(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.value if isinstance(value, Step) else repr(value) if isinstance(value, float) else str(value)


class _Printer(StrPrinter):  # type: ignore[misc]
    def _print_Float(self, value: sympy.Float) -> str:
        return repr(float(value))

    def _print_Relational(self, value: Any) -> str:
        if isinstance(value, (sympy.Eq, sympy.Ne)):
            name = "Eq" if isinstance(value, sympy.Eq) else "Ne"
            return f"{name}({self._print(value.lhs)}, {self._print(value.rhs)})"
        return f"{self._print(value.lhs)} {value.rel_op} {self._print(value.rhs)}"


def expression(value: Any) -> str:
    """An expression as text that `parse_expression` reads."""
    return str(_Printer().doprint(value))


def parse(source: str) -> Attention:
    """The attention that a text says.

    Raises:
        ValueError: a line that is not understood; the message quotes it.
    """
    first, *rest = [line.strip() for line in source.strip().splitlines()]
    head, *words = first.split()
    if head != "attention":
        raise ValueError(f"not an attention: {first!r}")
    given: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in _DEFAULTS:
            raise ValueError(f"an attention has no {name!r}: {first!r}")
        given[name] = _value(name, value)
    reads: list[Read] = []
    for line in sorted(rest, key=lambda line: not line.startswith("read ")):  # expressions need their types
        if match := re.fullmatch(r"read (\w+): (\w+)\[([bhij, ]*)\]", line):
            reads.append(Read(match[1], getattr(torch, match[2]), match[3].replace(", ", "")))
        elif match := re.fullmatch(r"(score|support) = (.*)", line):
            given[match[1]] = parse_expression(match[2], reads)
        else:
            raise ValueError(f"not understood: {line!r}")
    return Attention(**given, reads=tuple(reads))


def _value(name: str, word: str) -> Any:
    if name in ("dtype", "softmax_dtype"):
        return getattr(torch, word)
    if name == "step":
        return Step(word)
    if name == "sink":
        return word
    return ast.literal_eval(word)


_NAMES = {"b": B, "h": H, "i": I, "j": J, "score": SCORE, "True": sympy.true, "False": sympy.false, "oo": sympy.oo}
_CALLS = {
    f.__name__: f
    for f in (sympy.Eq, sympy.Ne, sympy.Max, sympy.Min, sympy.floor, sympy.tanh, sympy.exp, sympy.Abs, sympy.Xor)
} | {"Eq": sympy.Eq, "Ne": sympy.Ne, "Mod": sympy.Mod, "sqrt": sympy.sqrt, "Piecewise": sympy.Piecewise}
_BINARY: dict[type, Any] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
    ast.BitAnd: sympy.And,
    ast.BitOr: sympy.Or,
}
_COMPARE = {ast.Lt: sympy.Lt, ast.LtE: sympy.Le, ast.Gt: sympy.Gt, ast.GtE: sympy.Ge}


def parse_expression(source: str, reads: Sequence[Read] = ()) -> Any:
    """An expression over ``score b h i j`` and reads; what is not listed in ``reads`` is a read of real numbers.

    Raises:
        ValueError: something else than sums, products, comparisons and the functions that the compiler prints.
    """
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"not an expression: {source!r}") from error
    whole = {read.name for read in reads if not read.dtype.is_floating_point}
    return _made(tree.body, source, whole)


def _function(name: str, whole: bool) -> Any:
    return sympy.Function(name, integer=True) if whole else sympy.Function(name, real=True)


def _made(node: ast.AST, source: str, whole: Collection[str]) -> Any:
    match node:
        case ast.Constant(value=bool() as value):
            return sympy.true if value else sympy.false
        case ast.Constant(value=int() | float() as value):
            return sympy.sympify(value)
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_made(left, source, whole), _made(right, source, whole))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_made(inner, source, whole)
        case ast.UnaryOp(op=ast.Invert(), operand=inner):
            return sympy.Not(_made(inner, source, whole))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](_made(left, source, whole), _made(right, source, whole))
        case ast.Tuple(elts=elements):
            return tuple(_made(element, source, whole) for element in elements)
        case ast.Call(func=ast.Name(id=name), args=args):
            made = [_made(arg, source, whole) for arg in args]
            return _CALLS[name](*made) if name in _CALLS else _function(name, name in whole)(*made)
    raise ValueError(f"not understood: {ast.unparse(node)!r} in {source!r}")
