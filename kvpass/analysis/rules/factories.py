"""Tensors made from nothing, or from another one's shape."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch

from kvpass import errors
from kvpass.analysis.expressions import Value, boolean, constant
from kvpass.analysis.scope import Parts, symbol
from kvpass.analysis.table import Op, Out, name_of, rule

aten = torch.ops.aten


def _filled(op: Op, value: Any) -> Out:
    dims = [op.scope.fresh(size, bcast=True) for size in op.shape]
    whole = not (op.dtypes[0].is_floating_point or op.dtypes[0].is_complex or op.dtypes[0] is torch.bool)
    expr: Value | None = constant(int(value) if whole and isinstance(value, float) and math.isfinite(value) else value)
    if expr is not None and op.dtypes[0] is torch.bool:
        expr = boolean(expr)
    return Out(dims, Parts(expr=expr), detached=True)


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def zeros(op: Op) -> Out:
    return _filled(op, 0)


@rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(op: Op) -> Out:
    return _filled(op, 1)


@rule(aten.full.default, aten.full_like.default, aten.new_full.default, aten.fill.Scalar)
def full(op: Op) -> Out:
    number = op.arg(2, "fill_value") if op.node.target is aten.new_full.default else op.arg(1, "fill_value")
    if isinstance(number, sympy.Basic) and not number.is_number:
        out = _filled(op, 0)
        out.parts.expr = number
        return out
    return _filled(op, number)


@rule(aten.scalar_tensor.default)
def scalar_tensor(op: Op) -> Out:
    return _filled(op, op.args[0])


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(op: Op) -> Out:
    start = 0 if op.node.target is aten.arange.default else op.args[0]
    step = op.arg(2, "step", 1) if op.node.target is aten.arange.start_step else 1
    labels = op.scope.fresh(op.shape[0])
    place = symbol(labels[0]) if labels else sympy.Integer(0)
    first, stride = constant(start), constant(step)
    expr = None if first is None or stride is None else first + stride * place
    return Out([labels], Parts(expr=expr))


@rule(
    aten.linspace.default,
    aten.logspace.default,
    aten.hann_window.default,
    aten.hann_window.periodic,
    aten.hamming_window.default,
    aten.blackman_window.default,
    aten.bartlett_window.default,
    aten.kaiser_window.default,
    aten.kaiser_window.periodic,
    aten.tril_indices.default,
    aten.triu_indices.default,
)
def table(op: Op) -> Out:
    """Numbers that are the same in every call."""
    if any(isinstance(n, sympy.Basic) and not n.is_number for n in op.scalars()):
        raise errors.UnknownOp(detail=f"{name_of(op.node)} of a size that is not known")
    return Out([op.scope.fresh(size) for size in op.shape], Parts())


@rule(aten.eye.default, aten.eye.m)
def eye(op: Op) -> Out:
    dims = [op.scope.fresh(size) for size in op.shape]
    i, j = (symbol(d[0]) if d else sympy.Integer(0) for d in dims)
    return Out(dims, Parts(expr=sympy.Piecewise((sympy.Integer(1), sympy.Eq(i, j)), (sympy.Integer(0), True))))


@rule(
    aten.rand_like.default,
    aten.randn_like.default,
    aten.rand.default,
    aten.randn.default,
    aten.randint.low,
    aten.randint.default,
    aten.randint_like.default,
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.multinomial.default,
    aten.normal_functional.default,
    aten.randperm.default,
)
def random(op: Op) -> Out:
    parts = Parts()
    parts.random = op.cause(name_of(op.node), errors.Randomness)
    return Out([op.scope.fresh(size) for size in op.shape], parts)


@rule(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
def empty(op: Op) -> Out:
    """Whatever is in memory, unless it is written over."""
    parts = Parts()
    parts.random = op.cause(f"{name_of(op.node)} is read where nothing was written", errors.Randomness)
    return Out([op.scope.fresh(size, bcast=True) for size in op.shape], parts, detached=True)
