"""Ops that only rename, reorder, cut or repeat entries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

from kvpass import errors
from kvpass.analysis import shifts
from kvpass.analysis.expressions import apply, compare, join, number, simplify
from kvpass.analysis.facts import ZERO, Atom, Expr, Fill, Kind, Shift
from kvpass.analysis.rules.joins import moves_with_the_length
from kvpass.analysis.scope import Dims, Label, Operand, quotient, symbol
from kvpass.analysis.table import Op, Out, expression, reads_rows, rule

aten = torch.ops.aten


def _same(op: Op, dims: Dims, ghosts: list[Label] | None = None) -> Out:
    """The operand's entries, under other axes."""
    x, parts = op.operands[0], op.gather(numbers=False)
    parts.expr = expression(x, op.scope)
    parts.shift = shifts.opened(op.scope, x)
    known = op.known(x)
    if known is not None:
        parts.support, parts.fill = known
    parts.low, parts.lowered = x.fact.low, False
    return Out(dims, parts, x.ghosts if ghosts is None else ghosts)


def _forget(out: Out) -> None:
    """Other entries than the operand's: what was known of those is not known of these."""
    out.parts.lowered = out.parts.lowered or out.parts.fill is Fill.NEG
    out.parts.expr, out.parts.support, out.parts.fill, out.parts.shift = None, sympy.true, None, Shift()


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints)
def view(op: Op) -> Out:
    x = op.operands[0]
    dims, ghosts = regroup(op, [label for dim in x.dims for label in dim], op.shape)
    return _same(op, dims, x.ghosts + ghosts)


def regroup(op: Op, labels: list[Label], shape: tuple[Expr, ...]) -> tuple[Dims, list[Label]]:
    """Row-major atoms dealt out to axes of the given sizes; FREE atoms are split as needed."""
    scope, todo, dims = op.scope, list(labels), []
    for size in shape:
        dim: list[Label] = []
        left: Expr = size
        while left != 1 or (not dim and todo and scope.atoms[todo[0]].size == 1 and size == 1):
            if not todo:
                raise errors.UnsupportedShape(detail=f"the view to {shape} splits the sequence or the batch axis")
            label = todo.pop(0)
            rest = quotient(left, scope.atoms[label].size)
            if rest is None:
                label, rest = _split_for(op, label, left, todo)
            dim.append(label)
            left = rest
        dims.append(dim)
    return dims, [label for label in todo if scope.atoms[label].kind is Kind.SEQ]


def _split_for(op: Op, label: Label, left: Expr, todo: list[Label]) -> tuple[Label, Expr]:
    inner = quotient(op.scope.atoms[label].size, left)
    if inner is None or op.scope.atoms[label].kind is not Kind.FREE:
        raise errors.UnsupportedShape(detail=f"a view splits the axis of {op.scope.atoms[label]} entries")
    outer, tail = op.scope.split(label, inner)
    todo.insert(0, tail)
    return outer, sympy.Integer(1)


@rule(aten.transpose.int)
def transpose(op: Op) -> Out:
    dims = list(op.operands[0].dims)
    a, b = op.args[1], op.args[2]
    dims[a], dims[b] = dims[b], dims[a]
    return _same(op, dims)


@rule(aten.t.default, aten.numpy_T.default, aten.mT.default)
def t(op: Op) -> Out:
    dims = list(op.operands[0].dims)
    return _same(op, [*dims[:-2], *reversed(dims[-2:])])


@rule(aten.permute.default)
def permute(op: Op) -> Out:
    return _same(op, [op.operands[0].dims[d] for d in op.args[1]])


def _dims(value: Any, rank: int) -> list[int]:
    return [d % rank for d in (value if isinstance(value, (list, tuple)) else [value])]


@rule(aten.movedim.int, aten.movedim.intlist)
def movedim(op: Op) -> Out:
    x = op.operands[0]
    rank = len(x.dims)
    source, target = _dims(op.args[1], rank), _dims(op.args[2], rank)
    order = [d for d in range(rank) if d not in source]
    for there, here in sorted(zip(target, source, strict=True)):
        order.insert(there, here)
    return _same(op, [x.dims[d] for d in order])


