"""Any function of context and weights: which rows it depends on is known without knowing what it computes.

Nothing is said of how it treats the batch, so that its sequences are known by the context of all of them.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch

from kvpass import errors
from kvpass.analysis.facts import Atom, Expr, Kind
from kvpass.analysis.scope import Label
from kvpass.analysis.table import Op, Out, name_of


def of_context_alone(op: Op) -> bool:
    """True of a deterministic ATen op no operand, size or number of which speaks of the rows of the sequence."""
    target, seq = op.node.target, op.scope.axes.seq
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or not op.operands:
        return False
    numbers = [*(size for shape in op.shapes for size in shape), *op.scalars()]
    if any(isinstance(number, sympy.Basic) and number.has(seq) for number in numbers):
        return False
    facts = [x.fact for x in op.operands]
    return all(not f.sequence and f.index_only() and all(atom.kind is not Kind.SEQ for atom in f.atoms) for f in facts)


def opaque(op: Op) -> list[Out]:
    """The results of an op that `of_context_alone` lets pass, read whole."""
    scope, parts = op.scope, op.scope.gather(op.operands)
    batch = scope.axes.batch
    several = any(scope.atoms[label].kind is Kind.BATCH for x in op.operands for label in x.labels)
    if several or (batch.free_symbols and any(isinstance(n, sympy.Basic) and n.has(batch) for n in op.scalars())):
        why = f"{name_of(op.node)} is not known to keep the sequences of a batch apart"
        parts.together = parts.together or op.cause(why, errors.MixesBatch)
    for x in op.operands:
        x.everything |= set(x.labels)
    return [
        Out([_axis(op, size, several and k == 0) for k, size in enumerate(shape)], replace(parts))
        for shape in op.shapes
    ]


def _axis(op: Op, size: Expr, first: bool) -> list[Label]:
    """The first axis is the batch where it has as many entries."""
    if first and size == op.scope.axes.batch and size != 1:
        return [op.scope.new(Atom(Kind.BATCH, size))]
    return op.scope.fresh(size)
