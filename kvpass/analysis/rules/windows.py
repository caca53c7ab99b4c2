"""Convolutions over ``[N, channels, ..]``, and gates over their channels."""

from __future__ import annotations

import torch

from kvpass.analysis.rules.reductions import mixed
from kvpass.analysis.table import Op, Out, rule

aten = torch.ops.aten


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default)
def convolution(op: Op) -> Out:
    """Each entry of ``N`` by itself. (Short ones over the rows have been unrolled: others read all of them.)"""
    return _by_item(op, 1 if len(op.operands[0].dims) == len(op.operands[1].dims) else 0)


def _by_item(op: Op, outer: int) -> Out:
    """Whatever is computed of everything but the first ``outer`` axes."""
    x, scope = op.operands[0], op.scope
    labels = [label for dim in x.dims[outer:] for label in dim]
    rest = [label for label in x.labels if label not in labels]
    for weight in op.operands[1:]:
        weight.everything |= set(weight.labels)
    parts = op.gather()
    parts.raw = frozenset()
    mixed(op, parts, labels, rest)
    return Out([*x.dims[:outer], *(scope.fresh(size) for size in op.shape[outer:])], parts, x.ghosts)


@rule(aten.glu.default)
def glu(op: Op) -> Out:
    """One half of an axis times the sigmoid of the other."""
    x, scope = op.operands[0], op.scope
    axis = op.arg(1, "dim", -1) % len(x.dims)
    rest = [label for label in x.labels if label not in x.dims[axis]]
    parts = op.gather()
    mixed(op, parts, x.dims[axis], rest)
    return Out([*x.dims[:axis], scope.fresh(op.shape[axis]), *x.dims[axis + 1 :]], parts, x.ghosts)
