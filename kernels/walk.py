"""One walk over the expressions of `kvpass.ir.Attention`, for every target that they are computed or printed in.

A target says what a number, a symbol and a read are, and has one table of ops. Fractions of indices are gone before a
target sees them: ``floor(j / 49)`` becomes an integer division, ``j / 49 < i`` a comparison of whole numbers, because
49 * (1 / 49) is less than one in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any, Generic, Protocol, TypeVar

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

T = TypeVar("T")


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """``floor(a / n)`` of whole numbers, ``n`` a positive one."""

    nargs = (2,)


class Target(Protocol[T]):
    """What an expression is turned into."""

    @property
    def ops(self) -> Mapping[Any, Callable[..., Any]]: ...

    def number(self, value: sympy.Basic) -> T: ...

    def symbol(self, symbol: sympy.Symbol) -> T: ...

    def read(self, name: str, indices: Iterator[T]) -> T:
        """``indices`` are made when they are asked for."""
        ...

    def select(self, condition: T, yes: T, no: T) -> T: ...


def walk(expr: Any, target: Target[T]) -> T:
    """An expression in a target, from the leaves up; equal parts are visited once.

    Raises:
        NotImplementedError: an op that the target's table does not have, or a fraction of something unknown.
    """
    return _Walk(target).visit(whole(sympy.sympify(expr)))


class _Walk(Generic[T]):
    def __init__(self, target: Target[T]) -> None:
        self.target = target
        self.done: dict[Any, T] = {}

    def visit(self, expr: Any) -> T:
        if expr not in self.done:
            self.done[expr] = self.make(expr)
        return self.done[expr]

    def make(self, expr: Any) -> T:
        target = self.target
        if expr.is_Symbol:
            return target.symbol(expr)
        if expr in (sympy.true, sympy.false) or expr.is_number:
            return target.number(expr)
        if isinstance(expr, AppliedUndef):
            return target.read(expr.func.__name__, (self.visit(arg) for arg in expr.args))
        if isinstance(expr, sympy.Piecewise):
            return self.pieces(expr)
        if isinstance(expr, sympy.Mul) and expr.args[0] == -1 and len(expr.args) == 2:
            return self.apply(NEGATE, self.visit(expr.args[1]))
        if isinstance(expr, sympy.Pow):
            return self.power(*expr.args)
        args = [self.visit(arg) for arg in expr.args]
        if expr.func in _FOLDED:
            return reduce(lambda a, b: self.apply(expr.func, a, b), args)
        return self.apply(expr.func, *args)

    def power(self, base: Any, exponent: Any) -> T:
        x = self.visit(base)
        if exponent == 2:
            return self.apply(sympy.Mul, x, x)
        if exponent == -1:
            return self.apply(DIVIDE, self.target.number(sympy.Integer(1)), x)
        return self.apply(sympy.Pow, x, self.visit(exponent))

    def pieces(self, expr: sympy.Piecewise) -> T:
        *before, (last, _) = expr.args
        out = self.visit(last)
        for value, condition in reversed(before):
            out = self.target.select(self.visit(condition), self.visit(value), out)
        return out

    def apply(self, func: Any, *args: T) -> T:
        op = self.target.ops.get(func)
        if op is None:
            raise NotImplementedError(f"no {getattr(func, '__name__', func)} in {type(self.target).__name__}")
        made: T = op(*args)
        return made


NEGATE, DIVIDE = "negate", "divide"
_FOLDED = (sympy.Add, sympy.Mul, sympy.And, sympy.Or, sympy.Xor, sympy.Max, sympy.Min)


def whole(expr: Any) -> Any:
    """The same expression without fractions of indices."""
    if not expr.args:
        return expr
    if isinstance(expr, (sympy.floor, Relational)):
        inner = expr.args[0] if isinstance(expr, sympy.floor) else expr.lhs - expr.rhs
        if any(not n.is_Integer for n in inner.atoms(sympy.Rational)) and not inner.atoms(sympy.Float):
            above, below = sympy.together(inner).as_numer_denom()
            if not below.is_Integer:
                raise NotImplementedError(f"{expr} divides by something else than a number")
            above = whole(above)
            return FloorDiv(above, below) if isinstance(expr, sympy.floor) else expr.func(above, 0)
        if isinstance(expr, sympy.floor) and inner.is_integer:
            return whole(inner)
    if isinstance(expr, sympy.Piecewise):
        return sympy.Piecewise(*((whole(value), whole(test)) for value, test in expr.args), evaluate=False)
    args = [whole(arg) for arg in expr.args]
    return expr if all(a is b for a, b in zip(args, expr.args, strict=True)) else expr.func(*args)
