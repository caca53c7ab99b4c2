"""Recognition: which parts of the graph are softmax attention, whatever they are spelled like.

Start at a normaliser over a key axis. Walk back through pointwise ops to the contraction that made the scores, and
forward to the contraction with the values. What lies between becomes the score expression and the support. Recognition
is separate from caching: an attention that is not recognised still runs incrementally, as the ops it was written in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from kvpass.analysis.expressions import branches, number
from kvpass.analysis.facts import Atom, Fact, Fill, Kind, index
from kvpass.analysis.rules.contraction import einsum_names, matmul_names
from kvpass.analysis.sweep import Analyzed, Step
from kvpass.analysis.table import support_of
from kvpass.ir import SCORE, Attention, B, H, I, J

aten = torch.ops.aten


@dataclass(frozen=True)
class Side:
    """One operand of an attention: a value, and which of its flat atoms are batch, heads, rows and depth, in order.

    ``group`` lists the atoms of the query's heads that share one key/value head.
    """

    node: fx.Node
    batch: tuple[int, ...]
    heads: tuple[int, ...]
    row: tuple[int, ...]
    depth: tuple[int, ...]
    group: tuple[int, ...] = ()


@dataclass(frozen=True)
class Load:
    """A tensor that the score expression or the support reads, as ``name(b, h, i, j)``.

    ``axes``: for each flat atom of the node's fact, the letter of the index it follows.
    """

    name: str
    node: fx.Node
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Recognised:
    """One attention of the graph. ``out`` is the value that holds its result, with heads and depth at these atoms."""

    out: fx.Node
    spec: Attention
    query: Side
    key: Side
    value: Side
    result: Side
    loads: tuple[Load, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)


class _No(Exception):
    """This spelling is not recognised; the text says where the walk ended."""


_LAYOUT = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.t.default,
    aten.mT.default,
    aten.repeat_interleave.self_int,
    aten.repeat.default,
    aten.slice.Tensor,
)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)


def recognise(analyzed: Analyzed) -> tuple[dict[fx.Node, Recognised], dict[fx.Node, str]]:
    """Every attention, by the value that holds its result; and for each normaliser that is none, why not."""
    found: dict[fx.Node, Recognised] = {}
    missed: dict[fx.Node, str] = {}
    for node, step in analyzed.steps.items():
        try:
            if node.target is aten.scaled_dot_product_attention.default:
                found[node] = _sdpa(analyzed, node)
            elif node.target in (aten.softmax.int, aten._softmax.default) and _over_rows(node, step):
                match = _spelled(analyzed, node)
                found[match.out] = match
        except _No as reason:
            missed[node] = str(reason)
    return found, missed


def _over_rows(node: fx.Node, step: Step) -> bool:
    fact = step.fact
    return any(fact.atoms[k].kind is Kind.SEQ for k in fact.flat(int(node.args[1])))  # type: ignore[call-overload]


# -- scaled_dot_product_attention -----------------------------------------------------------------------------------


def _sdpa(analyzed: Analyzed, node: fx.Node) -> Recognised:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    args = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v = (analyzed.fact(args[n]) for n in names[:3])
    if args.get("dropout_p"):
        raise _No("dropout inside attention")
    query = _side(args["query"], q, q.flat(-2), q.flat(-1))
    key = _unrepeated(analyzed, _side(args["key"], k, k.flat(-2), k.flat(-1)))
    value = _unrepeated(analyzed, _side(args["value"], v, v.flat(-2), v.flat(-1)))
    result = _side(node, analyzed.fact(node), analyzed.fact(node).flat(-2), analyzed.fact(node).flat(-1))
    scale = args.get("scale")
    size = _count(q, query.depth)
    if isinstance(scale, fx.Node):
        raise _No("a scale that is computed")
    support: Any = sympy.Le(J, I) if args.get("is_causal") else sympy.true
    score: Any = SCORE
    loads: list[Load] = []
    mask = args.get("attn_mask")
    if mask is not None:
        support, score = _mask(analyzed, node, mask, support, loads)
    parts = _Parts(analyzed, node, query, key, value, result)
    return parts.finish(float(scale) if scale is not None else size**-0.5, score, support, loads)


def _mask(analyzed: Analyzed, node: fx.Node, mask: fx.Node, support: Any, loads: list[Load]) -> tuple[Any, Any]:
    """A mask argument as support, or as a load that is added to the score."""
    fact = analyzed.fact(mask)
    letters = _letters(fact, analyzed.fact(node), node)
    if fact.dtype is torch.bool:
        return sympy.And(support, _predicate(analyzed, fact.expr, letters, loads)), SCORE
    known = _only_fill(fact)
    if known is not None:
        return sympy.And(support, _predicate(analyzed, known, letters, loads)), SCORE
    load = Load(f"load_{mask.name}", mask, letters)
    loads.append(load)
    return support, SCORE + sympy.Function(load.name, real=True)(B, H, I, J)


def _only_fill(fact: Fact) -> Any:
    """The support of an additive mask that is zero inside and minus infinity (or very negative) outside."""
    if fact.expr is None:
        return None
    values = {val for val, _ in branches(number(fact.expr))}
    low = {val for val in values if val.is_number and Fill.of(val) in (Fill.NEG_INF, Fill.NEG)}
    known = support_of(fact.expr)
    return known[0] if low and values - low <= {sympy.Integer(0)} and known is not None else None


def _letters(fact: Fact, out: Fact, node: fx.Node) -> tuple[str, ...]:
    """The index letter of each atom of a mask ``[.., S, S]`` that is broadcast against the scores."""
    letters: list[str] = []
    for k, dim in enumerate(fact.dims):
        place = k - len(fact.dims)
        for atom in dim:
            if place == -1:
                letters.append("j")
            elif place == -2:
                letters.append("i")
            else:
                letters.append("b" if atom.kind is Kind.BATCH else "h")
    if len(fact.dims) > 4 or letters.count("h") > 1 or fact.ghosts:
        raise _No(f"a mask of axes {fact}")
    return tuple(letters)


def _predicate(analyzed: Analyzed, expr: Any, letters: tuple[str, ...], loads: list[Load]) -> Any:
    """A predicate over a mask's atoms as one over ``b h i j``; leaf functions become loads."""
    if expr is None:
        raise _No("a mask without a closed form")
    names = {"b": B, "h": H, "i": I, "j": J}
    expr = expr.xreplace({index(k): names[letter] for k, letter in enumerate(letters)})
    by_name = {f"v_{n.name}": n for n in analyzed.steps}
    for leaf in sorted(expr.atoms(AppliedUndef), key=str):
        name = leaf.func.__name__
        if not all(arg in (B, H, I, J) or arg.is_number for arg in leaf.args):
            raise _No(f"a mask that reads {leaf}")
        if all(load.name != name for load in loads):
            loads.append(Load(name, by_name[name], ()))
    return expr


