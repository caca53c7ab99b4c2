"""Emit one recognised attention into the incremental graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from kvpass.analysis.facts import Fact, Kind
from kvpass.ir import H
from kvpass.transforms.plan import NEW, Demand, canonical
from kvpass.transforms.sides import Load, Recognised, Side

if TYPE_CHECKING:
    from kvpass.transforms.rewrite import Builder

aten = torch.ops.aten


def emit_attention(b: Builder, match: Recognised) -> fx.Node:
    """Queries of the new rows against all keys and values: ``[B, H, N, D]`` against ``[B, K, S, D]``."""
    query = _canonical(b, match.query, NEW)
    key = _canonical(b, match.key, _all(b, match.key))
    value = _canonical(b, match.value, _all(b, match.value))
    mask = _visible(b, match)
    inside = [load for load in match.loads if load.axes]
    names, loads = tuple(load.name for load in inside), tuple(_load(b, load) for load in inside)
    # Queries of the context have no first new row, and depend on nothing that grows.
    rows = [b.analyzed.fact(match.query.node).atoms[k] for k in match.query.row]
    start = b.start if any(atom.kind is Kind.SEQ for atom in rows) else 0
    made = b.call(bind(b.kernels.attention, match.spec), query, key, value, mask, start, names, loads)
    return _restored(b, match.result, made)


def _visible(b: Builder, match: Recognised) -> fx.Node | None:
    """The mask of the new rows: one for all attentions that share a support."""
    support = match.spec.support
    if support == sympy.true:
        return None
    leaves = [load for load in match.loads if not load.axes]
    key = (support, match.spec.heads if support.has(H) else 0)
    if key not in b.masks:
        loads = tuple(_load(b, load) for load in leaves)
        device = match.out.meta["val"].device
        names = tuple(load.name for load in leaves)
        static = bind(b.kernels.visible, support, device, match.spec.heads)
        b.masks[key] = b.call(static, b.start, b.rows, names, loads)
    return b.masks[key]


def bind(function: Callable[..., Any], *static: Any) -> Callable[..., Any]:
    """A function with its first arguments fixed. Generated code cannot print a spec; it can call a name."""

    def bound(*args: Any) -> Any:
        return function(*static, *args)

    bound.__name__ = bound.__qualname__ = function.__name__
    bound.static = static  # type: ignore[attr-defined]
    return bound


def _all(b: Builder, side: Side) -> Demand:
    return frozenset(b.analyzed.fact(side.node).wide)


def _lengths(b: Builder, fact: Fact, demand: Demand, atoms: tuple[int, ...]) -> Any:
    size: sympy.Expr = sympy.Integer(1)
    for k in atoms:
        size = size * b.length(fact.atoms[k], k in demand)
    return b.number(size)


def _canonical(b: Builder, side: Side, demand: Demand) -> fx.Node:
    """A value as ``[batch, heads, rows, depth]``, from whatever axes it has."""
    fact = b.analyzed.fact(side.node)
    demand = canonical(demand, fact)
    built = b.build(side.node, demand)
    order = [*side.batch, *side.heads, *side.row, *side.depth]
    atoms = list(range(fact.real))
    placed = [k for k in atoms if k in order]
    target = [_lengths(b, fact, demand, group) for group in (side.batch, side.heads, side.row, side.depth)]
    if [fact.flat(d) for d in range(len(fact.dims))] == [range(k, k + 1) for k in range(4)] and order == atoms:
        return built
    if placed != order:
        built = b.call(aten.reshape.default, built, [_lengths(b, fact, demand, (k,)) for k in placed])
        built = b.call(aten.permute.default, built, [placed.index(k) for k in order])
    return b.call(aten.reshape.default, built, target)


def _restored(b: Builder, side: Side, made: fx.Node) -> fx.Node:
    """``[B, H, N, D]`` back into the axes of the captured value."""
    fact = b.analyzed.fact(side.node)
    order = [*side.batch, *side.heads, *side.row, *side.depth]
    placed = [k for k in range(fact.real) if k in order]
    if [fact.flat(d) for d in range(len(fact.dims))] == [range(k, k + 1) for k in range(4)] and order == placed:
        return made
    if placed != order:
        made = b.call(aten.reshape.default, made, [_lengths(b, fact, NEW, (k,)) for k in order])
        made = b.call(aten.permute.default, made, [order.index(k) for k in placed])
    return b.call(aten.reshape.default, made, b.sizes(fact, NEW))


def _load(b: Builder, load: Load) -> fx.Node:
    """A tensor of the score, broadcastable to ``[B, H, N, S]``; a leaf of the support, as it is, over all rows."""
    fact = b.analyzed.fact(load.node)
    if not load.axes:
        demand = frozenset(fact.wide)
        built = b.build(load.node, demand)
        if len(fact.dims) == fact.real:
            return built
        return b.call(aten.reshape.default, built, [_lengths(b, fact, demand, (k,)) for k in range(fact.real)])
    demand = frozenset(k for k in fact.wide if load.axes[k] == "j")
    built = b.build(load.node, demand)
    sizes = {letter: tuple(k for k, x in enumerate(load.axes) if x == letter) for letter in "bhij"}
    order = [k for letter in "bhij" for k in sizes[letter]]
    placed = list(range(fact.real))
    if placed != order:
        built = b.call(aten.reshape.default, built, [_lengths(b, fact, demand, (k,)) for k in placed])
        built = b.call(aten.permute.default, built, [placed.index(k) for k in order])
    return b.call(aten.reshape.default, built, [_lengths(b, fact, demand, sizes[letter]) for letter in "bhij"])
