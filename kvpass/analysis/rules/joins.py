"""Joins: entries of several tensors behind each other, on one axis."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from kvpass import errors
from kvpass.analysis.expressions import Value, boolean, branches, compare, join, number, simplify
from kvpass.analysis.facts import MASKS, NEGATIVE, ZERO, Atom, Expr, Fill, Kind
from kvpass.analysis.scope import Dims, Label, Operand, Parts, Scope, symbol
from kvpass.analysis.table import Op, Out, expression, lowest, reads_rows, row_labels, rule

aten = torch.ops.aten
_MOST_BRANCHES = 8


@rule(aten.cat.default, aten.concat.default)
def cat(op: Op) -> Out:
    pieces = [x for x in op.operands if not (len(x.dims) == 1 and x.fact.shape() == (0,))]
    axis = op.arg(1, "dim", 0) % len(pieces[0].dims)
    return join_along(op, pieces, axis, [op.scope.size(x.dims[axis]) for x in pieces])


@rule(aten.stack.default)
def stack(op: Op) -> Out:
    axis = op.arg(1, "dim", 0) % (len(op.operands[0].dims) + 1)
    for x in op.operands:
        x.dims.insert(axis, [])
    return join_along(op, op.operands, axis, [sympy.Integer(1)] * len(op.operands))


def join_along(op: Op, pieces: list[Operand], axis: int, sizes: list[Expr]) -> Out:
    scope, parts = op.scope, op.gather()
    ghosts = scope.merge_ghosts([label for x in pieces for label in x.ghosts])
    dims: Dims = []
    for k in range(len(pieces[0].dims)):
        dims.append([] if k == axis else scope.broadcast_axis([(x, x.dims[k]) for x in pieces], ghosts))
    total = sympy.Add(*sizes)
    if any(scope.atoms[k].kind is Kind.BATCH and scope.atoms[k].size != 1 for x in pieces for k in x.dims[axis]):
        parts.batch = parts.batch or op.cause("sequences of the batch are put behind others", errors.MixesBatch)
    (new,) = scope.fresh(total) or [scope.new(Atom(Kind.FREE, total))]
    rows = scope.atoms[new].kind is Kind.SEQ
    offsets = [sympy.Add(*sizes[:k]) for k in range(len(sizes))]
    if rows:
        _shift_rows(op, parts, pieces, axis, offsets, new)
    parts.expr = _piecewise(op, pieces, axis, offsets, symbol(new))
    parts.support, parts.fill, parts.low = _filled(op, pieces, axis, offsets, symbol(new))
    dims[axis] = [new]
    return Out(dims, parts, ghosts)


def _shift_rows(op: Op, parts: Parts, pieces: list[Operand], axis: int, offsets: list[Expr], new: Label) -> None:
    """Entry ``k`` of the result is entry ``k - offset`` of a piece: the result's first row must bound them all."""
    scope, first = op.scope, -op.scope.axes.lead
    if _prefixed(op, pieces, axis, offsets, new):
        return
    scope.full.add(new)
    for x, offset in zip(pieces, offsets, strict=True):
        x.everything |= set(x.dims[axis])
        reads_rows(op, parts, row_labels(scope, x.dims[axis]))
        for label in x.dims[axis]:
            if scope.atoms[label].kind is not Kind.SEQ:
                continue
            first = sympy.Max(first, scope.atoms[label].start - offset)
            moved = {d for d in parts.deps if scope.representative(d) == label}
            if moved:
                parts.deps = (parts.deps - moved) | {new}
    scope.atoms[new] = replace(scope.atoms[new], start=first)
    for offset in offsets:
        moves_with_the_length(op, parts, first + offset)


