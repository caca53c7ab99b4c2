"""From a softmax forward: what becomes of its weights, up to the product with the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from kvpass.analysis.expressions import boolean, branches, implies
from kvpass.analysis.facts import Fill, index
from kvpass.analysis.sweep import Analyzed, arguments
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
        unsure: perhaps not all of it is.
    """

    out: fx.Node
    weights_at: int
    sink: fx.Node | None
    places: tuple[int | None, ...]
    moved: bool
    zeroed: bool
    unsure: bool


def forward(analyzed: Analyzed, softmax: fx.Node) -> Ahead:
    """Follow the weights to the contraction with the values."""
    node, sink, moved, zeroed, unsure = softmax, None, False, False, False
    places: tuple[int | None, ...] = tuple(range(len(analyzed.fact(softmax).atoms)))
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise NotRecognised("the weights are used more than once")
        user = users[0]
        step = analyzed.steps[user]
        k = step.operands.index(node)
        places = tuple(None if p is None else step.links[k][p] for p in places)
        if user.target in PRODUCTS and user.target is not aten.baddbmm.default:
            return Ahead(user, k, sink, places, moved, zeroed, unsure)
        if node is softmax and (sink := sink_of(analyzed, user, softmax)) is not None:
            node = user
            continue
        hidden = _hides_again(analyzed, node, user)
        if not hidden and user.target not in (aten._to_copy.default, *LAYOUT):
            raise NotRecognised(f"the weights pass through {user.target}")
        moved |= user.target in MOVES
        if hidden and packet(user) != "mul":  # NaN times zero stays
            kept = _kept(analyzed, node, user)
            zeroed |= kept is not None and implies(kept, analyzed.fact(node).support)
            unsure |= not zeroed
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


def _kept(analyzed: Analyzed, weights: fx.Node, user: fx.Node) -> Any:
    """Where `masked_fill` and `where` keep the weights, over the atoms of the result; None where it has no form."""
    args, step = arguments(user), analyzed.steps[user]
    condition = args[1] if packet(user) == "masked_fill" else args[0]
    value, links = analyzed.fact(condition).expr, step.links[step.operands.index(condition)]
    if value is None or None in links:
        return None
    value = boolean(value.xreplace({index(k): index(place or 0) for k, place in enumerate(links)}))
    return value if packet(user) == "where" and args[1] is weights else sympy.Not(value)


def packet(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", node.target))