# -- spelled out ----------------------------------------------------------------------------------------------------


def _spelled(analyzed: Analyzed, softmax: fx.Node) -> Recognised:
    """``softmax(f(q k^T)) v`` in any spelling of the products and of ``f``."""
    fact = analyzed.fact(softmax)
    axis = list(fact.flat(int(softmax.args[1])))  # type: ignore[call-overload]
    if len(axis) != 1:
        raise _No("the softmax runs over a merged axis")
    (key_atom,) = axis
    walk = _Walk(analyzed, softmax, key_atom)
    product, score = walk.back(softmax.args[0], tuple(range(len(fact.atoms))))  # type: ignore[arg-type]
    out, weights_at = _forward(analyzed, softmax)
    return walk.match(product, score, out, weights_at)


def _forward(analyzed: Analyzed, softmax: fx.Node) -> tuple[fx.Node, int]:
    """The contraction with the values, and which of its operands the weights are."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise _No("the weights are used more than once")
        user = users[0]
        if user.target in _PRODUCTS and user.target is not aten.baddbmm.default:
            return user, analyzed.steps[user].operands.index(node)
        if user.target not in (aten._to_copy.default, *_LAYOUT):
            raise _No(f"the weights pass through {user.target}")
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
        if node.target in _PRODUCTS:
            self.scores_from = at
            return node, SCORE
        handler = _POINTWISE.get(_packet(node))
        if node.target in _LAYOUT or _packet(node) == "_to_copy":
            return self.back(step.operands[0], _compose(step, 0, at))
        if handler is None:
            raise _No(f"the scores come from {node.target}")
        return handler(self, node, step, at)

    def into(self, step: Step, k: int, at: tuple[int | None, ...]) -> tuple[fx.Node, Any]:
        return self.back(step.operands[k], _compose(step, k, at))

    def scores_operand(self, step: Step) -> int:
        """The operand that depends on rows along both the query and the key axis."""
        heavy = [
            k for k, op in enumerate(step.operands) if len(self.analyzed.fact(op).rows) >= 2 and not self.is_mask(op)
        ]
        if len(heavy) != 1:
            raise _No("it is not clear which operand holds the scores")
        return heavy[0]

    def is_mask(self, node: fx.Node) -> bool:
        fact = self.analyzed.fact(node)
        return fact.expr is not None or fact.index_only()

    def load(self, node: fx.Node, step: Step, k: int, at: tuple[int | None, ...]) -> Any:
        """A tensor that is combined with the scores."""
        fact = self.analyzed.fact(node)
        composed = _compose(step, k, at)
        names = self.names()
        letters = []
        for atom, place in zip(fact.atoms, composed, strict=True):
            if place is None or names[place] is None:
                raise _No(f"{node.name} is combined with the scores along another axis")
            letters.append(names[place])
            del atom
        load = Load(f"load_{node.name}", node, tuple(letters))  # type: ignore[arg-type]
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
        source = self.softmax.args[0]
        fact = self.analyzed.fact(source)  # type: ignore[arg-type]
        if fact.fill is None:
            return sympy.true
        letters = tuple(name or "h" for name in self.names())
        heads = [k for k, name in enumerate(letters) if name == "h" and index(k) in fact.support.free_symbols]
        if len(heads) > 1:
            raise _No("the mask differs by head")
        return _predicate(self.analyzed, fact.support, letters, self.loads)

    def match(self, product: fx.Node, score: Any, out: fx.Node, weights_at: int) -> Recognised:
        q, k = self._query_and_key(product)
        value, result = self._value(out, weights_at)
        parts = _Parts(self.analyzed, out, q, _unrepeated(self.analyzed, k), _unrepeated(self.analyzed, value), result)
        dtype = self.softmax.meta["val"].dtype
        return parts.finish(1.0, score, self.support(), self.loads, dtype)

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
                raise _No("an operand of the scores has no single row axis")
            sides.append((place[row[0]], _side(node, fact, row, depth, self._head_order(fact, row, depth, place))))
        by_row = dict(sides)
        if set(by_row) != {self.row_atom, self.key_atom}:
            raise _No("the scores are not a product of queries and keys")
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
            raise _No("the values have no single row axis")
        heads = [a for a in range(len(fact.atoms)) if fact.atoms[a].kind is Kind.FREE and a not in depth]
        heads = _in_order(heads, list(links))
        rows = [k for k in result.rows if k in mine]
        if len(rows) != 1:
            raise _No("the result has no single row axis")
        return _side(node, fact, row, depth, heads), _side(out, result, rows, [links[depth[0]]])


def _in_order(heads: list[int], place: list[int | None]) -> list[int]:
    """Head atoms in the order of the scores; one that was split there keeps its own place."""
    if any(place[a] is None for a in heads):
        return heads
    return sorted(heads, key=lambda a: place[a] or 0)


def _specs(node: fx.Node, step: Step) -> tuple[list[list[str]], list[str]]:
    """Axis names of a product's two factors and of its result."""
    if node.target is aten.einsum.default:
        return einsum_names(str(node.args[0]), [len(node_.meta["val"].shape) for node_ in step.operands])
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
    raise _No("the scores are combined with a number that is not constant")


