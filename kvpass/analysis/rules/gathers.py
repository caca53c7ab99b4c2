"""Look-ups by index tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

from kvpass import errors
from kvpass.analysis.expressions import Value, substitute
from kvpass.analysis.facts import Kind
from kvpass.analysis.scope import Dims, Label, Operand, Parts, symbol
from kvpass.analysis.table import Op, Out, expression, name_of, reads_rows, row_of, rule

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(op: Op) -> Out:
    table, ids = op.operands[:2]
    parts = op.gather()
    parts.raw = op.raw(table)
    _plain_table(op, parts, table, 0, ids)
    return Out([*ids.dims, list(table.dims[1])], parts, ids.ghosts)


@rule(aten.index_select.default)
def index_select(op: Op) -> Out:
    x, ids = op.operands[:2]
    axis = op.args[1] % len(x.dims)
    parts = op.gather()
    parts.raw = op.raw(x)
    _plain_table(op, parts, x, axis, ids)
    return Out([*x.dims[:axis], *ids.dims, *x.dims[axis + 1 :]], parts, x.ghosts + ids.ghosts)


def _plain_table(op: Op, parts: Parts, x: Operand, axis: int, ids: Operand) -> None:
    """An axis that is indexed by data must not be the sequence or the batch."""
    for label in x.dims[axis]:
        _lose(op, parts, label, x, wraps=False)
        _judge_where_read(op, parts, label, expression(ids, op.scope))
        x.everything.add(label)


def _lose(op: Op, parts: Parts, label: Label, x: Operand, wraps: bool = True) -> None:
    """An unknown entry of ``x`` along ``label`` is read; a negative index that ``wraps`` is counted from the end."""
    atom = op.scope.atoms[label]
    if atom.kind is Kind.SEQ:
        why = f"{name_of(op.node)} reads the sequence at a row that is not known"
        used = {d for d in parts.deps if op.scope.representative(d) == label}
        parts.deps -= used
        parts.whole = parts.whole or (op.cause(why) if used else None)
        if wraps or used or atom.start.has(op.scope.axes.seq):
            parts.length = parts.length or op.cause(why, errors.DependsOnLength)
    if atom.kind is Kind.BATCH and atom.size != 1:
        cause = op.cause(f"{name_of(op.node)} reads other sequences of the batch", errors.MixesBatch)
        if x.fact.of_context():
            parts.together = parts.together or cause
        else:
            parts.batch = parts.batch or cause


def _judge_where_read(op: Op, parts: Parts, label: Label, place: Value | None) -> None:
    """An entry that is read at ``place`` means something where that one does; a row is not made of others' entries."""
    scope = op.scope
    rows = [y for x in op.operands for y in scope.expanded(x.labels) if scope.atoms[y].kind is Kind.SEQ and y != label]
    own = place is not None and any(
        sympy.expand(row_of(scope, y) - scope.atoms[label].start - place) == 0 for y in rows
    )
    if place is None or (rows and not own and scope.atoms[label].kind is Kind.SEQ):
        reads_rows(op, parts, [label])
    else:
        parts.valid = op.scope.resolve(parts.valid).xreplace({symbol(label): place})


@rule(aten.gather.default)
def gather(op: Op) -> Out:
    x, ids = op.operands[:2]
    axis = op.args[1] % max(len(x.dims), 1)
    parts = op.gather()
    parts.raw = op.raw(x)
    _plain_table(op, parts, x, axis, ids)
    dims: Dims = []
    for k, mine in enumerate(ids.dims):
        if k == axis or op.scope.size(mine) == 1 or op.scope.size(mine) != op.scope.size(x.dims[k]):
            if k != axis:
                for label in x.dims[k]:
                    _lose(op, parts, label, x)
                op.scope.differ(mine)
            dims.append(list(mine))
        else:
            dims.append(op.scope.pair(list(mine), x.dims[k], [ids], x))
    return Out(dims, parts, op.scope.merge_ghosts(x.ghosts + ids.ghosts))


@rule(
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter.reduce,
    aten.scatter.value_reduce,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
)
def scatter(op: Op) -> Out:
    """``x`` with entries along one axis replaced, or added to, at places that are data."""
    x, ids = op.operands[:2]
    axis, scope = op.args[1] % max(len(x.dims), 1), op.scope
    parts = op.gather()
    parts.large = parts.large or op.names_large()
    for operand in op.operands:
        for label in operand.dims[axis]:
            _lose(op, parts, label, operand)
            _judge_where_read(op, parts, label, None)
            operand.everything.add(label)
        scope.differ(operand.dims[axis])
    dims: Dims = []
    for k in range(len(x.dims)):
        given = [(operand, operand.dims[k]) for operand in op.operands]
        if k != axis and any(scope.size(dim) != scope.size(ids.dims[k]) for _, dim in given):
            raise errors.UnsupportedShape(detail=f"{name_of(op.node)} writes into a part of the entries of axis {k}")
        dims.append(list(x.dims[k]) if k == axis else scope.broadcast_axis(given, []))
    return Out(dims, parts, scope.merge_ghosts([label for operand in op.operands for label in operand.ghosts]))