@rule(aten.unsqueeze.default)
def unsqueeze(op: Op) -> Out:
    dims: Dims = list(op.operands[0].dims)
    axis = op.args[1] % (len(dims) + 1)
    return _same(op, [*dims[:axis], [], *dims[axis:]])


@rule(aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims)
def squeeze(op: Op) -> Out:
    x, scope = op.operands[0], op.scope
    rank = len(x.dims)
    wanted = op.arg(1, "dim", list(range(rank)))
    axes = {d % rank for d in (wanted if isinstance(wanted, (list, tuple)) else [wanted])}
    gone = [d for d in axes if scope.size(x.dims[d]) == 1]
    ghosts = [label for d in gone for label in x.dims[d] if scope.atoms[label].kind is Kind.SEQ]
    for d in gone:
        _at_zero(op, [label for label in x.dims[d] if label not in ghosts])
    return _same(op, [dim for d, dim in enumerate(x.dims) if d not in gone], x.ghosts + ghosts)


def _at_zero(op: Op, labels: list[Label]) -> None:
    for label in labels:
        op.scope.subst.setdefault(symbol(label), ZERO)


@rule(aten.expand.default, aten.broadcast_to.default)
def expand(op: Op) -> Out:
    x, scope, shape = op.operands[0], op.scope, op.shape
    lead = len(shape) - len(x.dims)
    dims: Dims = [scope.fresh(size, bcast=True) for size in shape[:lead]]
    ghosts = list(x.ghosts)
    for dim, size in zip(x.dims, shape[lead:], strict=True):
        if scope.size(dim) == size:
            dims.append(list(dim))
            continue
        ghosts += [label for label in dim if scope.atoms[label].kind is Kind.SEQ]
        _at_zero(op, [label for label in dim if scope.atoms[label].kind is not Kind.SEQ])
        dims.append(scope.fresh(size, bcast=True))
    return _same(op, dims, ghosts)


@rule(aten.broadcast_tensors.default)
def broadcast_tensors(op: Op) -> list[Out]:
    dims, ghosts = op.scope.broadcast(op.operands)
    return [Out([list(dim) for dim in dims], op.scope.gather([x]), list(ghosts)) for x in op.operands]


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(op: Op) -> Out:
    x, scope, axis, count = op.operands[0], op.scope, op.arg(2, "dim"), sympy.sympify(op.args[1])
    if not count.is_Integer:
        raise errors.UnsupportedShape(detail=f"repeat_interleave with a count of {count}")
    if axis is None:
        dims: Dims = [[label for dim in x.dims for label in dim]]
        axis = 0
    else:
        dims, axis = [list(dim) for dim in x.dims], axis % len(x.dims)
    _only_free(op, dims[axis], "repeat_interleave")
    dims[axis] = dims[axis] + scope.fresh(count, bcast=True)
    return _same(op, dims)


@rule(aten.repeat.default, aten.tile.default)
def repeat(op: Op) -> Out:
    x, scope, times = op.operands[0], op.scope, list(op.args[1])
    times = [1] * (len(x.dims) - len(times)) + times
    dims: Dims = [[] for _ in range(len(times) - len(x.dims))] + [list(dim) for dim in x.dims]
    ghosts = list(x.ghosts)
    for axis, count in enumerate(times):
        if count == 1:
            continue
        ghosts += [y for y in dims[axis] if scope.atoms[y].size == 1 and scope.atoms[y].kind is Kind.SEQ]
        _at_zero(op, [y for y in dims[axis] if scope.atoms[y].size == 1 and scope.atoms[y].kind is not Kind.SEQ])
        kept = [label for label in dims[axis] if scope.atoms[label].size != 1]
        dims[axis] = scope.fresh(sympy.sympify(count), bcast=True) + kept
    return _same(op, dims, ghosts)


def _only_free(op: Op, labels: list[Label], what: str) -> None:
    if any(op.scope.atoms[label].kind is not Kind.FREE for label in labels):
        raise errors.UnsupportedShape(detail=f"{what} repeats the sequence or the batch axis")


