"""Predicates and scores as people write them.

The analysis keeps integer relationals in a normal form, ``-i + j <= 0`` and ``i - j <= 3``, so that equal ones look
equal. Here they turn back: ``j <= i`` and ``j > i - 4``, upper bound first, in Python's notation:

    formula(And(i - j <= 7, -i + j <= 0))    ->  "(j <= i) & (j > i - 8)"
    formula(Ne(v_arg6_1(b, j), 0), leaves)   ->  "attention_mask[b, j]"
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.printing.str import StrPrinter

from kvpass.analysis.expressions import implies, is_boolean
from kvpass.ir import B, H, I, J

BEYOND = sympy.Symbol("d", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Leaf:
    """A tensor that a formula reads: its name, whether it holds truth values, and its indices where they are known."""

    label: str
    boolean: bool = False
    letters: tuple[str, ...] | None = None


Leaves = dict[str, Leaf]


def formula(value: sympy.Basic, leaves: Leaves | None = None) -> str:
    """A predicate or a number as text.

    Args:
        value: over any symbols; `kvpass.ir`'s ``b h i j`` read best.
        leaves: by the name of a leaf function, what it stands for. Others keep the name of their node.
    """
    return _Writer(leaves or {}).term(value).text


@dataclass(frozen=True, order=True)
class _Term:
    """Text with its place in a conjunction; ``tight`` needs no parentheses beside ``&``."""

    rank: int
    text: str
    tight: bool = False

    @property
    def wrapped(self) -> str:
        return self.text if self.tight else f"({self.text})"


# Places in a conjunction.
_UPPER, _LOWER, _EQUAL, _OTHER, _COMPOUND, _LEAF = range(6)


class _Numbers(StrPrinter):  # type: ignore[misc]  # sympy has no types
    """sympy's printer with integer division, short floats and leaves in brackets."""

    def __init__(self, leaves: Leaves) -> None:
        super().__init__()
        self.leaves = leaves

    def _print_Float(self, expr: Any) -> str:
        return f"{float(expr):.6g}"

    def _print_floor(self, expr: Any) -> str:
        top, bottom = expr.args[0].as_numer_denom()
        return str(self._infix(top, "//", bottom)) if bottom.is_Integer else f"floor({self._print(expr.args[0])})"

    def _print_FloorDiv(self, expr: Any) -> str:
        return self._infix(expr.args[0], "//", expr.args[1])

    def _print_Mod(self, expr: Any) -> str:
        return self._infix(expr.args[0], "%", expr.args[1])

    _print_PythonMod = _print_Mod

    def _print_ToFloat(self, expr: Any) -> str:
        return str(self._print(expr.args[0]))

    def _infix(self, left: Any, sign: str, right: Any) -> str:
        return f"{self._inner(left)} {sign} {self._inner(right)}"

    def _inner(self, expr: Any) -> str:
        text = str(self._print(expr))
        return text if expr.is_Atom or isinstance(expr, AppliedUndef) else f"({text})"

    def _print_Function(self, expr: Any) -> str:
        if not isinstance(expr, AppliedUndef):
            return str(super()._print_Function(expr))
        name = expr.func.__name__
        leaf = self.leaves.get(name) or Leaf(name.removeprefix("v_").removeprefix("load_"))
        places = leaf.letters if leaf.letters is not None else [self._print(arg) for arg in expr.args]
        return f"{leaf.label}[{', '.join(places)}]" if places else leaf.label

    def _print_Piecewise(self, expr: Any) -> str:
        writer = _Writer(self.leaves)
        text = str(self._print(expr.args[-1][0]))
        for value, cond in reversed(expr.args[:-1]):
            text = f"{self._print(value)} if {writer.term(cond).text} else {text}"
        return f"({text})"


class _Writer:
    """Booleans and relationals as terms."""

    def __init__(self, leaves: Leaves) -> None:
        self.leaves, self.numbers = leaves, _Numbers(leaves)

    def number(self, value: Any) -> str:
        return str(self.numbers.doprint(value))

    def term(self, value: Any) -> _Term:
        if isinstance(value, Relational):
            return self.relation(value)
        if isinstance(value, (sympy.And, sympy.Or, sympy.Xor)):
            sign = {sympy.And: " & ", sympy.Or: " | ", sympy.Xor: " ^ "}[value.func]
            parts = sorted(self.term(arg) for arg in value.args)
            return _Term(_COMPOUND, sign.join(part.wrapped for part in parts))
        if isinstance(value, sympy.Not):
            return _Term(_COMPOUND, f"~{self.term(value.args[0]).wrapped}", True)
        if is_boolean(value):
            return _Term(_OTHER, str(value), True)
        return _Term(_OTHER, self.number(value), value.is_Atom)

    def relation(self, rel: Any) -> _Term:
        difference = sympy.expand(rel.lhs - rel.rhs) if not (rel.lhs.is_infinite or rel.rhs.is_infinite) else sympy.nan
        equality = isinstance(rel, (sympy.Eq, sympy.Ne))
        if not difference.is_integer:
            return _Term(_OTHER, f"{self.number(rel.lhs)} {rel.rel_op} {self.number(rel.rhs)}")
        if equality and isinstance(difference, AppliedUndef):
            return self.truth(rel, difference)
        if equality:
            return self.equality(difference, "==" if isinstance(rel, sympy.Eq) else "!=")
        return self.bound(_at_most_zero(rel, difference))

    def truth(self, rel: Any, leaf: Any) -> _Term:
        """``leaf != 0`` is the leaf itself."""
        text, known = self.number(leaf), self.leaves.get(leaf.func.__name__)
        if isinstance(rel, sympy.Ne):
            return _Term(_LEAF, text, True)
        return _Term(_LEAF, f"~{text}", True) if known and known.boolean else _Term(_LEAF, f"{text} == 0")

    def equality(self, difference: Any, sign: str) -> _Term:
        symbol, coefficient = _alone(difference)
        if symbol is not None:
            rest = symbol - difference if coefficient > 0 else symbol + difference
            return _Term(_EQUAL, f"{symbol} {sign} {self.number(sympy.expand(rest))}")
        left, right = _sides(difference)
        if str(_first(right)) < str(_first(left)) or not left.free_symbols:
            left, right = right, left
        return _Term(_rank(difference, _EQUAL), f"{self.number(left)} {sign} {self.number(right)}")

    def bound(self, difference: Any) -> _Term:
        """``difference <= 0`` with one symbol alone on the left where that is possible."""
        symbol, coefficient = _alone(difference)
        if symbol is None:
            left, right = _sides(difference)
            if left.free_symbols:
                return _Term(_rank(difference, _OTHER), f"{self.number(left)} <= {self.number(right)}")
            return _Term(_rank(difference, _OTHER), f"{self.number(right)} >= {self.number(left)}")
        rest = sympy.expand(symbol - difference if coefficient > 0 else symbol + difference)
        sign, rest = _upper(rest) if coefficient > 0 else _lower(rest)
        return _Term(_UPPER if coefficient > 0 else _LOWER, f"{symbol} {sign} {self.number(rest)}")