@rule(aten.index.Tensor)
def index(op: Op) -> Out:
    """``x[i0, i1, ..]``. An index in closed form that walks along an axis of ``x`` keeps that axis' meaning."""
    x = op.operands[0]
    places: list[tuple[int, Operand]] = [(d, i) for d, i in enumerate(op.args[1]) if i is not None]
    if any(i.fact.dtype is torch.bool for _, i in places):
        raise errors.UnknownOp(detail="aten.index.Tensor with a boolean mask (a shape that depends on data)")
    scope, parts = op.scope, op.gather()
    parts.raw = op.raw(x)
    indices = [i for _, i in places]
    picked, ghosts = scope.broadcast(indices)
    reading: dict[sympy.Basic, Value] = {}
    parts.batch = None  # what the indices know of the place in the batch is judged axis by axis
    for axis, ids in places:
        if not _read_axis(op, parts, x, axis, ids, reading):
            parts.batch = parts.batch or ids.fact.batch
    parts.batch = parts.batch or x.fact.batch
    axes = [d for d, _ in places]
    dims = list(x.dims)
    adjacent = axes == list(range(axes[0], axes[-1] + 1))
    rest = [d for k, d in enumerate(dims) if k not in axes]
    result = [*rest[: axes[0]], *picked, *rest[axes[0] :]] if adjacent else [*picked, *rest]
    value = expression(x, scope)
    if value is not None and value.free_symbols <= set(reading) | {symbol(y) for d in rest for y in d}:
        parts.expr = substitute(value, reading)
    return Out(result, parts, scope.merge_ghosts(ghosts + x.ghosts))


def _read_axis(op: Op, parts: Parts, x: Operand, axis: int, ids: Operand, reading: dict[sympy.Basic, Value]) -> bool:
    """Say what reading ``x`` along one axis at ``ids`` depends on; True where it is the batch axis again."""
    scope = op.scope
    value = expression(ids, scope)
    labels = list(x.dims[axis])
    x.everything |= set(labels)
    if scope.size(labels) == 1:
        reading.update({symbol(label): sympy.Integer(0) for label in labels})
        return True  # there is one entry, whatever the index
    if value is not None:
        value = scope.resolve(value)
    if value is None or len(labels) != 1 or not value.is_nonnegative:  # a negative index wraps around
        for label in labels:
            _lose(op, parts, label, x)
            _judge_where_read(op, parts, label, value if len(labels) == 1 else None)
        return False
    (label,) = labels
    reading[symbol(label)] = value
    _judge_where_read(op, parts, label, value)
    atom = scope.atoms[label]
    if atom.kind is Kind.BATCH:
        return _read_batch(op, parts, label, value, x)
    if atom.kind is Kind.SEQ:
        _read_rows(op, parts, label, value, ids, x)
    return False


def _read_batch(op: Op, parts: Parts, label: Label, value: Value, x: Operand) -> bool:
    """``x[arange(B)]`` is the batch axis again."""
    for other, atom in list(op.scope.atoms.items()):
        if value == symbol(other) and atom.size == op.scope.atoms[label].size:
            op.scope.atoms[other] = op.scope.atoms[label]
            return True
    _lose(op, parts, label, x)
    return False


def _read_rows(op: Op, parts: Parts, label: Label, value: Value, ids: Operand, x: Operand) -> None:
    """Row ``start + value`` is read: find the result's row that is no earlier."""
    scope = op.scope
    row = scope.atoms[label].start + value
    used = {d for d in parts.deps if scope.representative(d) == label}
    for other in ids.labels:
        other = scope.representative(other)
        atom = scope.atoms[other]
        if atom.kind is Kind.SEQ and sympy.expand(atom.start + symbol(other) - row).is_nonnegative:
            parts.deps -= used
            parts.deps |= {other} if used else set()
            return
    if row == -scope.axes.lead:
        parts.deps -= used
        return
    _lose(op, parts, label, x, wraps=False)


@rule(aten.one_hot.default)
def one_hot(op: Op) -> Any:
    x = op.operands[0]
    return Out([*x.dims, op.scope.fresh(op.shape[-1])], replace(op.gather(), raw=frozenset()), x.ghosts)
