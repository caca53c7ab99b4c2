"""The parts of an attention: its operands as batch, heads, rows and depth, its mask, and what it reads beside them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Piecewise
from sympy.core.function import AppliedUndef
from torch import fx

from kvpass.analysis.expressions import apply, branches, contradicts, number, simplify, substitute
from kvpass.analysis.facts import Fact, Fill, Kind, index
from kvpass.analysis.sweep import Analyzed, ancestry, arguments
from kvpass.analysis.table import support_of
from kvpass.ir import SCORE, Attention, B, H, I, J, Read
from kvpass.transforms.plan import MOVES, UNITS

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

    ``axes``: for each flat atom of the node's fact, the letter of the index it follows; None for a leaf of a support.
    """

    name: str
    node: fx.Node
    axes: tuple[str, ...] | None

    def read(self, fact: Fact) -> Read:
        if self.axes is None:
            return Read(self.name, fact.dtype)
        kept = {x for x, atom in zip(self.axes, fact.atoms, strict=False) if atom.size != 1}
        # A single number is read as one for each head: a read without axes is one of a support.
        return Read(self.name, fact.dtype, "".join(x for x in "bhij" if x in (kept or "h")))


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


class NotRecognised(Exception):
    """This spelling is not recognised; the text says where the walk ended."""