def _coarse(op: Op, labels: list[Label]) -> list[Label]:
    """One label for an axis: several FREE atoms become one of their product, and lose their closed form."""
    if len(labels) <= 1:
        return labels
    _only_free(op, labels, "a slice")
    return [op.scope.new(Atom(Kind.FREE, op.scope.size(labels)))]


@rule(aten.slice.Tensor)
def slice_(op: Op) -> Out:
    x, scope = op.operands[0], op.scope
    axis = op.arg(1, "dim", 0) % len(x.dims)
    before, after = scope.size(x.dims[axis]), op.shape[axis]
    if before == after:
        return _same(op, x.dims)
    start, step = _start(op, before, after), op.arg(4, "step", 1)
    coarse = _coarse(op, x.dims[axis])
    out = _same(op, x.dims)
    if coarse != x.dims[axis]:
        _forget(out)
        out.dims = [*x.dims[:axis], scope.fresh(after), *x.dims[axis + 1 :]]
        return out
    (label,) = coarse
    _counted_from_the_end(op, out, label, start)
    new = _sliced(op, x, label, start, after, step)
    out.parts.shift = out.parts.shift.renamed(label, new)
    if after == 1 and scope.atoms[new].kind is not Kind.SEQ:
        _at_zero(op, [new])
        out.dims = [*x.dims[:axis], [], *x.dims[axis + 1 :]]
    else:
        out.dims = [*x.dims[:axis], [new], *x.dims[axis + 1 :]]
    return out


def _counted_from_the_end(op: Op, out: Out, label: Label, start: Expr) -> None:
    """A table that is no sequence, read at a place that moves with the number of rows, or of texts."""
    scope, parts = op.scope, out.parts
    of_rows = scope.atoms[label].kind is Kind.SEQ and label in scope.deps(op.operands[0])
    if not of_rows and start.has(scope.axes.seq):
        why = f"{op.node.target} reads a table at {start}, which moves when the text grows"
        level = parts.shift.affine if parts.length is None else parts.shift.level & parts.shift.affine
        parts.shift = Shift(parts.shift.affine, level & {label})
        parts.length = parts.length or op.cause(why, errors.DependsOnLength)
    op.counts_texts(parts, start)


def _start(op: Op, before: Expr, after: Expr) -> Expr:
    start = op.arg(2, "start") or 0
    start = sympy.sympify(start)
    step, counted = op.arg(4, "step", 1), start.is_negative or start.is_nonnegative is None
    if step != 1 and counted:
        if not (before + start).is_number:
            raise errors.UnsupportedShape(detail=f"a slice by steps of {step} from {start}")
        return sympy.Max(before + start, 0) if start.is_negative else start
    if start.is_negative or (start.is_nonnegative is None and not start.has(op.scope.axes.seq)):
        return before - after if op.arg(3, "end") in (None, 9223372036854775807) else before + start
    return start


def _sliced(op: Op, x: Operand, label: Label, start: Expr, size: Expr, step: Any) -> Label:
    """The label of entries ``start, start + step, ..``; links and closed forms follow."""
    scope, atom = op.scope, op.scope.atoms[label]
    if atom.kind is Kind.BATCH:
        op.scope.batch = scope.batch or op.cause("the batch is sliced", errors.MixesBatch)
    if atom.kind is Kind.SEQ and step != 1:
        raise errors.UnsupportedShape(detail="the sequence is sliced with a step")
    kind = atom.kind if atom.kind is not Kind.FREE else scope.axes.kind(size)
    first = atom.start + start if atom.kind is Kind.SEQ else scope.axes.start(size) if kind is Kind.SEQ else ZERO
    new = scope.new(replace(atom, kind=kind, size=size, start=first))
    if kind is Kind.SEQ and atom.kind is Kind.FREE:
        scope.full.add(new)
    scope.subst[symbol(label)] = start + sympy.sympify(step) * symbol(new)
    if atom.kind is Kind.SEQ:
        scope.same[label] = new
        if not _is_tail(op, scope.atoms[new]) and not _keeps_rows(op, atom, scope.atoms[new]):
            x.everything.add(label)
            scope.full.add(new)
    return new


