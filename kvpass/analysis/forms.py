"""What a closed form says of a value, and whether a value is what its closed form says.

A form is exact; a tensor holds what its dtype can. `settle` brings the two together: a form that the dtype does not
hold goes, the numbers in it are rounded as the dtype rounds them, and a bool or integer value without one becomes an
uninterpreted function of its indices, a leaf.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import fx

from kvpass import errors
from kvpass.analysis import laws, rounding, shifts
from kvpass.analysis.expressions import LIMIT, Value, branches, chosen, constant, is_boolean, join
from kvpass.analysis.facts import HALF, Atom, Cause, Fact, Fill, Kind, Shift, index, leaf_name
from kvpass.analysis.scope import Axes
from kvpass.analysis.table import extremes, lowest, support_of


def settle(fact: Fact, node: fx.Node, axes: Axes) -> Fact:
    """A closed form says exactly what a value depends on; a bool or integer value without one becomes a leaf."""
    expr = _flagged(fact, axes)
    bound = rounding.bound_of(fact.dtype)
    if expr is not None and (sympy.count_ops(expr) > LIMIT or not _exact(fact, expr, node, axes)):
        bound = bound if isinstance(expr, AppliedUndef) else rounding.wrapped(fact.dtype)
        expr = None
    if expr is not None and fact.dtype.is_floating_point:
        expr = _as_held(expr, fact.dtype)
    fact = replace(fact, rounded=expr is not None and fact.dtype.is_floating_point and _rounds(fact, expr, axes))
    axes.bounds[leaf_name(node.name)] = bound
    if expr is None:
        small = not fact.dtype.is_floating_point and not fact.dtype.is_complex and len(fact.atoms) <= 5
        return replace(fact, expr=leaf_value(node, fact) if small else None)
    expr = laws.apply(expr, axes.laws)
    fact = fact if fact.rounded else replace(fact, dims=_repeated(fact, expr))
    fact = replace(fact, batch=fact.batch or _place_in_batch(fact, expr, node))
    length = fact.length
    support, fill = support_of(expr) or (sympy.true, None)
    fact = replace(fact, support=support, fill=fill, low=lowest(expr), large=_is_large(expr, fill))
    fact = replace(fact, shift=Shift() if fact.dtype in HALF else shifts.of_form(expr, fact.atoms, axes.seq))
    if expr.has(axes.seq):
        length = length or Cause(
            node.name, f"its closed form {expr} speaks of the number of rows", errors.DependsOnLength
        )
    elif not expr.atoms(AppliedUndef):
        length = None
    if axes.batch.free_symbols and expr.has(axes.batch):
        cause = Cause(node.name, f"its closed form {expr} speaks of the number of texts", errors.MixesBatch)
        fact = replace(fact, batch=fact.batch or cause)
    if expr.atoms(AppliedUndef):
        return replace(fact, expr=expr, length=length)
    return replace(fact, expr=expr, length=length, deps=frozenset(), whole=None, ahead=frozenset())


def _repeated(fact: Fact, expr: Value) -> tuple[tuple[Atom, ...], ...]:
    """The axes: an atom of which the closed form does not speak repeats one entry."""
    spoken = {k for k in range(fact.real) if expr.has(index(k))}

    def atom(k: int, atom: Atom) -> Atom:
        return replace(atom, bcast=True) if atom.kind is Kind.FREE and k not in spoken else atom

    return tuple(tuple(map(atom, fact.flat(d), dim)) for d, dim in enumerate(fact.dims))


def _flagged(fact: Fact, axes: Axes) -> Value | None:
    """The closed form as a choice where flags are made a mask: ``(1 - mask) * -1e9`` is 0 or -1e9.

    That is what makes it a mask: of other integers it might undo one that it is added to, or be rounded.
    """
    expr, half = fact.expr, fact.dtype in (torch.float16, torch.bfloat16)
    if expr is None or is_boolean(expr) or not axes.flags or not fact.dtype.is_floating_point:
        return expr
    parts: list[tuple[Value, Boolean]] = []
    for value, condition in branches(expr):
        options = _options(value, axes)
        large = any(Fill.of(-abs(val)) in (Fill.NEG, Fill.NEG_INF) for val, _ in options if val.is_number)
        if not options or not (large or half) or not all(val.is_number for val, _ in options):
            parts.append((value, condition))
            continue
        _take(value, axes)
        parts += [(val, sympy.And(condition, choice)) for val, choice in options]
    return join(parts)


def _options(value: Value, axes: Axes) -> list[tuple[Value, Boolean]]:
    """What a value of at most two flags may be, and when; nothing where it is of something else."""
    leaves = sorted(value.atoms(AppliedUndef), key=str)
    names = {leaf.func.__name__ for leaf in leaves}
    return list(chosen(value, leaves)) if len(leaves) <= 2 and names <= axes.flags.keys() else []


def _take(value: Value, axes: Axes) -> None:
    """Note that flags in a value are taken for flags."""
    axes.taken.update(axes.flags[leaf.func.__name__] for leaf in value.atoms(AppliedUndef))


def _exact(fact: Fact, expr: Value, node: fx.Node, axes: Axes) -> bool:
    """True where the dtype holds the closed form without wrapping, and nothing was decided by a number that is rounded.

    Half precision is exact to 256 or 2,048 and a byte to 255: there only constants chosen by a condition stay, and in
    bytes what they hold as data.
    """
    dtype = fact.dtype
    if fact.rounded and (not dtype.is_floating_point or rounding.decides(node)) and not _decided_by_flags(expr, axes):
        return False
    if not (dtype.is_floating_point or dtype.is_complex or is_boolean(expr)) and not _is_whole(expr):
        return False
    if dtype in (torch.int32, torch.int64) and not is_boolean(expr):
        return rounding.is_exact(expr, dtype, axes.bounds)
    if dtype in (torch.bool, torch.float32, torch.float64) or dtype.is_complex or is_boolean(expr):
        return True
    values = [value for value, _ in branches(expr)]
    if dtype.is_floating_point:
        return all(value.is_number for value in values)
    return all(_in_small(value, dtype, axes) for value in values)


def _in_small(value: Value, dtype: torch.dtype, axes: Axes) -> bool:
    """True where a small integer is this value: an entry of such a tensor, or numbers for all choices of flags."""
    if isinstance(value, AppliedUndef) and rounding.is_own(value, dtype, axes.bounds):
        return True
    options = _options(value, axes)
    if not options or not all(rounding.in_range(val, dtype) for val, _ in options):
        return False
    _take(value, axes)
    return True


def _is_whole(expr: Value) -> bool:
    return all(value.is_integer for value, _ in branches(expr))


def _decided_by_flags(expr: Value, axes: Axes) -> bool:
    """A condition on sums of flags, which floats hold though they do not hold all integers."""
    names = {leaf.func.__name__ for leaf in expr.atoms(AppliedUndef)}
    if not names or not names <= axes.flags.keys() or not is_boolean(expr):
        return False
    if not rounding.is_decided(expr, dict.fromkeys(names, 1)):
        return False
    _take(expr, axes)
    return True


def _as_held(expr: Value, dtype: torch.dtype) -> Value:
    """The closed form with its numbers rounded to a dtype.

    What the dtype does not hold becomes an infinity, if that is so of all very negative numbers: where one of them is
    held, the others are as very negative as that one.
    """

    def held(value: Value) -> Value:
        if not value.is_number or not value.is_real:
            return value
        return constant(torch.tensor(float(value), dtype=dtype).item()) or value

    parts = branches(expr)
    rounded = [held(value) for value, _ in parts]
    if is_boolean(expr) or rounded == [value for value, _ in parts]:
        return expr
    if any(Fill.of(value) is Fill.NEG for value in rounded):
        rounded = [value if new.is_infinite else new for new, (value, _) in zip(rounded, parts, strict=True)]
    return join((value, condition) for value, (_, condition) in zip(rounded, parts, strict=True)) or expr


def _is_large(expr: Value, fill: Fill | None) -> bool:
    """True where numbers stand in a form that are as large as what masks are filled with, and are not known as that."""
    return any(Fill.of(value) not in (fill, Fill.NEG_INF) for value in extremes(expr))


def _rounds(fact: Fact, expr: Value, axes: Axes) -> bool:
    floats = fact.dtype in (torch.float32, torch.float64)
    return fact.rounded or (floats and not rounding.is_exact(expr, fact.dtype, axes.bounds))


def _place_in_batch(fact: Fact, expr: Value, node: fx.Node) -> Cause | None:
    """A closed form that speaks of the index along the batch itself, not only of what is stored there."""
    places = {index(k) for k, a in enumerate(fact.atoms) if a.kind is Kind.BATCH and a.size != 1}
    bare = expr.replace(lambda e: isinstance(e, AppliedUndef), lambda e: sympy.Dummy())
    if not places & bare.free_symbols:
        return None
    return Cause(node.name, "a value differs by the place in the batch", errors.MixesBatch)


def leaf_of(node: fx.Node, fact: Fact) -> Value:
    """The leaf function of a value, at its own indices."""
    function = sympy.Function(leaf_name(node.name), integer=True)
    return function(*(index(k) if atom.size != 1 else sympy.Integer(0) for k, atom in enumerate(fact.atoms)))


def leaf_value(node: fx.Node, fact: Fact) -> Value:
    """The form of a value that is its own leaf."""
    leaf = leaf_of(node, fact)
    return sympy.Ne(leaf, 0) if fact.dtype is torch.bool else leaf