LAYOUT = (
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
_LONGEST = 40  # ops of a closed form that is cheaper to compute for each score than to read
FEATURES = (aten.embedding.default, aten.linear.default, aten.mm.default, aten.addmm.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)


def hides_all(fact: Fact) -> bool:
    """True of a finite fill by which the contents of a context may hide all its keys: what is then a mean over all of
    them is an answer like any other, so that the mask stays what it is, numbers.

    (Of rows that see no row the answer has no meaning: `Fact.valid`.)
    """
    return fact.fill is Fill.NEG and bool(fact.support.atoms(AppliedUndef))


def only_fill(fact: Fact, sign: int = 1) -> Any:
    """The support of an additive mask that is zero inside and minus infinity (or very negative) outside; None where it
    is both outside, since the support knows the stronger one alone.

    Args:
        sign: -1 for a mask that is taken off.
    """
    expr = fact.expr if sign > 0 or fact.expr is None else apply(operator.neg, fact.expr)
    if expr is None:
        return None
    values = {val for val, _ in branches(number(expr))}
    low = {val for val in values if val.is_number and Fill.of(val) in (Fill.NEG_INF, Fill.NEG)}
    known = support_of(expr)
    if len({Fill.of(val) for val in low}) != 1 or not values - low <= {sympy.Integer(0)} or known is None:
        return None
    return known[0]


def _places(analyzed: Analyzed, fact: Fact, letters: Sequence[str | None]) -> dict[sympy.Symbol, sympy.Expr]:
    """Every index over ``b h i j``, which count rows from the first one of what stands before the text."""
    found: dict[sympy.Symbol, sympy.Expr] = {}
    for k, letter in enumerate(letters):
        atom, place = fact.atoms[k], {"b": B, "h": H, "i": I, "j": J}[str(letter)]
        found[index(k)] = place - analyzed.captured.lead - atom.start if atom.kind is Kind.SEQ else place
    return found


def closed(analyzed: Analyzed, fact: Fact, letters: Sequence[str | None]) -> Any:
    """A function of indices alone, over ``b h i j``: part of the score, and nothing is read. None for anything else."""
    if fact.expr is None or fact.expr.atoms(AppliedUndef) or letters.count("h") > 1:
        return None
    value = number(fact.expr).xreplace(_places(analyzed, fact, letters))
    return value if value.free_symbols <= {B, H, I, J} and sympy.count_ops(value) <= _LONGEST else None


def without_fill(value: Any) -> tuple[Any, Any, Fill | None]:
    """``(value, support, fill)`` of an additive mask: what is added inside the support, and what stands outside."""
    inside, outside, fills = [], [], set()
    for val, cond in branches(value):
        fill = Fill.of(val) if val.is_number else None
        if fill in (Fill.NEG_INF, Fill.NEG):
            outside.append(cond)
            fills.add(fill)
        else:
            inside.append((val, cond))
    if not outside or not inside:
        return value, sympy.true, None
    fill = Fill.NEG if Fill.NEG in fills else Fill.NEG_INF
    return Piecewise(*inside[:-1], (inside[-1][0], True)), simplify(sympy.Not(sympy.Or(*outside))), fill


def inside(score: Any, support: Any) -> Any:
    """A score where it matters: choices that the support has made are made."""
    for choice in score.atoms(Piecewise):
        kept = [val for val, cond in branches(choice) if not contradicts(sympy.And(support, cond))]
        if len(kept) == 1:
            score = score.xreplace({choice: kept[0]})
    return score


def predicate(analyzed: Analyzed, fact: Fact, expr: Any, letters: tuple[str, ...], loads: list[Load]) -> Any:
    """A predicate over a mask's atoms as one over ``b h i j``; leaf functions become loads."""
    if expr is None:
        raise NotRecognised("a mask without a closed form")
    expr = substitute(expr, _places(analyzed, fact, letters))
    for leaf in sorted(expr.atoms(AppliedUndef), key=str):
        name = leaf.func.__name__
        if not all(arg in (B, H, I, J) or arg.is_number for arg in leaf.args):
            raise NotRecognised(f"a mask that reads {leaf}")
        if {I, J} <= set(leaf.args) and _of_features(analyzed.leaves[name]):
            raise NotRecognised("a mask of pairs of rows that is made of their features, for every pair anew")
        if all(load.name != name for load in loads):
            loads.append(Load(name, analyzed.leaves[name], None))
    return expr


def _of_features(node: fx.Node) -> bool:
    """True of what is computed from what a projection or a table makes of tokens."""
    return any(one.target in (*PRODUCTS, *FEATURES) for one in ancestry(node))


def side_of(node: fx.Node, fact: Fact, row: Any, depth: Any, heads: list[int] | None = None) -> Side:
    row, depth = tuple(row), tuple(depth)
    rest = [k for k in range(fact.real) if k not in row and k not in depth]
    batch = tuple(k for k in rest if fact.atoms[k].kind is Kind.BATCH)
    free = [k for k in rest if fact.atoms[k].kind is Kind.FREE]
    if len(batch) + len(free) != len(rest) or len(row) > 1 or fact.ghosts:
        raise NotRecognised(f"an operand of axes {fact}")
    return Side(node, batch, tuple(free if heads is None else heads), row, depth)


def count(fact: Fact, atoms: tuple[int, ...]) -> int:
    size = sympy.Mul(*(fact.atoms[k].size for k in atoms))
    if not size.is_Integer:
        raise NotRecognised(f"an axis of {size} entries, whose number is not known")
    return int(size)


def grouped(analyzed: Analyzed, key: Side, value: Side) -> tuple[Side, Side, float]:
    """Keys and values before their heads were repeated, and the number that the keys were multiplied by afterwards.

    Where one of the two has fewer heads then, it stays as it is.
    """
    (keys, factor), values = unrepeated_key(analyzed, key), unrepeated(analyzed, value)
    of_key, of_value = (count(analyzed.fact(side.node), side.heads) for side in (keys, values))
    if of_key < of_value:
        keys, factor = key, 1.0
    return keys, values if of_value >= of_key else value, factor


def unrepeated(analyzed: Analyzed, side: Side) -> Side:
    """The same operand before its heads were repeated; the repeated atoms become the group."""
    return _unrepeated(analyzed, side, lambda _: None)[0]


def unrepeated_key(analyzed: Analyzed, side: Side) -> tuple[Side, float]:
    """The same for keys, and the number that they were multiplied by after they had been repeated."""
    return _unrepeated(analyzed, side, factor_of)


def factor_of(node: fx.Node) -> float | None:
    """The number by which an op multiplies its only operand."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or node.kwargs:
        return None
    number = arguments(node)[1]
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number == 0:
        return None
    return float(number) if node.target is aten.mul.Tensor else 1.0 / number


def _unrepeated(analyzed: Analyzed, side: Side, factor: Callable[[fx.Node], float | None]) -> tuple[Side, float]:
    """Heads of ``[K, ~G]``, as ``repeat_interleave`` and ``expand`` make them, are taken apart; no others: query head
    ``h`` reads head ``h // G``.
    """
    fact = analyzed.fact(side.node)
    repeated = [k for k in side.heads if fact.atoms[k].bcast]
    kept = [k for k in side.heads if not fact.atoms[k].bcast]
    if not repeated or list(side.heads) != kept + repeated:
        return side, 1.0
    node, place, scale = side.node, {k: k for k in _real(fact) if k not in repeated}, 1.0
    found = False
    # To the nearest one, but for axes of size one: what is stored is no nearer to the inputs.
    while node.target in UNITS or (not found and (node.target in LAYOUT or factor(node) is not None)):
        scale *= factor(node) or 1.0
        before = _before(analyzed, node, place)
        if before is None:
            break
        node, place = before
        found = len(_real(analyzed.fact(node))) == len(place)
    return (_moved(analyzed, side, node, place, tuple(repeated)), scale) if found else (side, 1.0)


def narrow(analyzed: Analyzed, side: Side) -> Side:
    """The same operand before it was cast to float32, in which kernels sum up the products of half precision anyway."""
    node, place = side.node, {k: k for k in _real(analyzed.fact(side.node))}
    if analyzed.fact(node).dtype is not torch.float32:
        return side
    while node.target in (*LAYOUT, aten._to_copy.default):
        before = _before(analyzed, node, place)
        if before is None:
            break
        node, place = before
        if analyzed.fact(node).dtype in (torch.bfloat16, torch.float16):
            return _moved(analyzed, side, node, place, side.group)
    return side


def at_stored(analyzed: Analyzed, side: Side, stored: Callable[[fx.Node], bool]) -> Side:
    """The same operand at the stored value that it is a permutation of; as it is where there is none."""
    node, place = side.node, {k: k for k in _real(analyzed.fact(side.node))}
    while not stored(node):
        before = _before(analyzed, node, place) if node.target in (*MOVES, *UNITS) else None
        if before is None:
            return side
        node, place = before
    return side if node is side.node else _moved(analyzed, side, node, place, side.group)


def _real(fact: Fact) -> list[int]:
    """The atoms that are not of size one."""
    return [k for k, atom in enumerate(fact.atoms) if atom.size != 1]


def _before(analyzed: Analyzed, node: fx.Node, place: dict[int, int]) -> tuple[fx.Node, dict[int, int]] | None:
    """The operand of an op that moves entries, and where its atoms have the places; None where some are not there."""
    step = analyzed.steps[node]
    back = {link: a for a, link in enumerate(step.links[0]) if link is not None}
    if not all(k in back for k in place.values()):
        return None
    return step.operands[0], {mine: back[k] for mine, k in place.items()}


def _moved(analyzed: Analyzed, side: Side, node: fx.Node, place: dict[int, int], group: tuple[int, ...]) -> Side:
    """A side at another value, where its atoms have these places."""
    heads, row, depth = (tuple(place[k] for k in ks if k in place) for ks in (side.heads, side.row, side.depth))
    batch = tuple(k for k, a in enumerate(analyzed.fact(node).atoms) if a.kind is Kind.BATCH)
    return Side(node, batch, heads, row, depth, group)


def always_keeps_a_key(support: Any, of_context: bool = False) -> bool:
    """True where every row is proved to see its own key; a context has none that is a row's own."""
    return bool((support if of_context else simplify(support.xreplace({J: I}))) == sympy.true)


def emptied_by_index(support: Any, of_context: bool = False) -> bool:
    """True where some row may see no key whatever the caller's data are: a finite fill then means a mean over all."""
    terms = sympy.And.make_args(support if of_context else simplify(support.xreplace({J: I})))
    return any(term != sympy.true and not term.atoms(AppliedUndef) for term in terms)


@dataclass
class Parts:
    """Everything but the score: checks that the operands fit and makes the spec."""

    analyzed: Analyzed
    out: fx.Node
    query: Side
    key: Side
    value: Side
    result: Side

    def _counted(self, fact: Fact, side: Side) -> bool:
        """True where entry ``k`` is what ``i`` or ``j`` is for: row ``k``, or the ``k``-th of the context.

        Only keys and values may have something before the first row.
        """
        rows = [fact.atoms[k] for k in side.row]
        lead, seq = self.analyzed.captured.lead, self.analyzed.captured.seq
        tables = [(-lead, seq + lead)] + [(sympy.S.Zero, seq)] * (side is self.query and lead.is_number)
        return len(rows) == 1 and (rows[0].kind is Kind.FREE or (rows[0].start, rows[0].size) in tables)

    def finish(
        self,
        scale: float,
        score: Any,
        support: Any,
        loads: list[Load],
        softmax_dtype: torch.dtype | None = None,
        empty_is_nan: bool = False,
        sink: str | None = None,
    ) -> Recognised:
        fact = self.analyzed.fact
        q, k, v = fact(self.query.node), fact(self.key.node), fact(self.value.node)
        heads = count(q, self.query.heads)
        kv_heads, value_heads = count(k, self.key.heads), count(v, self.value.heads)
        if count(fact(self.out), self.result.heads) != heads:
            raise NotRecognised("the result has other heads than the queries")
        if kv_heads != value_heads or kv_heads == 0 or heads % kv_heads:
            raise NotRecognised(f"{heads} query heads over {kv_heads} key heads and {value_heads} value heads")
        dtypes = {q.dtype, k.dtype, v.dtype}
        if len(dtypes) != 1:  # where the model rounds its scores is its own business then
            raise NotRecognised("operands of several dtypes")
        sizes = (score.free_symbols | support.free_symbols) - {SCORE, B, H, I, J}
        if sizes:
            raise NotRecognised(f"a mask that speaks of the size {min(map(str, sizes))}")
        of_rows = score.replace(lambda e: isinstance(e, AppliedUndef), lambda e: sympy.Integer(0)).has(I, J)
        if (support != sympy.true or of_rows) and not (self._counted(q, self.query) and self._counted(k, self.key)):
            raise NotRecognised("a mask over something else than all rows of the sequence")  # it speaks of rows
        spec = Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_size=count(q, self.query.depth),
            value_size=count(v, self.value.depth),
            dtype=self.out.meta["val"].dtype,
            scale=scale,
            score=score,
            support=support,
            reads=tuple(load.read(fact(load.node)) for load in loads),
            softmax_dtype=softmax_dtype,
            empty_is_nan=empty_is_nan,
            sink=sink,
        )
        return Recognised(self.out, spec, self.query, self.key, self.value, self.result, tuple(loads))