def _keeps_rows(op: Op, before: Atom, after: Atom) -> bool:
    """All rows, or all but the last ones; without a prefix before them, which no row of the text can be new in."""
    if after.start == before.start:
        return bool(after.start == 0 and after.size.has(op.scope.axes.seq))
    rows = (ZERO, op.scope.axes.seq)
    return bool(before.start == -op.scope.axes.lead and (after.start, after.size) == rows)


def _is_tail(op: Op, atom: Atom) -> bool:
    """The last ``k`` rows, for a ``k`` that is no length: always among the new ones."""
    return bool(not atom.grows and atom.start + atom.size == op.scope.axes.seq)


@rule(aten.select.int)
def select(op: Op) -> Out:
    x, scope = op.operands[0], op.scope
    axis = op.args[1] % len(x.dims)
    labels, place = x.dims[axis], sympy.sympify(op.args[2])
    dims = [dim for d, dim in enumerate(x.dims) if d != axis]
    size = scope.size(labels)
    if place.is_negative:
        place = size + place
    if size == 1:
        rows = [label for label in labels if scope.atoms[label].kind is Kind.SEQ]
        _at_zero(op, [label for label in labels if label not in rows])
        return _same(op, dims, x.ghosts + rows)
    coarse = _coarse(op, labels)
    out = _same(op, dims)
    if coarse != labels:
        _forget(out)
        return out
    (label,) = coarse
    _counted_from_the_end(op, out, label, place)
    if scope.atoms[label].kind is Kind.SEQ:
        if label in scope.deps(x) or not place.is_Integer:
            out.ghosts = [*x.ghosts, _sliced(op, x, label, place, sympy.Integer(1), 1)]
            return out
        x.everything.add(label)  # of a table that holds nothing of a row
    if scope.atoms[label].kind is Kind.BATCH:
        scope.batch = scope.batch or op.cause("one sequence of the batch is selected", errors.MixesBatch)
    scope.subst[symbol(label)] = place
    return out


@rule(aten.diff.default)
def diff(op: Op) -> Out:
    """``x[k] - x[k-1]``, with the entry before the first one taken from ``prepend``."""
    x, scope = op.operands[0], op.scope
    axis = op.arg(2, "dim", -1) % len(x.dims)
    prepend = op.arg(3, "prepend")
    if op.arg(1, "n", 1) != 1 or prepend is None or op.arg(4, "append") is not None or len(x.dims[axis]) != 1:
        raise errors.UnknownOp(detail="aten.diff without a prepended entry")
    (label,) = x.dims[axis]
    parts = op.gather()
    for operand in op.operands:
        operand.everything |= set(operand.dims[axis])
    least = -scope.axes.lead
    before = [y for y in prepend.dims[axis] if scope.atoms[y].kind is Kind.SEQ and scope.atoms[y].start == least]
    moved = {label, *before}  # the first row is bounded by every row
    parts.deps = {d for d in parts.deps if scope.representative(d) not in moved} | (
        {label} if scope.deps(x) or scope.deps(prepend) else set()
    )
    scope.full.add(label)
    scope.differ([label])
    dims = [
        dim if k == axis else scope.broadcast_axis([(x, x.dims[k]), (prepend, prepend.dims[k])], [])
        for k, dim in enumerate(x.dims)
    ]
    value, given = expression(x, scope), expression(prepend, scope)
    if value is not None and given is not None:
        k = symbol(label)
        zero = {k: ZERO} | {symbol(y): ZERO for y in prepend.dims[axis]}
        first = apply(lambda a, b: a - b, value.xreplace({k: ZERO}), given.xreplace(zero))
        later = apply(lambda a, b: sympy.expand(a - b), value, value.xreplace({k: k - 1}))
        if first is not None and later is not None:
            parts.expr = join([(sympy.expand(first), sympy.Eq(k, 0)), (sympy.expand(later), sympy.Ne(k, 0))])
    return Out(dims, parts, x.ghosts)


@rule(aten.tril.default)
def tril(op: Op) -> Out:
    return _triangle(op, lambda i, j, diagonal: compare("le", j, i + diagonal))


