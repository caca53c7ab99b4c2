"""Products that sum over shared axes. All are one rule: label the axes, pair equal labels, sum the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from kvpass import errors
from kvpass.analysis.facts import Atom, Fill, Kind
from kvpass.analysis.scope import Label, Operand
from kvpass.analysis.table import Op, Out, name_of, reduce_over, rule

aten = torch.ops.aten

COORDINATES = 3  # a sum over no more axes is one of numbers as they were passed, over more it is a score of features


def contract(op: Op, operands: Sequence[Operand], specs: Sequence[Sequence[str]], out: Sequence[str]) -> Out:
    """``einsum`` over axis names. An axis of size one broadcasts against its namesakes."""
    scope = op.scope
    ghosts = scope.merge_ghosts([label for x in operands for label in x.ghosts])
    axes: dict[str, list[Label]] = {}
    for name in dict.fromkeys(n for spec in specs for n in spec):
        present = [(x, x.dims[spec.index(name)]) for x, spec in zip(operands, specs, strict=True) if name in spec]
        axes[name] = scope.broadcast_axis(present, ghosts)
    parts = op.gather()
    parts.support, parts.fill = _product(op, operands)
    parts.large = parts.large or op.names_large()
    gone = [label for name, labels in axes.items() if name not in out for label in scope.expanded(labels)]
    kept = [label for name in out for label in scope.expanded(axes[name])] + ghosts
    parts.raw = op.raw(*operands) if all(_few(scope.atoms[label]) for label in gone) else frozenset()
    units = [label for label in gone if scope.atoms[label].size == 1 and scope.atoms[label].kind is Kind.SEQ]
    gone = [label for label in gone if scope.atoms[label].size != 1]
    _read_whole(operands, scope, gone)
    reduce_over(op, parts, gone, kept + units, (Fill.ZERO,))
    return Out([axes[name] for name in out], parts, ghosts + units)


def _few(atom: Atom) -> bool:
    """True of an axis over which a sum is not one of features: of rows, or of few entries."""
    return atom.kind is Kind.SEQ or bool(atom.size.is_number and atom.size <= COORDINATES)


def _read_whole(operands: Sequence[Operand], scope: Any, gone: list[Label]) -> None:
    for x in operands:
        x.everything |= {label for label in x.labels if set(scope.expanded([label])) & set(gone)}


def _product(op: Op, operands: Sequence[Operand]) -> tuple[Any, Fill | None]:
    known = [k for k in map(op.known, operands) if k is not None and k[1] is Fill.ZERO]
    return (sympy.And(*(k[0] for k in known)), Fill.ZERO) if known else (sympy.true, None)


def matmul_names(a: int, b: int) -> tuple[list[str], list[str], list[str]]:
    """Axis names of ``matmul`` for operands of rank ``a`` and ``b``, and of the result."""
    batch = [f"b{k}" for k in range(max(a, b) - 2, 0, -1)]
    left = (["n"] if a >= 2 else []) + ["k"]
    right = ["k"] + (["m"] if b >= 2 else [])
    return (
        batch[len(batch) - max(a - 2, 0) :] + left,
        batch[len(batch) - max(b - 2, 0) :] + right,
        batch + left[:-1] + right[1:],
    )


def _add(op: Op, product: Out, bias: Operand) -> Out:
    """A broadcast sum of the product with another tensor."""
    scope = op.scope
    rank = len(product.dims)
    dims = []
    for k in range(rank):
        j = k - rank + len(bias.dims)
        mine = product.dims[k]
        if j < 0 or scope.size(bias.dims[j]) == 1:
            dims.append(mine)
        elif scope.size(mine) == 1:
            dims.append(bias.dims[j])
        else:
            dims.append(scope.pair(mine, bias.dims[j], [x for x in op.operands if x is not bias], bias))
    parts = product.parts
    parts.support, parts.fill = sympy.true, None
    known = op.known(bias)
    beta = op.kwargs.get("beta", 1)
    if known is not None and known[1] is Fill.NEG:
        large = [x for x in op.operands if x is not bias and parts.raw & op.raw(x) and op.reaches(x, bias.fact.low)]
        if large:
            op.undo(parts, large[0])
            known = None
    parts.raw |= op.raw(bias)
    if known is not None and (beta >= 1 if known[1] is Fill.NEG else beta > 0 and known[1] is Fill.NEG_INF):
        parts.support, parts.fill = known
    return Out(dims, parts, product.ghosts + bias.ghosts)


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def matmul(op: Op) -> Out:
    a, b = op.operands[:2]
    left, right, out = matmul_names(len(a.dims), len(b.dims))
    return contract(op, (a, b), (left, right), out)


@rule(aten.outer.default)
def outer(op: Op) -> Out:
    return contract(op, op.operands[:2], ("n", "m"), ("n", "m"))


@rule(aten.linear.default)
def linear(op: Op) -> Out:
    x, w = op.operands[:2]
    lead = [f"b{k}" for k in range(len(x.dims) - 1)]
    out = contract(op, (x, w), ([*lead, "k"], ["m", "k"]), [*lead, "m"])
    return _add(op, out, op.operands[2]) if len(op.operands) > 2 else out


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(op: Op) -> Out:
    bias, a, b = op.operands[:3]
    left, right, out = matmul_names(len(a.dims), len(b.dims))
    product = contract(op, (a, b), (left, right), out)
    return _add(op, product, bias) if op.kwargs.get("beta", 1) != 0 else product


@rule(aten.einsum.default)
def einsum(op: Op) -> Out:
    equation: str = op.args[0]
    specs, out = einsum_names(equation, [len(x.dims) for x in op.operands])
    if any(len(set(spec)) < len(spec) for spec in specs):
        raise errors.UnknownOp(detail=f"{name_of(op.node)} along a diagonal, {equation}")
    return contract(op, op.operands, specs, out)


def einsum_names(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Axis names of the operands and of the result; ``...`` becomes ``.0, .1, ..`` counted from the right."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    widest = max(
        (rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True) if "..." in t), default=0
    )
    specs = []
    for term, rank in zip(terms, ranks, strict=True):
        head, dots, tail = term.partition("...")
        count = rank - len(head) - len(tail) if dots else 0
        specs.append([*head, *(f".{k}" for k in range(widest - count, widest)), *tail])
    if not arrow:
        letters = [c for t in terms for c in t.replace("...", "")]
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    head, dots, tail = right.partition("...")
    return specs, [*head, *((f".{k}" for k in range(widest)) if dots else ()), *tail]
