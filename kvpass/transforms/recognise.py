"""Recognition: which parts of the graph are softmax attention, whatever they are spelled like.

Start at a normaliser over a key axis. Walk back through pointwise ops to the contraction that made the scores, and
forward to the contraction with the values. What lies between becomes the score expression and the support. Recognition
is separate from caching: an attention that is not recognised still runs incrementally, as the ops it was written in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from kvpass.analysis.facts import Fact, Fill, Kind
from kvpass.analysis.sweep import Analyzed, Step, arguments
from kvpass.ir import SCORE, B, H, I, J
from kvpass.transforms.heads import heads_of, keys_first
from kvpass.transforms.sides import (
    Load,
    NotRecognised,
    Parts,
    Recognised,
    closed,
    count,
    emptied_by_index,
    grouped,
    hides_all,
    only_fill,
    predicate,
    side_of,
    without_fill,
)
from kvpass.transforms.sinks import SOFTMAX
from kvpass.transforms.spelled import of_product, spelled

aten = torch.ops.aten


def recognise(analyzed: Analyzed) -> tuple[dict[fx.Node, Recognised], dict[fx.Node, str]]:
    """Every attention, by the value that holds its result; and for each normaliser that is none, why not."""
    found: dict[fx.Node, Recognised] = {}
    missed: dict[fx.Node, str] = {}
    for node, step in analyzed.steps.items():
        try:
            if node.target is aten.scaled_dot_product_attention.default:
                found[node] = _sdpa(analyzed, node)
            elif node.target in (*SOFTMAX, aten._safe_softmax.default) and (
                step.fact.context or _over_rows(node, step)
            ):
                match = spelled(analyzed, node)
                found[match.out] = match
        except NotRecognised as reason:
            if node.target is aten.scaled_dot_product_attention.default or _of_scores(analyzed, node, step):
                missed[node] = str(reason)
    return found, missed


def _over_rows(node: fx.Node, step: Step) -> bool:
    fact = step.fact
    return any(fact.atoms[k].kind is Kind.SEQ for k in fact.flat(int(arguments(node)[1])))


def _of_scores(analyzed: Analyzed, node: fx.Node, step: Step) -> bool:
    """False of what chooses among experts by the context."""
    return _over_rows(node, step) or of_product(analyzed, arguments(node)[0])


def _sdpa(analyzed: Analyzed, node: fx.Node) -> Recognised:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    args: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v = (analyzed.fact(args[n]) for n in names[:3])
    if args.get("dropout_p"):
        raise NotRecognised("dropout inside attention")
    query = side_of(args["query"], q, q.flat(-2), q.flat(-1))
    key, value = side_of(args["key"], k, k.flat(-2), k.flat(-1)), side_of(args["value"], v, v.flat(-2), v.flat(-1))
    key, value, factor = grouped(analyzed, key, value)
    out = analyzed.fact(node)
    result = side_of(node, out, out.flat(-2), out.flat(-1))
    heads = heads_of(out, (*result.row, *result.depth))
    if keys_first(heads, set(analyzed.steps[node].links[1])) != heads and not args.get("enable_gqa"):
        raise NotRecognised("the heads of the keys do not come first")
    scale = args.get("scale")
    size = count(q, query.depth)
    if isinstance(scale, fx.Node):
        raise NotRecognised("a scale that is computed")
    support: Any = sympy.Le(J, I) if args.get("is_causal") else sympy.true
    score: Any = SCORE
    loads: list[Load] = []
    mask = args.get("attn_mask")
    if mask is not None:
        of_context = all(analyzed.fact(key.node).atoms[x].kind is Kind.FREE for x in key.row)
        support, score = _mask(analyzed, node, mask, support, loads, of_context)
    parts = Parts(analyzed, node, query, key, value, result)
    return parts.finish(factor * (float(scale) if scale is not None else size**-0.5), score, support, loads)


def _mask(
    analyzed: Analyzed, node: fx.Node, mask: fx.Node, support: Any, loads: list[Load], of_context: bool
) -> tuple[Any, Any]:
    """A mask argument as support, or as a load that is added to the score."""
    fact = analyzed.fact(mask)
    letters = _letters(fact, analyzed.fact(node), analyzed.steps[node].links[3])
    if fact.dtype is torch.bool:
        return sympy.And(support, predicate(analyzed, fact, fact.expr, letters, loads)), SCORE
    added: Any = sympy.Integer(0)
    kept, fill = sympy.true, fact.fill
    numbers = hides_all(fact) and of_context
    if (known := only_fill(fact)) is not None and not numbers:
        kept = predicate(analyzed, fact, known, letters, loads)
    elif (value := closed(analyzed, fact, letters)) is not None and not numbers:
        added, kept, fill = without_fill(value)
    else:
        if (
            fill in (Fill.NEG_INF, Fill.NEG) and not numbers
        ):  # it stands in the load as well, so a row that it empties may keep it
            inside = predicate(analyzed, fact, fact.support, letters, loads)
            kept = inside if fill is Fill.NEG_INF or not emptied_by_index(inside, of_context) else kept
        load = Load(f"load_{mask.name}", mask, letters)
        loads.append(load)
        added = sympy.Function(load.name, real=True)(B, H, I, J)
    support = sympy.And(support, kept)
    if fill is Fill.NEG and emptied_by_index(support, of_context):
        raise NotRecognised("a finite fill empties a row")
    return support, SCORE + added


def _letters(fact: Fact, out: Fact, links: Sequence[int | None]) -> tuple[str, ...]:
    """The index letter of each atom of a mask ``[.., S, S]`` that is broadcast against the scores."""
    heads = tuple(heads_of(out, (*out.flat(-2), *out.flat(-1))))
    letters: list[str] = []
    for k, dim in enumerate(fact.dims):
        place = k - len(fact.dims)
        for atom in dim:
            if place == -1:
                letters.append("j")
            elif place == -2:
                letters.append("i")
            else:
                beside = links[len(letters)]  # a batch of a known size is made of free entries
                kinds = (atom.kind, None if beside is None else out.atoms[beside].kind)
                letters.append("b" if Kind.BATCH in kinds else "h")
    mine = count(fact, tuple(k for k, x in enumerate(letters) if x == "h"))
    if len(fact.dims) > 4 or letters.count("h") > 1 or fact.ghosts or mine not in (1, count(out, heads)):
        raise NotRecognised(f"a mask of axes {fact}")
    return tuple(letters)


__all__ = ["Recognised", "recognise"]