def _scaled(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    """Multiplication and division by a number or by a tensor of the score's indices."""
    divide = _packet(node) in ("div", "true_divide")
    if len(step.operands) == 1:
        if node.args[0] is not step.operands[0] and divide:
            raise _No("a number divided by the scores")
        factor = _number(node.args[1] if node.args[0] is step.operands[0] else node.args[0])
        product, score = walk.into(step, 0, at)
    else:
        k = walk.scores_operand(step)
        if divide and k == 1:
            raise _No("a number divided by the scores")
        product, score = walk.into(step, k, at)
        factor = walk.load(step.operands[1 - k], step, 1 - k, at)
    return product, score / factor if divide else score * factor


def _added(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    sign = -1 if _packet(node) == "sub" else 1
    if node.kwargs.get("alpha", 1) != 1:
        raise _No("a sum with alpha")
    if len(step.operands) == 1:
        if node.args[0] is not step.operands[0]:
            raise _No("the scores are subtracted from a number")
        product, score = walk.into(step, 0, at)
        return product, score + sign * _number(node.args[1])
    k = walk.scores_operand(step)
    if k == 1 and sign < 0:
        raise _No("the scores are subtracted")
    product, score = walk.into(step, k, at)
    other = step.operands[1 - k]
    if _only_fill(walk.analyzed.fact(other)) is not None:
        return product, score  # in the support already
    return product, score + sign * walk.load(other, step, 1 - k, at)


def _masked(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    """``masked_fill`` and ``where`` with a fill that the support knows."""
    if walk.analyzed.fact(node).fill not in (Fill.NEG_INF, Fill.NEG):
        raise _No("the scores are replaced by a number that is no mask")
    return walk.into(step, walk.scores_operand(step), at)


def _unary(walk: _Walk, node: fx.Node, step: Step, at: Any) -> tuple[fx.Node, Any]:
    product, score = walk.into(step, 0, at)
    if walk.analyzed.fact(step.operands[0]).fill is not None:
        raise _No(f"{node.target} after the mask")
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


# -- operands -------------------------------------------------------------------------------------------------------


def _side(node: fx.Node, fact: Fact, row: Any, depth: Any, heads: list[int] | None = None) -> Side:
    row, depth = tuple(row), tuple(depth)
    rest = [k for k in range(fact.real) if k not in row and k not in depth]
    batch = tuple(k for k in rest if fact.atoms[k].kind is Kind.BATCH)
    free = [k for k in rest if fact.atoms[k].kind is Kind.FREE]
    if len(batch) + len(free) != len(rest) or len(row) > 1 or fact.ghosts:
        raise _No(f"an operand of axes {fact}")
    return Side(node, batch, tuple(free if heads is None else heads), row, depth)


def _count(fact: Fact, atoms: tuple[int, ...]) -> int:
    return int(sympy.Mul(*(fact.atoms[k].size for k in atoms)))


def _unrepeated(analyzed: Analyzed, side: Side) -> Side:
    """The same operand before its heads were repeated; the repeated atoms become the group.

    ``[K, ~G]`` (``repeat_interleave``, ``expand``) is the layout in which query head ``h`` reads head ``h // G``; only
    that one is taken apart.
    """
    fact = analyzed.fact(side.node)
    repeated = [k for k in side.heads if fact.atoms[k].bcast]
    kept = [k for k in side.heads if not fact.atoms[k].bcast]
    if not repeated or list(side.heads) != kept + repeated:
        return side
    node, place = side.node, {k: k for k in range(len(fact.atoms)) if k not in repeated and fact.atoms[k].size != 1}
    found = False
    while node.target in _LAYOUT and not found:  # to the nearest one: what is stored is no nearer to the inputs
        step = analyzed.steps[node]
        source = step.operands[0]
        back = {link: a for a, link in enumerate(step.links[0]) if link is not None}
        if not all(k in back for k in place.values()):
            break
        node, place = source, {mine: back[k] for mine, k in place.items()}
        inner = analyzed.fact(node)
        found = sum(1 for a in inner.atoms if a.size != 1) == len(place)
    if not found:
        return side
    move: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda ks: tuple(place[k] for k in ks if k in place)  # noqa: E731
    batch = tuple(k for k, a in enumerate(analyzed.fact(node).atoms) if a.kind is Kind.BATCH)
    return Side(node, batch, move(tuple(kept)), move(side.row), move(side.depth), tuple(repeated))


@dataclass
class _Parts:
    """Everything but the score: checks that the operands fit and makes the spec."""

    analyzed: Analyzed
    out: fx.Node
    query: Side
    key: Side
    value: Side
    result: Side

    def finish(
        self, scale: float, score: Any, support: Any, loads: list[Load], softmax_dtype: torch.dtype | None = None
    ) -> Recognised:
        fact = self.analyzed.fact
        q, k, v = fact(self.query.node), fact(self.key.node), fact(self.value.node)
        heads = _count(q, self.query.heads)
        kv_heads, value_heads = _count(k, self.key.heads), _count(v, self.value.heads)
        if kv_heads != value_heads or kv_heads == 0 or heads % kv_heads:
            raise _No(f"{heads} query heads over {kv_heads} key heads and {value_heads} value heads")
        dtypes = {q.dtype, k.dtype, v.dtype}
        if len(dtypes) != 1 and softmax_dtype is None:
            raise _No("operands of several dtypes")
        spec = Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_size=_count(q, self.query.depth),
            value_size=_count(v, self.value.depth),
            dtype=self.out.meta["val"].dtype,
            scale=scale,
            score=score,
            support=support,
            loads=tuple(load.name for load in loads),
            softmax_dtype=softmax_dtype,
        )
        return Recognised(self.out, spec, self.query, self.key, self.value, self.result, tuple(loads))


def atoms_of(fact: Fact) -> tuple[Atom, ...]:
    return fact.atoms[: fact.real]