def _at_most_zero(rel: Any, difference: Any) -> Any:
    """The integer relational as ``expression <= 0``."""
    if isinstance(rel, sympy.StrictLessThan):
        return difference + 1
    if isinstance(rel, sympy.StrictGreaterThan):
        return 1 - difference
    return -difference if isinstance(rel, sympy.GreaterThan) else difference


def _upper(rest: Any) -> tuple[str, Any]:
    """``<= x - 1`` is ``< x``, and ``<= 3`` is ``< 4``."""
    constant, _ = rest.as_coeff_Add()
    return ("<", rest + 1) if constant == -1 or rest.is_number else ("<=", rest)


def _lower(rest: Any) -> tuple[str, Any]:
    """``>= x - 7`` is ``> x - 8``; ``>= 3`` stays."""
    constant, symbols = rest.as_coeff_Add()
    return (">=", rest) if symbols == 0 or constant == 0 or constant > 1 else (">", rest - 1)


def _alone(difference: Any) -> tuple[Any, int]:
    """A symbol that occurs once, with factor 1 or -1, and that factor: the key's row by preference."""
    others = sorted(difference.free_symbols - {J, I, H, B}, key=str, reverse=True)
    for symbol in (J, I, H, B, *others):
        factor = difference.coeff(symbol)
        if factor in (1, -1) and symbol not in (difference - factor * symbol).free_symbols:
            return symbol, int(factor)
    return None, 0


def _sides(difference: Any) -> tuple[Any, Any]:
    """Terms of positive and of negative sign, the constant on the right where there is something on the left."""
    constant, rest = difference.as_coeff_Add()
    left = sympy.Add(*(t for t in sympy.Add.make_args(rest) if not t.could_extract_minus_sign()))
    right = sympy.Add(*(-t for t in sympy.Add.make_args(rest) if t.could_extract_minus_sign()))
    return (left, right - constant) if left != 0 else (constant, right)


def _first(value: Any) -> Any:
    return min((s for s in value.free_symbols), key=str, default="~")


def _rank(value: Any, otherwise: int) -> int:
    return _LEAF if value.atoms(AppliedUndef) else otherwise


def causality(support: sympy.Basic, leaves: Leaves | None = None) -> str:
    """Why no ``j > i`` satisfies a support, in words; empty where `implies` finds no proof."""
    later = {J: I + 1 + BEYOND}
    start = "j = i + 1 + d with d >= 0"
    if not implies(support.xreplace(later), sympy.false):
        inside = [
            t
            for t in support.atoms(sympy.LessThan)
            if _ends_a_prefix(t) and implies(support.xreplace(later), t.xreplace(later))
        ]
        return f"{start} leaves {formula(inside[0], leaves)}: rows that are part of every row's key" if inside else ""
    for part in _conjuncts(support):
        if implies(part.xreplace(later), sympy.false):
            return f"{start} turns {formula(part, leaves)} into {_shown(part, later)}: False"
    return f"{start} turns {formula(support, leaves)} into False"


def _ends_a_prefix(term: sympy.Basic) -> bool:
    """True of a bound on ``j`` by what the caller says of the sequence."""
    said = term.atoms(AppliedUndef)
    return bool(said) and term.has(J) and not term.has(I) and not any(leaf.has(J) for leaf in said)


def _conjuncts(support: sympy.Basic) -> Iterable[Any]:
    return sorted(sympy.And.make_args(support), key=lambda part: formula(part))


def _shown(part: Any, later: dict[Any, Any]) -> str:
    """A relational after the substitution, as ``d + 1 <= 0``."""
    if not isinstance(part, Relational) or isinstance(part, (sympy.Eq, sympy.Ne)):
        return "a contradiction"
    difference = sympy.expand(_at_most_zero(part, part.lhs - part.rhs).xreplace(later))
    return f"{difference} <= 0"
