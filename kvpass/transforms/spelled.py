"""Attention that is spelled out: ``softmax(f(q k^T)) v`` in any spelling of the products and of ``f``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from kvpass.analysis.expressions import implies
from kvpass.analysis.facts import Fact, Fill, Kind, index, product
from kvpass.analysis.rules.contraction import einsum_names, matmul_names
from kvpass.analysis.sweep import Analyzed, Step, arguments
from kvpass.ir import SCORE, B, H, I, J
from kvpass.transforms.ahead import Ahead, forward, packet
from kvpass.transforms.heads import arranged, carried, heads_of, keys_first
from kvpass.transforms.plan import MOVES
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
    hides_all,
    inside,
    narrow,
    only_fill,
    predicate,
    side_of,
)

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
    return walk.match(product, score, forward(analyzed, softmax))


def of_product(analyzed: Analyzed, node: fx.Node) -> bool:
    """True where a product is found among what a value is computed from by ops on scores."""
    if node.target in PRODUCTS:
        return True
    passed = node.target in LAYOUT or packet(node) == "_to_copy" or packet(node) in _POINTWISE
    return passed and any(of_product(analyzed, operand) for operand in analyzed.steps[node].operands)


class _Walk:
    """From a softmax back to the product of queries and keys."""

    def __init__(self, analyzed: Analyzed, softmax: fx.Node, key_atom: int) -> None:
        self.analyzed, self.softmax, self.key_atom = analyzed, softmax, key_atom
        self.fact = analyzed.fact(softmax)
        self.loads: list[Load] = []
        self.by_head: list[list[int]] = []
        self.moved = False
        self.of_context = self.fact.atoms[key_atom].kind is Kind.FREE
        self.row_atom = next((k for k in self.fact.rows if k != key_atom), self._before_keys())
        self.scores_from: tuple[int | None, ...] = ()
        self.hidden: list[Any] = []

    def _before_keys(self) -> int | None:
        """The axis of queries of the context: the one before the keys."""
        *_, queries, keys = [[], *(list(self.fact.flat(d)) for d in range(len(self.fact.dims)))]
        return queries[0] if self.of_context and len(queries) == 1 and keys == [self.key_atom] else None

    def back(self, node: fx.Node, at: tuple[int | None, ...]) -> tuple[fx.Node, Any]:
        """``(product, score)``: ``at`` says which atom of the softmax each atom of ``node`` is."""
        step = self.analyzed.steps[node]
        if node.target in PRODUCTS:
            self.scores_from = at
            return node, self.biased(node, step, at) if node.target is aten.baddbmm.default else SCORE
        handler = _POINTWISE.get(packet(node))
        self.moved |= node.target in MOVES
        if node.target in LAYOUT or packet(node) == "_to_copy":
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
        if self.leaves_out(bias, _compose(step, 0, at)):
            return alpha * SCORE
        return alpha * SCORE + beta * self.load(bias, step, 0, at)

    def into(self, step: Step, k: int, at: tuple[int | None, ...]) -> tuple[fx.Node, Any]:
        return self.back(step.operands[k], _compose(step, k, at))

    def scores_operand(self, step: Step, at: tuple[int | None, ...]) -> int:
        """The operand that depends on rows along both the query and the key axis; of several, a product of the two."""
        heavy = [k for k, op in enumerate(step.operands) if self.is_scores(op)]
        found = heavy if len(heavy) == 1 else [k for k in heavy if self.leads_to_a_product(step, k, at)]
        if not found:
            raise NotRecognised("it is not clear which operand holds the scores")
        return found[0]

    def leads_to_a_product(self, step: Step, k: int, at: tuple[int | None, ...]) -> bool:
        """True where an operand is made of queries and keys alone: relative positions read a table as well."""
        loads, hidden = self.loads.copy(), self.hidden.copy()
        try:
            self._query_and_key(self.into(step, k, at)[0])
        except NotRecognised:
            return False
        finally:
            self.loads[:], self.hidden[:] = loads, hidden
        return True

    def is_scores(self, node: fx.Node) -> bool:
        if self.of_context:  # whose scores need not depend on a row
            return of_product(self.analyzed, node)
        return len(self.analyzed.fact(node).rows) >= 2 and not self.is_mask(node)

    def stays(self, mask: fx.Node) -> bool:
        """True of a mask that is added as the numbers it holds."""
        return self.of_context and hides_all(self.analyzed.fact(mask))

    def leaves_out(self, mask: fx.Node, at: tuple[int | None, ...], sign: int = 1) -> bool:
        """True of a mask that is added and no more than that: the support says it."""
        known = only_fill(self.analyzed.fact(mask), sign)
        if known is None or self.stays(mask):
            return False
        self.hides(mask, known, at)
        return True

    def hides(self, node: fx.Node, support: Any, at: tuple[int | None, ...]) -> None:
        """A mask that is left out of the score, since the support of the softmax has it: looked at in the end."""
        names = self.names()
        letters = [None if place is None else names[place] for place in at]
        if any(x is None and index(k) in support.free_symbols for k, x in enumerate(letters)):
            raise NotRecognised(f"{node.name} masks the scores along another axis")
        self.hidden.append(self.over(self.analyzed.fact(node), support, letters))

    def over(self, fact: Fact, support: Any, letters: Sequence[str | None]) -> Any:
        """A support over ``b h i j``; what it reads is loaded."""
        by_head = any(x == "h" and index(k) in support.free_symbols for k, x in enumerate(letters))
        if by_head and len(heads_of(self.fact, (self.row_atom, self.key_atom))) > 1:
            raise NotRecognised("the mask differs by head")
        return predicate(self.analyzed, fact, support, tuple(x or "h" for x in letters), self.loads)

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
        by_head = [place for place, x in zip(composed, letters, strict=True) if x == "h" and place is not None]
        self.by_head += [by_head] if by_head else []
        known = closed(self.analyzed, fact, letters)
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
        if fact.fill is None or self.stays(source):
            return sympy.true
        support = self.over(fact, fact.support, self.names())
        if fact.fill is Fill.NEG and emptied_by_index(support, self.of_context):
            raise NotRecognised("a finite fill empties a row")
        return support

    def sink(self, node: fx.Node) -> str:
        """The name of the read of a sink: one entry for each head."""
        fact, letters = self.analyzed.fact(node), iter(self.names())
        along = [{x for atom, x in zip(dim, letters, strict=False) if atom.size != 1} for dim in self.fact.dims]
        sizes = [product(dim) for dim in fact.dims]
        wanted = [product(dim) if x == {"h"} else 1 for x, dim in zip(along, self.fact.dims, strict=True)]
        if sizes != wanted or fact.ghosts or self.softmax_order != sorted(self.softmax_order):
            raise NotRecognised(f"a sink of axes {fact}")
        load = Load(f"load_{node.name}", node, ("h",) * len(fact.atoms))
        self.loads.append(load)
        return load.name

    def match(self, product: fx.Node, score: Any, ahead: Ahead) -> Recognised:
        q, k = self._query_and_key(product)
        value, result = self._value(ahead)
        dtype = self.analyzed.fact(value.node).dtype
        q, k = self._narrowed(q, k, dtype)
        key, value, scale = grouped(self.analyzed, k, value)
        q, key = self._narrowed(q, key, dtype)
        parts = Parts(self.analyzed, ahead.out, q, key, value, result)
        support = self.support()
        if not all(implies(support, mask) for mask in self.hidden):
            raise NotRecognised("a mask of the scores that is no longer one where the softmax reads them")
        strict = self.analyzed.fact(arguments(self.softmax)[0]).fill is Fill.NEG_INF  # an empty row is NaN
        strict = strict and self.softmax.target is not aten._safe_softmax.default and not ahead.zeroed
        dtype = self.softmax.meta["val"].dtype
        name = None if ahead.sink is None else self.sink(ahead.sink)
        empty_is_nan = strict and not always_keeps_a_key(support, self.of_context)
        if empty_is_nan and ahead.unsure:
            raise NotRecognised("a row without keys that is partly set to zero")
        return parts.finish(scale, inside(score, support), support, self.loads, dtype, empty_is_nan, name)

    def _narrowed(self, query: Side, key: Side, dtype: torch.dtype) -> tuple[Side, Side]:
        """Queries and keys as they were before both were cast up from the type of the values."""
        sides = narrow(self.analyzed, query), narrow(self.analyzed, key)
        return sides if all(self.analyzed.fact(side.node).dtype is dtype for side in sides) else (query, key)

    def _query_and_key(self, product: fx.Node) -> tuple[Side, Side]:
        step = self.analyzed.steps[product]
        first = 1 if product.target is aten.baddbmm.default else 0
        found = {}
        for k in (first, first + 1):
            fact = self.analyzed.fact(step.operands[k])
            place = [None if p is None else self.scores_from[p] for p in step.links[k]]
            ends = (self.row_atom, self.key_atom)
            row = [a for a, p in enumerate(place) if p is not None and p in ends]
            row = row if self.of_context else [a for a in row if fact.atoms[a].kind is Kind.SEQ]
            if len(row) != 1 or place[row[0]] is None:
                raise NotRecognised("an operand of the scores has no single row axis")
            found[place[row[0]]] = k, row
        if set(found) != {self.row_atom, self.key_atom}:
            raise NotRecognised("the scores are not a product of queries and keys")
        self._order(step, found[self.key_atom][0])
        query, key = (self._factor(product, k, first, row) for k, row in (found[self.row_atom], found[self.key_atom]))
        return query, key

    def _order(self, step: Step, key: int) -> None:
        """The order of the heads in the product, and in the softmax."""
        ends = [a for a, p in enumerate(self.scores_from) if p in (self.row_atom, self.key_atom)]
        self.order = keys_first(heads_of(step.fact, ends), set(step.links[key]))
        there = heads_of(self.fact, (self.row_atom, self.key_atom))
        self.softmax_order = carried(self.order, self.scores_from, self.moved, there)
        if any(atoms != self.softmax_order for atoms in self.by_head):  # a head is one number
            raise NotRecognised("something is read by some axes of the heads, or in another order")

    def _factor(self, product: fx.Node, k: int, first: int, row: list[int]) -> Side:
        step = self.analyzed.steps[product]
        fact = self.analyzed.fact(step.operands[k])
        depth = _contracted(product, step, fact, k - first)
        heads = arranged(heads_of(fact, (*depth, *row)), step.links[k], self.order)
        return side_of(step.operands[k], fact, row, depth, heads)

    def _value(self, ahead: Ahead) -> tuple[Side, Side]:
        out, other = ahead.out, 1 - ahead.weights_at
        step, result = self.analyzed.steps[out], self.analyzed.fact(out)
        node = step.operands[other]
        fact, links = self.analyzed.fact(node), step.links[other]
        row = [a for a in (_contracted(out, step, fact, other) if self.of_context else fact.rows) if links[a] is None]
        depth = _own_axes(out, step, fact, other)
        if len(row) != 1 or len(depth) != 1 or links[depth[0]] is None:
            raise NotRecognised("the values have no single row axis")
        rows = [k for k in result.rows if k in step.links[ahead.weights_at]]
        if not rows and self.row_atom is not None and (place := ahead.places[self.row_atom]) is not None:
            rows = [place]
        if len(rows) != 1:
            raise NotRecognised("the result has no single row axis")
        size = [links[depth[0]]]
        order = carried(self.softmax_order, ahead.places, ahead.moved, heads_of(result, (*size, *rows)))
        value = side_of(node, fact, row, depth, arranged(heads_of(fact, (*depth, *row)), links, order))
        return value, side_of(out, result, rows, size, order)


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


def _compose(step: Step, k: int, at: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return tuple(None if link is None else at[link] for link in step.links[k])


def _number(arg: Any) -> Any:
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return sympy.Float(arg) if isinstance(arg, float) else sympy.Integer(arg)
    raise NotRecognised("the scores are combined with a number that is not constant")


def _scaled(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    """Multiplication and division by a number or by a tensor of the score's indices."""
    divide = packet(node) in ("div", "true_divide")
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
    sign = -1 if packet(node) == "sub" else 1
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
    if walk.leaves_out(other, _compose(step, 1 - k, at), sign):
        return product, score
    return product, score + sign * walk.load(other, step, 1 - k, at)


