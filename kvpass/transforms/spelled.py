"""Attention that is spelled out: ``softmax(f(q k^T)) v`` in any spelling of the products and of ``f``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from kvpass.analysis.facts import Fact, Fill, Kind, index, product
from kvpass.analysis.rules.contraction import einsum_names, matmul_names
from kvpass.analysis.sweep import Analyzed, Step, arguments
from kvpass.ir import SCORE, B, H, I, J
from kvpass.transforms.sides import (
    LAYOUT,
    PRODUCTS,
    Load,
    NotRecognised,
    Parts,
    Recognised,
    Side,
    always_keeps_a_key,
    closed,
    emptied_by_index,
    grouped,
    only_fill,
    predicate,
    side_of,
)
from kvpass.transforms.sinks import sink_of

aten = torch.ops.aten


def spelled(analyzed: Analyzed, softmax: fx.Node) -> Recognised:
    """``softmax(f(q k^T)) v`` in any spelling of the products and of ``f``."""
    fact = analyzed.fact(softmax)
    axis = list(fact.flat(int(arguments(softmax)[1])))
    if len(axis) != 1:
        raise NotRecognised("the softmax runs over a merged axis")
    (key_atom,) = axis
    walk = _Walk(analyzed, softmax, key_atom)
    product, score = walk.back(arguments(softmax)[0], tuple(range(len(fact.atoms))))
    out, weights_at, sink = _forward(analyzed, softmax)
    return walk.match(product, score, out, weights_at, sink)


def _forward(analyzed: Analyzed, softmax: fx.Node) -> tuple[fx.Node, int, fx.Node | None]:
    """The contraction with the values, which of its operands the weights are, and a sink that joins them."""
    node, sink = softmax, None
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise NotRecognised("the weights are used more than once")
        user = users[0]
        if user.target in PRODUCTS and user.target is not aten.baddbmm.default:
            return user, analyzed.steps[user].operands.index(node), sink
        if node is softmax and (sink := sink_of(analyzed, user, softmax)) is not None:
            node = user
            continue
        if user.target not in (aten._to_copy.default, *LAYOUT):
            raise NotRecognised(f"the weights pass through {user.target}")
        node = user


class _Walk:
    """From a softmax back to the product of queries and keys."""

    def __init__(self, analyzed: Analyzed, softmax: fx.Node, key_atom: int) -> None:
        self.analyzed, self.softmax, self.key_atom = analyzed, softmax, key_atom
        self.fact = analyzed.fact(softmax)
        self.loads: list[Load] = []
        self.row_atom = next((k for k in self.fact.rows if k != key_atom), None)
        self.scores_from: tuple[int | None, ...] = ()

    def back(self, node: fx.Node, at: tuple[int | None, ...]) -> tuple[fx.Node, Any]:
        """``(product, score)``: ``at`` says which atom of the softmax each atom of ``node`` is."""
        step = self.analyzed.steps[node]
        if node.target in PRODUCTS:
            self.scores_from = at
            return node, self.biased(node, step, at) if node.target is aten.baddbmm.default else SCORE
        handler = _POINTWISE.get(_packet(node))
        if node.target in LAYOUT or _packet(node) == "_to_copy":
            return self.back(step.operands[0], _compose(step, 0, at))
        if handler is None:
            raise NotRecognised(f"the scores come from {node.target}")
        return handler(self, node, step, at)

    def biased(self, node: fx.Node, step: Step, at: tuple[int | None, ...]) -> Any:
        """The score of ``beta * bias + alpha * (q k^T)``."""
        alpha, beta = _number(node.kwargs.get("alpha", 1)), _number(node.kwargs.get("beta", 1))
        bias = step.operands[0]
        if beta == 0:
            return alpha * SCORE
        if only_fill(self.analyzed.fact(bias)) is not None:
            return alpha * SCORE  # in the support already
        return alpha * SCORE + beta * self.load(bias, step, 0, at)

    def into(self, step: Step, k: int, at: tuple[int | None, ...]) -> tuple[fx.Node, Any]:
        return self.back(step.operands[k], _compose(step, k, at))

    def scores_operand(self, step: Step, at: tuple[int | None, ...]) -> int:
        """The operand that depends on rows along both the query and the key axis; of several, a product of the two."""
        heavy = [
            k for k, op in enumerate(step.operands) if len(self.analyzed.fact(op).rows) >= 2 and not self.is_mask(op)
        ]
        found = heavy if len(heavy) == 1 else [k for k in heavy if self.leads_to_a_product(step, k, at)]
        if not found:
            raise NotRecognised("it is not clear which operand holds the scores")
        return found[0]

    def leads_to_a_product(self, step: Step, k: int, at: tuple[int | None, ...]) -> bool:
        """True where an operand is made of queries and keys alone: relative positions read a table as well."""
        before = self.loads.copy()
        try:
            self._query_and_key(self.into(step, k, at)[0])
        except NotRecognised:
            return False
        finally:
            self.loads[:] = before
        return True

    def is_mask(self, node: fx.Node) -> bool:
        fact = self.analyzed.fact(node)
        return fact.expr is not None or fact.index_only()

    def load(self, node: fx.Node, step: Step, k: int, at: tuple[int | None, ...]) -> Any:
        """A tensor that is combined with the scores."""
        fact = self.analyzed.fact(node)
        if fact.expr is not None and fact.expr.is_number:
            return fact.expr
        composed = _compose(step, k, at)
        names = self.names()
        letters = []
        for atom, place in zip(fact.atoms, composed, strict=True):
            if place is None or names[place] is None:
                raise NotRecognised(f"{node.name} is combined with the scores along another axis")
            letters.append(names[place])
            del atom
        known = closed(fact, letters)
        if known is not None:
            return known
        load = Load(f"load_{node.name}", node, tuple(map(str, letters)))
        self.loads.append(load)
        return sympy.Function(load.name, real=True)(B, H, I, J)

    def names(self) -> list[str | None]:
        """The index letter of each atom of the softmax."""
        out: list[str | None] = []
        for k, atom in enumerate(self.fact.atoms):
            if k == self.key_atom:
                out.append("j")
            elif k == self.row_atom:
                out.append("i")
            else:
                out.append("b" if atom.kind is Kind.BATCH else "h")
        return out

    def support(self) -> Any:
        """The support of the scores that enter the softmax, over ``b h i j``."""
        source = arguments(self.softmax)[0]
        fact = self.analyzed.fact(source)
        if fact.fill is None:
            return sympy.true
        letters = tuple(name or "h" for name in self.names())
        heads = [k for k, name in enumerate(letters) if name == "h" and index(k) in fact.support.free_symbols]
        if len(heads) > 1:
            raise NotRecognised("the mask differs by head")
        support = predicate(self.analyzed, fact.support, letters, self.loads)
        if fact.fill is Fill.NEG and emptied_by_index(support):
            raise NotRecognised("a finite fill empties a row")
        return support

    def sink(self, node: fx.Node) -> str:
        """The name of the read of a sink: one entry for each head."""
        fact, letters = self.analyzed.fact(node), iter(self.names())
        along = [{x for atom, x in zip(dim, letters, strict=False) if atom.size != 1} for dim in self.fact.dims]
        sizes = [product(dim) for dim in fact.dims]
        wanted = [product(dim) if x == {"h"} else 1 for x, dim in zip(along, self.fact.dims, strict=True)]
        if sizes != wanted or fact.ghosts:
            raise NotRecognised(f"a sink of axes {fact}")
        load = Load(f"load_{node.name}", node, ("h",) * len(fact.atoms))
        self.loads.append(load)
        return load.name

    def match(
        self, product: fx.Node, score: Any, out: fx.Node, weights_at: int, sink: fx.Node | None = None
    ) -> Recognised:
        q, k = self._query_and_key(product)
        value, result = self._value(out, weights_at)
        parts = Parts(self.analyzed, out, q, *grouped(self.analyzed, k, value), result)
        support = self.support()
        strict = self.analyzed.fact(arguments(self.softmax)[0]).fill is Fill.NEG_INF  # an empty row is NaN
        strict = strict and self.softmax.target is not aten._safe_softmax.default
        dtype = self.softmax.meta["val"].dtype
        name = None if sink is None else self.sink(sink)
        empty_is_nan = strict and not always_keeps_a_key(support)
        return parts.finish(1.0, score, support, self.loads, dtype, empty_is_nan, name)

    def _query_and_key(self, product: fx.Node) -> tuple[Side, Side]:
        step = self.analyzed.steps[product]
        first = 1 if product.target is aten.baddbmm.default else 0
        sides = []
        for k in (first, first + 1):
            node = step.operands[k]
            fact = self.analyzed.fact(node)
            place = [None if p is None else self.scores_from[p] for p in step.links[k]]
            row = [
                a for a, p in enumerate(place) if p in (self.row_atom, self.key_atom) and fact.atoms[a].kind is Kind.SEQ
            ]
            depth = _contracted(product, step, fact, k - first)
            if len(row) != 1 or place[row[0]] is None:
                raise NotRecognised("an operand of the scores has no single row axis")
            sides.append((place[row[0]], side_of(node, fact, row, depth, self._head_order(fact, row, depth, place))))
        by_row = dict(sides)
        if set(by_row) != {self.row_atom, self.key_atom}:
            raise NotRecognised("the scores are not a product of queries and keys")
        return by_row[self.row_atom], by_row[self.key_atom]

    def _head_order(self, fact: Fact, row: list[int], depth: list[int], place: list[int | None]) -> list[int]:
        free = [a for a, atom in enumerate(fact.atoms) if atom.kind is Kind.FREE and a not in row and a not in depth]
        return _in_order(free, place)

    def _value(self, out: fx.Node, weights_at: int) -> tuple[Side, Side]:
        step, result = self.analyzed.steps[out], self.analyzed.fact(out)
        other = 1 - weights_at
        node = step.operands[other]
        fact, links = self.analyzed.fact(node), step.links[other]
        row = [a for a in fact.rows if links[a] is None]
        mine = set(step.links[weights_at])
        depth = _own_axes(out, step, fact, other)
        if len(row) != 1 or len(depth) != 1 or links[depth[0]] is None:
            raise NotRecognised("the values have no single row axis")
        heads = [a for a in range(len(fact.atoms)) if fact.atoms[a].kind is Kind.FREE and a not in depth]
        heads = _in_order(heads, list(links))
        rows = [k for k in result.rows if k in mine]
        if len(rows) != 1:
            raise NotRecognised("the result has no single row axis")
        return side_of(node, fact, row, depth, heads), side_of(out, result, rows, [links[depth[0]]])


def _in_order(heads: list[int], place: list[int | None]) -> list[int]:
    """Head atoms in the order of the scores; one that was split there keeps its own place."""
    if any(place[a] is None for a in heads):
        return heads
    return sorted(heads, key=lambda a: place[a] or 0)


def _specs(node: fx.Node, step: Step) -> tuple[list[list[str]], list[str]]:
    """Axis names of a product's two factors and of its result."""
    if node.target is aten.einsum.default:
        return einsum_names(str(arguments(node)[0]), [len(node_.meta["val"].shape) for node_ in step.operands])
    factors = step.operands[-2:]
    left, right, out = matmul_names(*(len(f.meta["val"].shape) for f in factors))
    return [left, right], out


