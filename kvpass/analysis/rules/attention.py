"""Attention that the graph already names."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from kvpass import errors
from kvpass.analysis import shifts
from kvpass.analysis.expressions import compare
from kvpass.analysis.facts import Fill, Kind
from kvpass.analysis.scope import Label, Operand, Parts, symbol
from kvpass.analysis.table import Op, Out, bounding_row, keeps_a_key, reduce_over, rule

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(op: Op) -> Out:
    """softmax(q k^T * scale + mask) v over the keys that the mask or ``is_causal`` keeps.

    ``is_causal`` compares *indices*, aligned to the upper left corner, as ATen does. A boolean mask and -inf leave a
    row without keys at zero; a finite fill does not.
    """
    q, k, v = op.operands[:3]
    scope, parts = op.scope, op.gather()
    if op.arg(4, "dropout_p", 0.0):
        parts.random = op.cause("scaled_dot_product_attention with dropout_p", errors.Randomness)
    lead, ghosts = _lead(op, q, k, v)
    rows, keys = list(q.dims[-2]), scope.broadcast_axis([(k, k.dims[-2]), (v, v.dims[-2])], [])
    support, fill = _kept(op, parts, lead, rows, keys)
    kept = [label for dim in (*lead, rows) for label in scope.expanded(dim)] + ghosts
    gone = [label for label in scope.expanded(keys) if scope.atoms[label].size != 1]
    for j in gone:
        if scope.atoms[j].kind is Kind.SEQ and fill is not None:
            keeps_a_key(op, parts, j, bounding_row(op, j, kept, support), support, fill)
    for x in op.operands:
        x.everything |= {label for label in x.labels if set(scope.expanded([label])) & set(gone)}
    lengths = [x for x in op.operands if x.fact.length is not None]
    if not op.counts_rows() and all(all(x is not y for y in (q, k, v)) and _level(op, x, gone) for x in lengths):
        parts.length = None
    parts.support, parts.fill = support, fill
    reduce_over(op, parts, gone, kept, (Fill.NEG_INF, Fill.NEG))
    parts.support, parts.fill, parts.large, parts.lowered = sympy.true, None, v.fact.large, v.fact.fill is Fill.NEG
    parts.raw = op.raw(v)
    return Out([*lead, rows, list(v.dims[-1])], parts, ghosts)


def _level(op: Op, mask: Operand, keys: list[Label]) -> bool:
    return set(keys) <= shifts.opened(op.scope, mask).level


def _lead(op: Op, q: Operand, k: Operand, v: Operand) -> tuple[list[list[Label]], list[Label]]:
    """Batch and head axes; with ``enable_gqa`` the heads of keys and values count for themselves."""
    scope, grouped = op.scope, bool(op.kwargs.get("enable_gqa", False))
    ghosts = scope.merge_ghosts([label for x in op.operands for label in x.ghosts])
    rank = max(len(x.dims) for x in (q, k, v))
    dims = []
    for axis in range(-rank, -2):
        present = [(x, x.dims[axis]) for x in (q, k, v) if len(x.dims) >= -axis]
        if grouped and axis == -3:
            present = [(q, q.dims[axis])]
            scope.differ(label for label in q.dims[axis] if scope.atoms[label].kind is Kind.FREE)
        dims.append(scope.broadcast_axis(present, ghosts))
    return dims, ghosts


def _kept(
    op: Op, parts: Parts, lead: list[list[Label]], rows: list[Label], keys: list[Label]
) -> tuple[Any, Fill | None]:
    """The support of the scores and what stands outside it."""
    scope = op.scope
    support: Any = sympy.true
    fill: Fill | None = None
    mask = op.arg(3, "attn_mask")
    if isinstance(mask, Operand):
        axes = [*lead, rows, keys]
        for k in range(1, len(mask.dims) + 1):
            mine, other = axes[-k], mask.dims[-k]
            if scope.size(other) == 1:
                for label in other:
                    scope.subst.setdefault(symbol(label), sympy.Integer(0))
            elif scope.size(mine) != 1:
                axes[-k][:] = scope.pair(list(mine), other, [x for x in op.operands if x is not mask], mask)
        known = op.known(mask)
        if mask.fact.fill is Fill.NEG:
            large = [x for x in (mask, *op.operands[:2]) if (op.reaches(x, x.fact.low) if x is mask else x.fact.large)]
            if large:
                op.undo(parts, large[0])
                known = None
        if known is not None and (mask.fact.dtype is torch.bool or known[1] is not Fill.ZERO):
            support, fill = known[0], Fill.NEG_INF if mask.fact.dtype is torch.bool else known[1]
    if op.arg(5, "is_causal", False):
        i, j = (symbol(d[0]) if d else sympy.Integer(0) for d in (scope.expanded(rows), scope.expanded(keys)))
        support, fill = sympy.And(support, compare("le", j, i)), fill or Fill.NEG_INF
    return support, fill
