"""Index expressions: sympy over index variables, and the decisions that the proof needs of them.

sympy alone leaves ``x + 1 + d <= x`` as it stands and cannot compare piecewise values. The functions here normalise:
booleans used as numbers become `Piecewise`, arithmetic is mapped over the branches, a comparison of piecewise values
becomes a disjunction over its branches, and a relational is decided from the sign of ``lhs - rhs``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import sympy
from sympy.core.function import AppliedUndef
from sympy.functions.elementary.piecewise import Piecewise
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue, to_nnf

Value: TypeAlias = sympy.Basic
LIMIT = 400  # operations in an expression before it is given up: a mask has a few dozen
_FEW = 6  # relations in a condition that is written anew

_RELATIONS: dict[str, Callable[[Value, Value], Boolean]] = {
    "eq": sympy.Eq,
    "ne": sympy.Ne,
    "lt": sympy.Lt,
    "le": sympy.Le,
    "gt": sympy.Gt,
    "ge": sympy.Ge,
}


def is_boolean(value: Value) -> bool:
    """True of truth values. A `Symbol` is a `Boolean` to sympy; here it is always a number."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Expr)


def constant(value: object) -> Value | None:
    """A Python number as sympy; integral floats become integers so that comparisons fold."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if isinstance(value, float):
        if value != value:
            return None
        if value in (float("inf"), float("-inf")):
            return sympy.oo if value > 0 else -sympy.oo
        return sympy.Integer(int(value)) if value.is_integer() else sympy.Float(value)
    return value if isinstance(value, sympy.Basic) else None


def branches(value: Value) -> list[tuple[Value, Boolean]]:
    """``(value, condition)`` pairs with disjoint conditions that cover everything."""
    value = number(value)
    if not isinstance(value, Piecewise):
        return [(value, sympy.true)]
    out: list[tuple[Value, Boolean]] = []
    before: Boolean = sympy.true
    for val, cond in value.args:
        out.append((val, simplify(sympy.And(before, cond))))
        before = sympy.And(before, sympy.Not(cond))
    return [(val, cond) for val, cond in out if cond != sympy.false]


def number(value: Value) -> Value:
    """A boolean as 0 or 1; anything else unchanged."""
    if isinstance(value, BooleanTrue):
        return sympy.Integer(1)
    if isinstance(value, BooleanFalse):
        return sympy.Integer(0)
    if is_boolean(value):
        return Piecewise((sympy.Integer(1), value), (sympy.Integer(0), True))
    return value


def boolean(value: Value) -> Boolean:
    """A number as a truth value, ``value != 0``."""
    return value if is_boolean(value) else compare("ne", value, sympy.Integer(0))


def join(parts: Iterable[tuple[Value, Boolean]]) -> Value | None:
    """The piecewise value with these disjoint branches; equal values are merged."""
    merged: dict[Value, Boolean] = {}
    for val, cond in parts:
        if val is sympy.nan:
            return None
        merged[val] = sympy.Or(merged.get(val, sympy.false), cond)
    if len(merged) == 1:
        return next(iter(merged))
    pairs = list(merged.items())
    out = Piecewise(*pairs[:-1], (pairs[-1][0], True))
    return None if sympy.count_ops(out) > LIMIT else out


def chosen(value: Value, flags: Sequence[Value]) -> Iterator[tuple[Value, Boolean]]:
    """``value`` for each choice of zero or one for terms in it, and when that is."""
    zero, one = sympy.Integer(0), sympy.Integer(1)
    for choice in itertools.product((zero, one), repeat=len(flags)):
        bits = dict(zip(flags, choice, strict=True))
        when = (sympy.Eq(flag, zero) if bit == zero else sympy.Ne(flag, zero) for flag, bit in bits.items())
        yield value.xreplace(bits), sympy.And(*when)


def _under(value: Value, condition: Boolean) -> Value:
    """``value`` where ``condition`` holds, which says what some terms in it are."""
    terms = [term for term in sympy.And.make_args(condition) if isinstance(term, sympy.Eq)]
    return value.xreplace({term.lhs: term.rhs for term in terms if isinstance(term.lhs, AppliedUndef)})


def tidy(value: Value) -> Value:
    """The same value without branches that are never taken, and with what their conditions say of them."""
    if not isinstance(value, Piecewise):
        return value
    if not all(val.is_number for val, _ in value.args):
        value = join((_under(val, cond), cond) for val, cond in branches(value)) or value
    if not isinstance(value, Piecewise) or len(value.args) < 3:
        return value
    taken = [(val, pruned(cond)) for val, cond in branches(value)]
    return join((val, cond) for val, cond in taken if cond != sympy.false) or value


def minimal(value: Boolean) -> Boolean:
    """An equivalent condition in few terms, if it is one of few relations."""
    names: dict[Boolean, Boolean] = {}
    for k, rel in enumerate(sorted(value.atoms(sympy.core.relational.Relational), key=sympy.default_sort_key)):
        other = simplify(sympy.Not(rel))
        names[rel] = sympy.Not(names[other]) if other in names else sympy.Symbol(f"p{k}")
    if len(names) > _FEW:
        return value
    rels = {name: rel for rel, name in names.items() if name.is_Symbol}
    return simplify(sympy.simplify_logic(value.xreplace(names), deep=False).xreplace(rels))


def pruned(value: Boolean) -> Boolean:
    """The same condition without alternatives that exclude themselves."""
    value = simplify(to_nnf(value, simplify=False))
    options = [option for option in sympy.Or.make_args(value) if not contradicts(option)]
    return sympy.Or(*options)


def apply(function: Callable[..., Value], *values: Value) -> Value | None:
    """``function`` mapped over every combination of branches."""
    parts: list[tuple[list[Value], Boolean]] = [([], sympy.true)]
    for value in values:
        parts = [([*done, val], sympy.And(cond, c)) for done, cond in parts for val, c in branches(value)]
        if len(parts) > 16:
            return None
    parts = [(args, cond) for args, cond in parts if cond != sympy.false]
    return join((function(*args), cond) for args, cond in parts)


def compare(op: str, a: Value, b: Value) -> Boolean:
    """``a op b`` (`eq ne lt le gt ge`) with piecewise operands resolved and decided where signs allow."""
    if op in ("eq", "ne") and is_boolean(a) and is_boolean(b):
        same = sympy.Or(sympy.And(a, b), sympy.And(sympy.Not(a), sympy.Not(b)))
        return simplify(same if op == "eq" else sympy.Not(same))
    terms = []
    for x, cx in branches(a):
        for y, cy in branches(b):
            cond = sympy.And(cx, cy)
            if cond != sympy.false:
                terms.append(sympy.And(cond, decide(_RELATIONS[op](x, y))))
    return simplify(sympy.Or(*terms))


def decide(rel: Boolean) -> Boolean:
    """A relational whose ``lhs - rhs`` has a known sign as true or false; otherwise in normal form."""
    if not isinstance(rel, sympy.core.relational.Relational):
        return rel
    if rel.lhs.is_infinite or rel.rhs.is_infinite:
        return rel
    diff = sympy.expand(rel.lhs - rel.rhs)
    answer = {
        sympy.Eq: diff.is_zero,
        sympy.Ne: None if diff.is_zero is None else not diff.is_zero,
        sympy.Lt: diff.is_negative,
        sympy.StrictLessThan: diff.is_negative,
        sympy.LessThan: diff.is_nonpositive,
        sympy.StrictGreaterThan: diff.is_positive,
        sympy.GreaterThan: diff.is_nonnegative,
    }.get(type(rel))
    if answer is not None:
        return sympy.true if answer else sympy.false
    if type(rel) in (sympy.Eq, sympy.Ne) and (diff.is_positive or diff.is_negative):
        return sympy.false if type(rel) is sympy.Eq else sympy.true
    if not diff.is_integer:
        return rel
    normal = _normal(type(rel), diff)
    return sympy.false if _above(normal) else normal


def _above(rel: Boolean) -> bool:
    """True of a bound on floors that holds nowhere.

    ``floor(a) - floor(b) + rest <= c``: with ``a >= b`` the first two are at least 0; or by ``a - 1 < floor(a) <= a``.
    """
    if not isinstance(rel, sympy.LessThan):
        return False
    diff = sympy.expand(rel.lhs - rel.rhs)
    floors = sorted(diff.atoms(sympy.floor), key=sympy.default_sort_key)
    for a in floors:
        for b in floors:
            more, less = diff.coeff(a), diff.coeff(b)
            if more.is_positive and more == -less and (a.args[0] - b.args[0]).expand().is_nonnegative:
                return bool(sympy.expand(diff - more * (a - b)).is_positive)
    least = diff
    for a in floors:
        factor = diff.coeff(a)
        if not factor.is_number:
            return False
        least += factor * ((a.args[0] if factor.is_negative else a.args[0] - 1) - a)
    return bool(floors and sympy.expand(least).is_positive)


def _normal(kind: type, diff: sympy.Expr) -> Boolean:
    """Integer relationals as ``expr <= constant`` or ``expr == constant``, so that equal ones look equal."""
    if kind is sympy.StrictLessThan:
        return _normal(sympy.LessThan, diff + 1)
    if kind is sympy.StrictGreaterThan:
        return _normal(sympy.LessThan, -diff + 1)
    if kind is sympy.GreaterThan:
        return _normal(sympy.LessThan, -diff)
    const, rest = diff.as_coeff_Add()
    if kind is not sympy.LessThan and rest.could_extract_minus_sign():
        const, rest = -const, -rest
    return kind(rest, -const)


def simplify(value: Boolean) -> Boolean:
    """Decide each relational of a boolean and fold the result."""
    if isinstance(value, (sympy.And, sympy.Or)):
        args = [simplify(arg) for arg in value.args]
        if isinstance(value, sympy.Or) and _covers(args):
            return sympy.true
        return type(value)(*args)
    if isinstance(value, sympy.Not):
        inner = simplify(value.args[0])
        if isinstance(inner, (sympy.And, sympy.Or)):
            other = sympy.Or if isinstance(inner, sympy.And) else sympy.And
            return simplify(other(*map(sympy.Not, inner.args)))
        return sympy.Not(inner)
    return decide(value)


def _covers(terms: list[Boolean]) -> bool:
    """True where one of two integer bounds ``e <= a`` and ``-e <= b`` holds everywhere, as of ``a + b >= -1``."""
    bounds = [t.lhs - t.rhs for t in terms if isinstance(t, sympy.LessThan) and t.lhs.is_integer and t.rhs.is_integer]
    for k, a in enumerate(bounds):
        for b in bounds[k + 1 :]:
            if sympy.expand(a + b - 1).is_nonpositive:
                return True
    return False


def substitute(value: Value, mapping: dict[sympy.Basic, sympy.Basic]) -> Value:
    """Simultaneous substitution, simplified where the value is boolean."""
    if not mapping or not (value.free_symbols & mapping.keys()):
        return value
    out = value.xreplace(mapping)
    return simplify(out) if is_boolean(out) else out


def contradicts(value: Boolean) -> bool:
    """True where ``value`` is proved to hold nowhere. False means only that no proof was found."""
    value = simplify(value)
    if value == sympy.false:
        return True
    if isinstance(value, sympy.Or):
        return all(contradicts(arg) for arg in value.args)
    if isinstance(value, sympy.And):
        for k, arg in enumerate(value.args):
            if isinstance(arg, sympy.Or):
                rest = value.args[:k] + value.args[k + 1 :]
                return all(contradicts(sympy.And(*rest, option)) for option in arg.args)
        return _clash(list(value.args))
    return False


def _clash(terms: list[Boolean]) -> bool:
    """Two integer bounds ``e <= a`` and ``-e <= b`` with ``a + b < 0`` exclude each other."""
    bounds = [(t.lhs - t.rhs) for t in terms if isinstance(t, sympy.LessThan)]
    for k, a in enumerate(bounds):
        for b in bounds[k + 1 :]:
            if sympy.expand(a + b).is_positive:
                return True
    return False


def implies(premise: Boolean, conclusion: Boolean) -> bool:
    """True where ``premise -> conclusion`` is proved."""
    return contradicts(sympy.And(premise, to_nnf(sympy.Not(conclusion), simplify=False)))
