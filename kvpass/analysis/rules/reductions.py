"""Ops that combine the entries along some axes: reductions, normalisers, scans, sorts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from kvpass import errors
from kvpass.analysis import laws, shifts
from kvpass.analysis.expressions import boolean, implies, number, substitute
from kvpass.analysis.facts import MASKS, Fill, leaf_name
from kvpass.analysis.scope import Dims, Label, Operand, Parts, symbol
from kvpass.analysis.table import (
    Op,
    Out,
    bounding_row,
    expression,
    keeps_a_key,
    name_of,
    reads_rows,
    reduce_over,
    row_labels,
    row_of,
    rule,
)

aten = torch.ops.aten


def _axes(op: Op, dims: Any) -> list[int]:
    rank = len(op.operands[0].dims)
    if dims is None or dims == []:
        return list(range(rank))
    return [d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _reduce(op: Op, dims: Any, keepdim: bool, ignores: tuple[Fill, ...], outputs: int = 1) -> Out | list[Out]:
    x, scope = op.operands[0], op.scope
    axes = _axes(op, dims)
    gone = [label for d in axes for label in x.dims[d] if scope.atoms[label].size != 1]
    units = [label for d in axes for label in x.dims[d] if scope.atoms[label].size == 1]
    kept = [label for d, dim in enumerate(x.dims) if d not in axes for label in dim]
    ghosts = x.ghosts + row_labels(scope, units)
    outs = []
    for _ in range(outputs):
        parts = op.gather()
        known = op.known(x)
        if known is not None:
            parts.support, parts.fill = known
        if known is not None and known[1] is Fill.NEG and op.reaches(x, x.fact.low):
            op.undo(parts, x)
            known, parts.support, parts.fill = None, sympy.true, None
        if known is not None and known[1] in ignores:
            for j in row_labels(scope, gone):
                keeps_a_key(op, parts, j, bounding_row(op, j, kept + ghosts, known[0]), *known)
                parts.lowered = False
        fill = parts.fill if parts.fill in ignores else None
        reduce_over(op, parts, gone, kept + ghosts, ignores)
        parts.fill = fill if parts.fill is not None else None
        if parts.fill is None:
            parts.support = sympy.true
        result = [[] if d in axes else dim for d, dim in enumerate(x.dims) if keepdim or d not in axes]
        outs.append(Out(result, parts, list(ghosts)))
    return outs[0] if outputs == 1 else outs


@rule(aten.sum.dim_IntList)
def sum_dim(op: Op) -> Any:
    return _reduce(op, op.arg(1, "dim"), bool(op.arg(2, "keepdim", False)), (Fill.ZERO,))


@rule(aten.sum.default)
def sum_all(op: Op) -> Any:
    return _reduce(op, None, False, (Fill.ZERO,))


@rule(aten.mean.default, aten.max.default, aten.min.default, aten.std.default, aten.var.default)
def mean_all(op: Op) -> Any:
    return _reduce(op, None, False, ())


@rule(aten.mean.dim)
def mean(op: Op) -> Any:
    return _reduce(op, op.arg(1, "dim"), bool(op.arg(2, "keepdim", False)), ())


@rule(aten.amin.default, aten.prod.dim_int, aten.argmin.default, aten.argmax.default)
def amin(op: Op) -> Any:
    return _reduce(op, op.arg(1, "dim"), bool(op.arg(2, "keepdim", False)), ())


@rule(aten.all.dim, aten.all.default)
def every(op: Op) -> Any:
    return _told_by_its_own(op, sympy.false) or _reduce(op, op.arg(1, "dim"), bool(op.arg(2, "keepdim", False)), ())


@rule(aten.any.dim, aten.any.default, aten.any.dims)
def some(op: Op) -> Any:
    told = _told_by_its_own(op, sympy.true)
    return told or _reduce(op, op.arg(1, "dim"), bool(op.arg(2, "keepdim", False)), (Fill.ZERO,))


def _told_by_its_own(op: Op, one: Boolean) -> Out | None:
    """Of entries that are ``one`` where a row meets itself at least one is, whatever the others are."""
    x, axes = op.operands[0], _axes(op, op.arg(1, "dim"))
    value, gone = expression(x, op.scope), [label for d in axes for label in x.dims[d]]
    if value is None or x.fact.rounded:
        return None
    entry = boolean(value) if one == sympy.true else sympy.Not(boolean(value))
    if not any(implies(sympy.true, own) for own in _where_a_row_meets_itself(op, entry, gone)):
        return None
    keepdim = bool(op.arg(2, "keepdim", False))
    dims = [[] if d in axes else dim for d, dim in enumerate(x.dims) if keepdim or d not in axes]
    return Out(dims, Parts(expr=one if op.dtypes[0] is torch.bool else number(one)))


def _where_a_row_meets_itself(op: Op, entry: Boolean, gone: list[Label]) -> Iterator[Boolean]:
    """A condition on entries ``i`` and ``j`` of one row, where a reduced axis has an entry ``j`` for each ``i``."""
    scope = op.scope
    for j, i in itertools.product(row_labels(scope, gone), row_labels(scope, op.operands[0].labels)):
        before = scope.atoms[i].start - scope.atoms[j].start
        behind = scope.atoms[j].size - scope.atoms[i].size - before
        there = i not in gone or scope.atoms[i].size.is_positive
        if i != j and there and sympy.expand(before).is_nonnegative and sympy.expand(behind).is_nonnegative:
            yield substitute(entry, {symbol(j): row_of(scope, i) - scope.atoms[j].start})


@rule(aten.amax.default, aten.logsumexp.default)
def amax(op: Op) -> Any:
    return _reduce(op, op.arg(1, "dim"), bool(op.arg(2, "keepdim", False)), MASKS)


@rule(aten.max.dim)
def max_dim(op: Op) -> Any:
    return _reduce(op, op.arg(1, "dim"), bool(op.arg(2, "keepdim", False)), MASKS, outputs=2)


@rule(aten.min.dim)
def min_dim(op: Op) -> Any:
    return _reduce(op, op.arg(1, "dim"), bool(op.arg(2, "keepdim", False)), (), outputs=2)


@rule(aten.var.dim, aten.std.dim, aten.var.correction, aten.std.correction)
def variance(op: Op) -> Any:
    return _reduce(op, op.arg(1, "dim"), bool(op.arg(3, "keepdim", False)), ())


@rule(aten.var_mean.dim, aten.std_mean.dim, aten.var_mean.correction, aten.std_mean.correction)
def variance_and_mean(op: Op) -> Any:
    return _reduce(op, op.arg(1, "dim"), bool(op.arg(3, "keepdim", False)), (), outputs=2)


@rule(aten.linalg_vector_norm.default)
def vector_norm(op: Op) -> Any:
    return _reduce(op, op.arg(2, "dim"), bool(op.arg(3, "keepdim", False)), _norm_ignores(op))


def _norm_ignores(op: Op) -> tuple[Fill, ...]:
    """Zeros add nothing to a norm of positive order; one of negative order is a minimum."""
    order = op.arg(1, "ord" if "ord" in op.kwargs else "p", 2)
    return (Fill.ZERO,) if order is None or order > 0 else ()


@rule(aten.norm.ScalarOpt_dim)
def norm(op: Op) -> Any:
    return _reduce(op, op.arg(2, "dim"), bool(op.arg(3, "keepdim", False)), _norm_ignores(op))


# -- same shape out -------------------------------------------------------------------------------------------------


@rule(
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default, aten._safe_softmax.default
)
def softmax(op: Op) -> Out:
    x, scope = op.operands[0], op.scope
    (axis,) = _axes(op, op.args[1])
    parts, known = op.gather(), op.known(x)
    labels = list(x.dims[axis])
    if set(labels) <= shifts.opened(scope, x).level:
        parts.length = None
    rest = [label for label in x.labels if label not in labels]
    log = "log" in name_of(op.node)
    support, fill = known if known is not None and known[1] in MASKS else (sympy.true, None)
    if fill is Fill.NEG and op.reaches(x, x.fact.low):
        op.undo(parts, x)
        support, fill = sympy.true, None
    own: list[Label | None] = []
    for j in row_labels(scope, labels) if fill is not None else ():
        own.append(bounding_row(op, j, rest, support))
        keeps_a_key(op, parts, j, own[-1], support, fill)
    _mix(op, parts, labels, rest, None if fill is None else (support, fill))
    # Where all entries are very negative none of them vanishes: each row has to have one that is not.
    vanishes = fill is Fill.NEG_INF or (fill is Fill.NEG and not log and own and None not in own)
    if vanishes and parts.whole is None:
        parts.support, parts.fill = support, Fill.NEG_INF if log else Fill.ZERO
    parts.large, parts.lowered = log and parts.large, log and parts.lowered
    parts.raw = parts.raw if log else frozenset()
    return Out(x.dims, parts, x.ghosts)


def _mix(op: Op, parts: Any, labels: list[Label], rest: list[Label], known: Any) -> None:
    """Every entry along ``labels`` comes to depend on all of them that the support keeps."""
    support, fill = known if known is not None else (sympy.true, None)
    parts.support, parts.fill = support, fill
    reduce_over(op, parts, [x for x in labels if op.scope.atoms[x].size != 1], rest, MASKS)
    op.operands[0].everything |= set(row_labels(op.scope, labels))
    op.scope.full |= set(row_labels(op.scope, labels))
    op.scope.differ(labels)
    parts.support, parts.fill = sympy.true, None


def mixed(op: Op, parts: Parts, labels: list[Label], rest: list[Label]) -> None:
    """Every entry along ``labels`` of the first operand comes to depend on all of them."""
    _mix(op, parts, labels, rest, None)


@rule(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(op: Op) -> Any:
    return _normalised(op)[0]


@rule(aten.native_layer_norm.default, aten._fused_rms_norm.default)
def norm_with_statistics(op: Op) -> Any:
    """The result, and the mean and the scale of each row of it."""
    result, statistics = _normalised(op)
    return [result, *(statistics for _ in op.shapes[1:])]


def _normalised(op: Op) -> tuple[Out, Out]:
    """The result, and what has one entry in the place of each normalised axis."""
    x = op.operands[0]
    count = len(op.args[1])
    labels = [label for dim in x.dims[len(x.dims) - count :] for label in dim]
    rest = [label for label in x.labels if label not in labels]
    parts = op.gather()
    parts.large = parts.lowered = False
    _mix(op, parts, labels, rest, None)
    outer: Dims = [*x.dims[: len(x.dims) - count], *([] for _ in range(count))]
    return Out(x.dims, replace(parts, raw=frozenset()), x.ghosts), Out(outer, parts, x.ghosts)


@rule(aten.group_norm.default)
def group_norm(op: Op) -> Out:
    """Each sequence of axis 0 is normalised over groups of axis 1, and over all axes behind it."""
    x = op.operands[0]
    parts = op.gather()
    parts.raw = frozenset()
    _mix(op, parts, [label for dim in x.dims[1:] for label in dim], list(x.dims[0]), None)
    return Out(x.dims, parts, x.ghosts)


@rule(aten.instance_norm.default)
def instance_norm(op: Op) -> Out:
    """Each channel of each sequence is normalised over all axes behind it."""
    x = op.operands[0]
    parts = op.gather()
    parts.raw = frozenset()
    _mix(op, parts, [label for dim in x.dims[2:] for label in dim], [*x.dims[0], *x.dims[1]], None)
    op.scope.differ(x.dims[1])  # by their weights
    return Out(x.dims, parts, x.ghosts)


@rule(aten._native_batch_norm_legit.no_stats)
def batch_statistics(op: Op) -> list[Out]:
    """The result, and the mean and the scale of each channel, over all rows and texts."""
    x, parts = op.operands[0], op.gather()
    _mix(op, parts, [label for k, dim in enumerate(x.dims) if k != 1 for label in dim], list(x.dims[1]), None)
    op.scope.differ(x.dims[1])
    return [Out(dims, parts, x.ghosts) for dims in (x.dims, [x.dims[1]], [x.dims[1]])]


@rule(aten._native_batch_norm_legit_no_training.default)
def batch_norm(op: Op) -> list[Out]:
    """With statistics that are known each entry stands for itself; the other results are empty."""
    x, scope = op.operands[0], op.scope
    for vector in op.operands[1:]:
        scope.pair(list(x.dims[1]), list(vector.dims[0]), [x], vector)
    rest = [Out([scope.fresh(size) for size in shape], Parts()) for shape in op.shapes[1:]]
    return [Out(x.dims, op.gather(), x.ghosts), *rest]


def _along(op: Op, where: Any, outputs: int = 1) -> Any:
    """Entries along some axes are rearranged or combined in a way that depends on all of them."""
    x, scope = op.operands[0], op.scope
    axes = _axes(op, where)
    labels = [label for axis in axes for label in x.dims[axis]]
    rest = [label for label in x.labels if label not in labels]
    outs = []
    for k in range(outputs):
        parts = op.gather()
        _mix(op, parts, labels, rest, None)
        dims = list(x.dims)
        for axis in axes:
            if op.shapes[k][axis] != scope.size(dims[axis]):
                dims[axis] = scope.fresh(op.shapes[k][axis])
        outs.append(Out(dims, parts, x.ghosts))
    return outs[0] if outputs == 1 else outs


@rule(aten.sort.default, aten.sort.stable)
def sort(op: Op) -> Any:
    if op.node.target is aten.sort.stable:
        return _along(op, op.arg(2, "dim", -1), outputs=2)
    return _along(op, op.arg(1, "dim", -1), outputs=2)


@rule(aten.topk.default)
def topk(op: Op) -> Any:
    return _along(op, op.arg(2, "dim", -1), outputs=2)


@rule(aten.argsort.default)
def argsort(op: Op) -> Any:
    return _along(op, op.arg(1, "dim", -1))


@rule(aten.roll.default)
def roll(op: Op) -> Any:
    return _along(op, op.arg(2, "dims", []))  # without axes it runs over all of them


@rule(aten.flip.default)
def flip(op: Op) -> Any:
    return _along(op, op.args[1]) if op.args[1] else Out(op.operands[0].dims, op.gather(), op.operands[0].ghosts)


@rule(
    aten.fft_fft.default,
    aten.fft_rfft.default,
    aten.fft_ifft.default,
    aten.fft_irfft.default,
    aten.fft_hfft.default,
    aten.fft_ihfft.default,
)
def fft(op: Op) -> Any:
    return _along(op, op.arg(2, "dim", -1))


@rule(
    aten.fft_fftn.default,
    aten.fft_ifftn.default,
    aten.fft_fft2.default,
    aten.fft_ifft2.default,
    aten.fft_rfft2.default,
    aten.fft_rfftn.default,
    aten.fft_irfft2.default,
    aten.fft_irfftn.default,
)
def fft_of_several_axes(op: Op) -> Any:
    two = "2" in name_of(op.node).split(".")[1]
    return _along(op, op.arg(2, "dim", [-2, -1] if two else None))


@rule(aten.cumsum.default)
def cumsum(op: Op) -> Out:
    x, scope = op.operands[0], op.scope
    axis = _axes(op, op.args[1])[0]
    labels, out = x.dims[axis], _running(op, axis)
    laws.learn(scope.axes.laws, leaf_name(op.node.name), x.fact, axis)
    value = expression(x, scope)
    if value is not None and len(labels) == 1:
        value = number(value)
        constant_along = symbol(labels[0]) not in value.free_symbols
        held = op.dtypes[0].is_floating_point or value.is_integer
        out.parts.expr = value * (symbol(labels[0]) + 1) if constant_along and value.is_number and held else None
    return out


@rule(aten.cumprod.default, aten.logcumsumexp.default)
def cumprod(op: Op) -> Out:
    return _running(op, _axes(op, op.args[1])[0])


@rule(aten.cummax.default, aten.cummin.default)
def cummax(op: Op) -> list[Out]:
    return [_running(op, _axes(op, op.args[1])[0]) for _ in op.shapes]


def _running(op: Op, axis: int) -> Out:
    """What runs along an axis reads rows up to its own: dependence is unchanged."""
    x, scope = op.operands[0], op.scope
    if row_labels(scope, x.dims[axis][1:]):  # under an outer axis it reads all rows of the entries before
        return _along(op, axis)  # type: ignore[no-any-return]
    parts = op.gather()
    rows = set(row_labels(scope, list(x.dims[axis])))
    reads_rows(op, parts, rows)
    x.everything |= rows
    scope.full |= rows
    scope.differ(x.dims[axis], f"{name_of(op.node)} runs over the sequences of a batch")
    return Out(x.dims, parts, x.ghosts)


@rule(aten.dropout.default, aten.native_dropout.default, aten.alpha_dropout.default, aten.feature_dropout.default)
def dropout(op: Op) -> Out:
    """Only dropout that is switched on reaches the analysis: `normalise` removes the other."""
    parts = op.gather()
    parts.random = op.cause(name_of(op.node), errors.Randomness)
    x: Operand = op.operands[0]
    return Out(x.dims, parts, x.ghosts)