@rule(aten.triu.default)
def triu(op: Op) -> Out:
    return _triangle(op, lambda i, j, diagonal: compare("ge", j, i + diagonal))


def _triangle(op: Op, keep: Any) -> Out:
    x, scope = op.operands[0], op.scope
    i, j = (symbol(dim[0]) if len(dim) == 1 else ZERO for dim in x.dims[-2:])
    if any(len(dim) > 1 for dim in x.dims[-2:]):
        raise errors.UnsupportedShape(detail="a triangle is cut from a merged axis")
    scope.differ([label for dim in x.dims[-2:] for label in dim])
    diagonal = sympy.sympify(op.arg(1, "diagonal", 0))
    kept = keep(i, j, diagonal)
    out = _same(op, x.dims)
    value = expression(x, scope)
    if value is None and diagonal.has(scope.axes.seq):
        why = f"{op.node.target} cuts at {diagonal}, which moves when the text grows"
        out.parts.length = out.parts.length or op.cause(why, errors.DependsOnLength)
    op.counts_texts(out.parts, diagonal)
    if value is not None:
        if op.dtypes[0] is torch.bool:
            out.parts.expr = simplify(sympy.And(value, kept))
        else:
            out.parts.expr = apply(lambda a, c: a if c == 1 else ZERO, value, number(kept))
    old, out.parts.shift = (out.parts.support, out.parts.fill), Shift()
    out.parts.support, out.parts.fill = (sympy.And(kept, old[0]) if old[1] is Fill.ZERO else kept), Fill.ZERO
    return out


@rule(aten.view_as_complex.default)
def view_as_complex(op: Op) -> Out:
    out = _same(op, op.operands[0].dims[:-1])
    _forget(out)
    return out


@rule(aten.view_as_real.default)
def view_as_real(op: Op) -> Out:
    out = _same(op, [*op.operands[0].dims, op.scope.fresh(sympy.Integer(2))])
    _forget(out)
    return out


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(op: Op) -> Out:
    """Entries before and after. Entry ``k`` of a padded row axis is entry ``k - before`` of the operand."""
    x, scope, amounts = op.operands[0], op.scope, list(op.args[1])
    if op.node.target is aten.pad.default and op.arg(2, "mode", "constant") != "constant":
        raise errors.UnknownOp(detail=f"aten.pad.default with mode {op.arg(2, 'mode')}")
    for amount in amounts:
        if isinstance(amount, sympy.Basic) and not amount.is_number:
            raise errors.UnsupportedShape(
                detail=f"the sequence is padded by {amount} rows, which depends on its length"
            )
    dims: Dims = [list(dim) for dim in x.dims]
    out = _same(op, list(dims))
    out.parts.raw = op.raw(x)
    for k in range(len(amounts) // 2):
        axis, before = len(dims) - 1 - k, amounts[2 * k]
        if before == 0 and amounts[2 * k + 1] == 0:
            continue
        rows = [label for label in dims[axis] if scope.atoms[label].kind is Kind.SEQ]
        if rows:
            if before != 0:
                reads_rows(op, out.parts, rows)
            out.dims[axis] = [_padded_rows(op, x, dims[axis], before, op.shape[axis])]
            if amounts[2 * k + 1] > 0:
                (new,) = out.dims[axis]
                last = scope.atoms[new].start + op.shape[axis] - amounts[2 * k + 1]
                moves_with_the_length(op, out.parts, last)
        else:
            _only_free(op, dims[axis], "padding")
            out.dims[axis] = scope.fresh(op.shape[axis])
    _forget(out)
    return out


def _padded_rows(op: Op, x: Operand, labels: list[Label], before: Any, size: Expr) -> Label:
    if len(labels) != 1:
        raise errors.UnsupportedShape(detail="a merged axis is padded")
    (label,) = labels
    start = sympy.Max(
        op.scope.atoms[label].start - before, -op.scope.axes.lead
    )  # an earlier row is bounded by a later one
    new = op.scope.new(replace(op.scope.atoms[label], size=size, start=start))
    op.scope.same[label] = new
    op.scope.subst[symbol(label)] = symbol(new)
    x.everything.add(label)
    return new