def _prefixed(op: Op, pieces: list[Operand], axis: int, offsets: list[Expr], new: Label) -> bool:
    """All rows, after what depends on no row: the entries before them are rows before the first."""
    scope, (*before, last) = op.scope, [x.dims[axis] for x in pieces]
    if (
        scope.axes.lead == 0
        or offsets[-1] != scope.axes.lead
        or len(last) != 1
        or not _of_no_row(scope, pieces[:-1], axis)
    ):
        return False
    atom = scope.atoms[last[0]]
    if any(scope.atoms[label].kind is Kind.SEQ for dim in before for label in dim):
        return False
    if (atom.kind, atom.start, atom.size) != (Kind.SEQ, ZERO, scope.axes.seq) or any(x.fact.whole for x in pieces):
        return False
    for x in pieces[:-1]:
        x.everything |= set(x.dims[axis])
    scope.same[last[0]] = new
    scope.subst[symbol(last[0])] = symbol(new) - scope.axes.lead
    return True


def _of_no_row(scope: Scope, pieces: list[Operand], axis: int) -> bool:
    """True of pieces that depend on no row but on those of their other axes."""
    others = [{label for k, dim in enumerate(x.dims) if k != axis for label in dim} for x in pieces]
    return all(scope.deps(x) <= beside for x, beside in zip(pieces, others, strict=True))


def moves_with_the_length(op: Op, parts: Parts, first: Expr) -> None:
    """What begins at a row counted from the end, before the end, is elsewhere when the text has grown."""
    if first.has(op.scope.axes.seq) and not (first - op.scope.axes.seq).is_nonnegative:
        why = f"{op.node.target} puts something at row {first}, which moves when the text grows"
        parts.length = parts.length or op.cause(why, errors.DependsOnLength)


def _piecewise(op: Op, pieces: list[Operand], axis: int, offsets: list[Expr], place: sympy.Symbol) -> Value | None:
    """The closed form of a concatenation, where every piece has one."""
    parts: list[tuple[Value, Any]] = []
    for k, (x, offset) in enumerate(zip(pieces, offsets, strict=True)):
        value = expression(x, op.scope)
        if value is None or len(x.dims[axis]) > 1:
            return None
        here = {symbol(label): place - offset for label in x.dims[axis]}
        value, inside = number(value).xreplace(here), _inside(offsets, k, place)
        parts += [(val, simplify(sympy.And(inside, cond))) for val, cond in branches(value)]
    if len(parts) > _MOST_BRANCHES:
        return None
    if op.dtypes[0] is torch.bool:
        return simplify(sympy.Or(*(sympy.And(boolean(value), cond) for value, cond in parts)))
    return join(parts)


def _inside(offsets: list[Expr], k: int, place: sympy.Symbol) -> Boolean:
    """Where entries are those of piece ``k``."""
    last = compare("lt", place, offsets[k + 1]) if k + 1 < len(offsets) else sympy.true
    return sympy.And(compare("ge", place, offsets[k]), last)


def _filled(
    op: Op, pieces: list[Operand], axis: int, offsets: list[Expr], place: sympy.Symbol
) -> tuple[Boolean, Fill | None, float]:
    """Support, fill and lowest number of a concatenation: pieces without a fill hold nothing but ordinary entries."""
    known = [op.known(x) for x in pieces]
    fills = {k[1] for k in known if k is not None}
    if not fills or not (len(fills) == 1 or fills <= set(MASKS)) or len(pieces) > _MOST_BRANCHES:
        return sympy.true, None, NEGATIVE
    kept, low = [], -math.inf
    for k, (x, found) in enumerate(zip(pieces, known, strict=True)):
        support, fill = found or (sympy.true, None)
        here = {symbol(label): place - offsets[k] for label in x.dims[axis]}
        if len(x.dims[axis]) > 1 and support.free_symbols & here.keys():
            return sympy.true, None, NEGATIVE
        kept.append(support.xreplace(here))
        if fill is Fill.NEG:
            low = max(low, x.fact.low if x.fact.expr is None else lowest(x.fact.expr))
    fill = Fill.NEG if Fill.NEG in fills else next(iter(fills))
    low = low if fill is Fill.NEG else NEGATIVE
    if len(set(kept)) == 1:
        return kept[0], fill, low
    parts = (sympy.And(_inside(offsets, k, place), support) for k, support in enumerate(kept))
    return simplify(sympy.Or(*parts)), fill, low