def _floored(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    """A floor under the scores: a number, or a tensor that holds one."""
    k = 0 if len(step.operands) == 1 else walk.scores_operand(step, at)
    given: Any = arguments(node)[1]
    if len(arguments(node)) > 2 or node.kwargs:
        raise NotRecognised("scores between two bounds")
    if len(step.operands) > 1:
        value = walk.analyzed.fact(step.operands[1 - k]).expr
        given = float(value) if value is not None and value.is_number else None
    product, score = walk.into(step, k, at)
    floor = _number(given)
    return product, score if floor <= torch.finfo(node.meta["val"].dtype).min else sympy.Max(score, floor)


def _masked(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    """``masked_fill`` and ``where`` with a fill that the support knows."""
    if walk.stays(node):
        raise NotRecognised("a finite fill by which the context may hide all its keys")
    fact = walk.analyzed.fact(node)
    if fact.fill not in (Fill.NEG_INF, Fill.NEG):
        raise NotRecognised("the scores are replaced by a number that is no mask")
    walk.hides(node, fact.support, at)
    return walk.into(step, walk.scores_operand(step, at), at)


def _unary(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    product, score = walk.into(step, 0, at)
    if walk.analyzed.fact(step.operands[0]).fill is not None:
        raise NotRecognised(f"{node.target} after the mask")
    return product, {"tanh": sympy.tanh, "neg": lambda x: -x}[packet(node)](score)


_POINTWISE: dict[str, Callable[..., tuple[fx.Node, Any]]] = {
    "mul": _scaled,
    "div": _scaled,
    "true_divide": _scaled,
    "add": _added,
    "sub": _added,
    "masked_fill": _masked,
    "where": _masked,
    **dict.fromkeys(("max", "maximum", "clamp", "clamp_min"), _floored),
    "tanh": _unary,
    "neg": _unary,
}
