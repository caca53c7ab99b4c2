"""From a softmax forward: what becomes of its weights, up to the product with the values."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from kvpass.analysis.expressions import branches, implies
from kvpass.analysis.facts import Fill
from kvpass.analysis.sweep import Analyzed
from kvpass.transforms.plan import MOVES
from kvpass.transforms.sides import LAYOUT, PRODUCTS, NotRecognised
from kvpass.transforms.sinks import sink_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Ahead:
    """What becomes of the weights.

    Attributes:
        out: the contraction with the values; ``weights_at``: which of its operands the weights are.
        sink: joins the weights, or None.
        places: for each atom of the softmax, the atom of ``out``; None where it is read whole or taken apart.
        moved: axes were moved about on the way, so that such atoms may stand in another order.
        zeroed: what the mask hides is set to zero afterwards, so that a row without keys is zero.
    """

    out: fx.Node
    weights_at: int
    sink: fx.Node | None
    places: tuple[int | None, ...]
    moved: bool
    zeroed: bool


def forward(analyzed: Analyzed, softmax: fx.Node) -> Ahead:
    """Follow the weights to the contraction with the values."""
    node, sink, moved, zeroed = softmax, None, False, False
    places: tuple[int | None, ...] = tuple(range(len(analyzed.fact(softmax).atoms)))
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise NotRecognised("the weights are used more than once")
        user = users[0]
        step = analyzed.steps[user]
        k = step.operands.index(node)
        before, places = places, tuple(None if p is None else step.links[k][p] for p in places)
        if user.target in PRODUCTS and user.target is not aten.baddbmm.default:
            return Ahead(user, k, sink, places, moved, zeroed)
        if node is softmax and (sink := sink_of(analyzed, user, softmax)) is not None:
            node, places = user, before
            continue
        hidden = _hides_again(analyzed, node, user)
        if not hidden and user.target not in (aten._to_copy.default, *LAYOUT):
            raise NotRecognised(f"the weights pass through {user.target}")
        moved |= user.target in MOVES
        zeroed |= hidden and packet(user) != "mul"  # NaN times zero stays
        node = user


def _hides_again(analyzed: Analyzed, weights: fx.Node, user: fx.Node) -> bool:
    """True where weights are set to zero, or multiplied by zero and one, outside of their own support only."""
    before, after, name = analyzed.fact(weights), analyzed.fact(user), packet(user)
    if name == "mul":
        factors = [analyzed.fact(x).expr for x in analyzed.steps[user].operands if x is not weights]
        if len(factors) != 1 or factors[0] is None or not {v for v, _ in branches(factors[0])} <= {0, 1}:
            return False
    elif name not in ("masked_fill", "where"):
        return False
    same = before.atoms == after.atoms and before.fill is after.fill is Fill.ZERO
    return same and before.support != sympy.true and implies(before.support, after.support)


def packet(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", node.target))
