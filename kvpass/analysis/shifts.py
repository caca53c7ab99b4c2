"""What a softmax does not notice: a number that is added to all entries of a row, such as distances to the last row.

ALiBi is often written as ``slope * (j - (S - 1))``: with each row of text all biases change, and all by the same
amount. A softmax along ``j`` is the same for each length then. Two properties of a value, along an axis, say so:

- *affine*: an entry is ``a + b * x`` in its index ``x``, of an ``a`` and a ``b`` that are the same along the axis. A
  window that is cut out elsewhere differs by one number.
- *level*: what the length changes is one number that is added to all entries along the axis.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from kvpass.analysis.expressions import Value, is_boolean
from kvpass.analysis.facts import Atom, Shift, index
from kvpass.analysis.scope import Label, Operand, Scope, symbol


def of_form(value: Value, atoms: tuple[Atom, ...], seq: sympy.Symbol) -> Shift:
    """The shift of a closed form."""
    if is_boolean(value) or value.has(sympy.Piecewise, sympy.oo):
        return Shift()
    affine = {k for k in range(len(atoms)) if _is_affine(value, index(k))}
    level = {k for k in affine if not sympy.expand(value - value.xreplace({index(k): sympy.Integer(0)})).has(seq)}
    return Shift(frozenset(affine), frozenset(level))


def _is_affine(value: Value, x: sympy.Symbol) -> bool:
    return bool(value.is_polynomial(x) and sympy.degree(value, x) <= 1) if value.has(x) else True


def opened(scope: Scope, operand: Operand) -> Shift:
    """A fact's shift over labels. Along an axis that an operand does not have it is the same."""
    labels, shift = operand.labels, operand.fact.shift

    def of(kept: Iterable[Label]) -> frozenset[Label]:
        return frozenset(x for label in kept for x in scope.expanded([label]))

    constant = of(scope.atoms) - of(labels)
    affine, level = (of(labels[k] for k in places) for places in (shift.affine, shift.level))
    return Shift(affine | constant, level | constant)


def of_sum(scope: Scope, operands: Iterable[Operand]) -> Shift:
    """The shift of a sum: each term that the length changes is level, and every term affine."""
    affine = level = frozenset(x for label in scope.atoms for x in scope.expanded([label]))
    for operand in operands:
        shift = opened(scope, operand)
        affine &= shift.affine
        level &= level if operand.fact.length is None else shift.level
    return Shift(affine, level)


def of_product(scope: Scope, operands: list[Operand]) -> Shift:
    """The shift of a product: along an axis along which all factors but one are the same, it is that one's."""
    affine, level = frozenset[int](), frozenset[int]()
    for k, operand in enumerate(operands):
        rest = operands[:k] + operands[k + 1 :]
        if any(other.fact.length is not None for other in rest):
            continue
        shift, varying = opened(scope, operand), frozenset[int]().union(*(_varying(scope, other) for other in rest))
        affine, level = affine | (shift.affine - varying), level | (shift.level - varying)
    return Shift(affine, level)


def _varying(scope: Scope, operand: Operand) -> frozenset[Label]:
    """The labels along which an operand may differ, after all operands were aligned."""
    labels = frozenset(x for label in operand.labels for x in scope.expanded([label]))
    if operand.fact.expr is None:
        return labels
    free = scope.resolve(scope.lift(operand, operand.fact.expr)).free_symbols
    return frozenset(x for x in labels if symbol(x) in free)