def _contracted(node: fx.Node, step: Step, fact: Fact, side: int) -> list[int]:
    """The atoms of one factor that the product sums over."""
    specs, out = _specs(node, step)
    return [a for axis, name in enumerate(specs[side]) if name not in out for a in fact.flat(axis)]


def _own_axes(node: fx.Node, step: Step, fact: Fact, k: int) -> list[int]:
    """The atoms of factor ``k`` that stand in the result but not in the other factor."""
    specs, out = _specs(node, step)
    return [a for axis, n in enumerate(specs[k]) if n in out and n not in specs[1 - k] for a in fact.flat(axis)]


def _packet(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", node.target))


def _compose(step: Step, k: int, at: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return tuple(None if link is None else at[link] for link in step.links[k])


def _number(arg: Any) -> Any:
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return sympy.Float(arg) if isinstance(arg, float) else sympy.Integer(arg)
    raise NotRecognised("the scores are combined with a number that is not constant")


def _scaled(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    """Multiplication and division by a number or by a tensor of the score's indices."""
    divide = _packet(node) in ("div", "true_divide")
    if len(step.operands) == 1:
        if arguments(node)[0] is not step.operands[0] and divide:
            raise NotRecognised("a number divided by the scores")
        factor = _number(arguments(node)[1] if arguments(node)[0] is step.operands[0] else arguments(node)[0])
        product, score = walk.into(step, 0, at)
    else:
        k = walk.scores_operand(step, at)
        if divide and k == 1:
            raise NotRecognised("a number divided by the scores")
        product, score = walk.into(step, k, at)
        factor = walk.load(step.operands[1 - k], step, 1 - k, at)
    return product, score / factor if divide else score * factor


def _added(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    sign = -1 if _packet(node) == "sub" else 1
    if node.kwargs.get("alpha", 1) != 1:
        raise NotRecognised("a sum with alpha")
    if len(step.operands) == 1:
        if arguments(node)[0] is not step.operands[0]:
            raise NotRecognised("the scores are subtracted from a number")
        product, score = walk.into(step, 0, at)
        return product, score + sign * _number(arguments(node)[1])
    k = walk.scores_operand(step, at)
    if k == 1 and sign < 0:
        raise NotRecognised("the scores are subtracted")
    product, score = walk.into(step, k, at)
    other = step.operands[1 - k]
    if only_fill(walk.analyzed.fact(other)) is not None:
        return product, score  # in the support already
    return product, score + sign * walk.load(other, step, 1 - k, at)


def _masked(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    """``masked_fill`` and ``where`` with a fill that the support knows."""
    if walk.analyzed.fact(node).fill not in (Fill.NEG_INF, Fill.NEG):
        raise NotRecognised("the scores are replaced by a number that is no mask")
    return walk.into(step, walk.scores_operand(step, at), at)


def _unary(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    product, score = walk.into(step, 0, at)
    if walk.analyzed.fact(step.operands[0]).fill is not None:
        raise NotRecognised(f"{node.target} after the mask")
    return product, {"tanh": sympy.tanh, "neg": lambda x: -x}[_packet(node)](score)


_POINTWISE: dict[str, Callable[..., tuple[fx.Node, Any]]] = {
    "mul": _scaled,
    "div": _scaled,
    "true_divide": _scaled,
    "add": _added,
    "sub": _added,
    "masked_fill": _masked,
    "where": _masked,
    "tanh": _unary,
    "neg": _unary,
}
