"""Emit one recognised attention into the incremental graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from kvpass.analysis.facts import Fact, Kind
from kvpass.ir import H, Layout
from kvpass.transforms.branch import either
from kvpass.transforms.latent import Latent, Projection
from kvpass.transforms.plan import NEW, Demand, canonical
from kvpass.transforms.sides import Load, Recognised, Side, at_stored

if TYPE_CHECKING:
    from kvpass.transforms.rewrite import Builder

aten = torch.ops.aten


def emit_attention(b: Builder, match: Recognised) -> fx.Node:
    """Queries of the new rows against all keys and values: ``[B, H, N, D]`` against ``[B, K, S, D]``."""
    key, value = (
        at_stored(b.analyzed, side, lambda n: b.plan.slot_of(n) is not None) for side in (match.key, match.value)
    )
    match = replace(match, key=key, value=value)
    query = _canonical(b, match.query, NEW)
    made = _attended(b, match, query)
    latent = b.latents.get(match.out)
    if latent is not None and b.plan.slot_of(latent.node) is not None and b.plan.slot_of(key.node) is None:
        row = b.analyzed.fact(match.query.node).atoms[match.query.row[0]]
        over = _over_latents(b, match, latent, query)
        made = b.call(bind(either, latent.lifted), b.number(b.length(row, False)), b.rows, made, over)
    return _restored(b, match.result, made)


def _attended(b: Builder, match: Recognised, query: fx.Node) -> fx.Node:
    """``[B, H, N, D]``, by a kernel or by the reference."""
    # Queries of the context have no first new row, and depend on nothing that grows.
    rows = [b.analyzed.fact(match.query.node).atoms[k] for k in match.query.row]
    first = [b.lead + atom.start + b.span(atom, False)[0] for atom in rows if atom.kind is Kind.SEQ]
    start = b.number(first[0]) if first else 0
    made = _lowered(b, match, query, start)
    return _referred(b, match, query, start) if made is None else made


def _over_latents(b: Builder, match: Recognised, latent: Latent, query: fx.Node) -> fx.Node:
    """Queries projected down, attention over the latents as they are stored, and its result projected up."""
    low, beside = latent.depth
    down = _matrices(b, latent.key, match.spec.heads)
    narrow = _by_head(b, b.call(aten.slice.Tensor, query, 3, low, low + latent.key.size), down)
    if latent.shared:
        rest = b.call(aten.slice.Tensor, query, 3, beside, beside + latent.shared)
        narrow = b.call(aten.cat.default, [narrow, rest], 3)
    fact = b.analyzed.fact(latent.node)
    (row,) = fact.rows
    side = Side(
        latent.node,
        tuple(k for k, atom in enumerate(fact.atoms) if atom.kind is Kind.BATCH),
        (),
        (row,),
        tuple(k for k, atom in enumerate(fact.atoms) if atom.kind is Kind.FREE),
    )
    spec = latent.absorbed(match.spec)
    made = _attended(b, replace(match, spec=spec, key=side, value=side), narrow)
    made = b.call(aten.slice.Tensor, made, 3, 0, latent.rank)
    up = b.call(aten.transpose.int, _matrices(b, latent.value, match.spec.heads), 1, 2)
    return _by_head(b, made, up)


def _matrices(b: Builder, projection: Projection, heads: int) -> fx.Node:
    """``[H, size, rank]``, a view of the weight."""
    weight = b.build(projection.weight, NEW)
    if projection.transposed:
        weight = b.call(aten.t.default, weight)
    head, first = divmod(projection.first, projection.stride)
    by_head = b.call(aten.unflatten.int, weight, 0, [-1, projection.stride])
    mine = b.call(aten.slice.Tensor, by_head, 0, head, head + heads)
    return b.call(aten.slice.Tensor, mine, 1, first, first + projection.size)


def _by_head(b: Builder, x: fx.Node, matrices: fx.Node) -> fx.Node:
    """``[B, H, N, I]`` times ``[H, I, O]``; a matrix is read once for all sequences."""
    return b.call(aten.einsum.default, "bhni,hio->bhno", [x, matrices])


def _lowered(b: Builder, match: Recognised, query: fx.Node, start: Any) -> fx.Node | None:
    """By a generated kernel, on the pages as they are; it takes operands of one dtype."""
    if any(b.analyzed.fact(side.node).dtype != match.spec.dtype for side in (match.query, match.key, match.value)):
        return None
    key, value = _pool_layout(b, match.key), _pool_layout(b, match.value)
    kernel = b.lower(match.spec, match.out.meta["val"].device, key, value)
    if kernel is None:
        return None
    keys = _rows(b, match.key, match.query, key)
    reads = [
        _per_head(b, match, load, _load(b, load, read.axes))
        for load, read in zip(match.loads, match.spec.reads, strict=True)
    ]
    count = _lengths(b, b.analyzed.fact(match.key.node), _all(b, match.key), match.key.row)
    return b.call(kernel, query, keys, _rows(b, match.value, match.query, value), start, count, reads)


def _for_each(b: Builder, side: Side, queries: Side) -> fx.Node:
    """All keys or values as ``[B, K, S, D]``; those that all sequences share, for each of them."""
    made = _canonical(b, side, _all(b, side))
    if side.batch or not queries.batch:
        return made
    sizes = [_lengths(b, b.analyzed.fact(queries.node), NEW, queries.batch), -1, -1, -1]
    return b.call(aten.expand.default, made, sizes)


def _rows(b: Builder, side: Side, queries: Side, layout: Layout | None) -> tuple[fx.Node, ...]:
    """The pool, its table and its run, or one tensor ``[B, K, S, D]``."""
    slot = b.plan.slot_of(side.node)
    if layout is None or slot is None:
        return (_for_each(b, side, queries),)
    pool, (_, table, run, _) = b.pool(slot), b.slot_inputs[slot.name]
    return pool, table, run


def _pool_layout(b: Builder, side: Side) -> Layout | None:
    """Where the heads of a stored value stand in its pool; None where it is not stored, or not head by head."""
    slot = b.plan.slot_of(side.node)
    if slot is None or not _all(b, side):
        return None
    if b.skipped(slot) != 0:
        return None
    fact = b.analyzed.fact(slot.node)
    dims = [d for d in range(len(fact.dims)) if d not in (slot.row, slot.batch)]
    outside = _strides(fact, [k for d in dims if d < slot.row for k in fact.flat(d)])
    inside = _strides(fact, [k for d in dims if d > slot.row for k in fact.flat(d)])
    heads = [k for k in side.heads if fact.atoms[k].size != 1]
    depth = [k for k in side.depth if fact.atoms[k].size != 1]
    if {*heads, *depth} != {*outside, *inside} or not _dense(fact, inside, depth, 1):
        return None
    where = outside if heads and heads[-1] in outside else inside
    factor = where[heads[-1]] if heads else 0
    if not _dense(fact, where, heads, factor):
        return None
    return Layout(len(slot.before), where is outside and bool(heads), factor)


def _strides(fact: Fact, atoms: list[int]) -> dict[int, int]:
    """The stride of each atom where they stand in this order; atoms of size one have none."""
    out, stride = {}, 1
    for k in reversed(atoms):
        if fact.atoms[k].size != 1:
            out[k] = stride
            stride *= int(fact.atoms[k].size)
    return out


def _dense(fact: Fact, strides: dict[int, int], atoms: list[int], first: int) -> bool:
    """True where the atoms, in this order, count through entries that are ``first`` apart."""
    for k in reversed(atoms):
        if strides.get(k) != first:
            return False
        first *= int(fact.atoms[k].size)
    return True


def _referred(b: Builder, match: Recognised, query: fx.Node, start: Any) -> fx.Node:
    """By the reference, on keys and values that are gathered from the pages."""
    key, value = (_for_each(b, side, match.query) for side in (match.key, match.value))
    mask = _visible(b, match, start)
    inside = [load for load in match.loads if load.axes is not None]
    names, loads = tuple(load.name for load in inside), tuple(_load(b, load) for load in inside)
    return b.call(bind(b.kernels.attention, match.spec), query, key, value, mask, start, names, loads)


def _visible(b: Builder, match: Recognised, start: Any) -> fx.Node | None:
    """The mask of the new rows: one for all attentions that share a support, and that count the same."""
    support = match.spec.support
    if support == sympy.true:
        return None
    leaves = [load for load in match.loads if load.axes is None]
    fact = b.analyzed.fact(match.query.node)
    before = [b.lead + fact.atoms[k].start for k in match.query.row if fact.atoms[k].kind is Kind.SEQ]
    queries = b.number(sympy.Add(*before, *(fact.atoms[k].size for k in match.query.row)))
    keys = _lengths(b, b.analyzed.fact(match.key.node), _all(b, match.key), match.key.row)
    key = (support, match.spec.heads if support.has(H) else 0, start, queries, keys)
    if key not in b.masks:
        loads = tuple(_load(b, load) for load in leaves)
        device = match.out.meta["val"].device
        names = tuple(load.name for load in leaves)
        static = bind(b.kernels.visible, support, device, match.spec.heads)
        b.masks[key] = b.call(static, start, queries, names, loads, keys)
    return b.masks[key]


def bind(function: Callable[..., Any], *static: Any) -> Callable[..., Any]:
    """A function with its first arguments fixed. Generated code cannot print a spec; it can call a name."""

    def bound(*args: Any) -> Any:
        return function(*static, *args)

    bound.__name__ = bound.__qualname__ = function.__name__
    bound.static = static  # type: ignore[attr-defined]
    bound.function = function  # type: ignore[attr-defined]
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
    if _is_canonical(fact, side):
        return built
    order = [*side.batch, *side.heads, *side.row, *side.depth]
    atoms = list(range(fact.real))
    placed = [k for k in atoms if k in order]
    target = [_lengths(b, fact, demand, group) for group in (side.batch, side.heads, side.row, side.depth)]
    if placed != order:
        built = b.call(aten.reshape.default, built, [_lengths(b, fact, demand, (k,)) for k in placed])
        built = b.call(aten.permute.default, built, [placed.index(k) for k in order])
    return b.call(aten.reshape.default, built, target)


def _is_canonical(fact: Fact, side: Side) -> bool:
    """Whether a value is written as ``[batch, heads, rows, depth]`` as it stands."""
    axes = [tuple(fact.flat(d)) for d in range(len(fact.dims))]
    return axes == [side.batch, side.heads, side.row, side.depth] == [(k,) for k in range(4)]


def _restored(b: Builder, side: Side, made: fx.Node) -> fx.Node:
    """``[B, H, N, D]`` back into the axes of the captured value."""
    fact = b.analyzed.fact(side.node)
    if _is_canonical(fact, side):
        return made
    order = [*side.batch, *side.heads, *side.row, *side.depth]
    placed = [k for k in range(fact.real) if k in order]
    if placed != order:
        made = b.call(aten.reshape.default, made, [_lengths(b, fact, NEW, (k,)) for k in order])
        made = b.call(aten.permute.default, made, [order.index(k) for k in placed])
    return b.call(aten.reshape.default, made, b.sizes(fact, NEW))


def _per_head(b: Builder, match: Recognised, load: Load, made: fx.Node) -> fx.Node:
    """A single number, as one for each head."""
    if load.axes is None or any(atom.size != 1 for atom in b.analyzed.fact(load.node).atoms):
        return made
    return b.call(aten.expand.default, made, [match.spec.heads])


def _load(b: Builder, load: Load, axes: str = "bhij") -> fx.Node:
    """A tensor of the score, broadcastable to ``[B, H, N, S]``; a leaf of the support, as it is, over all rows.

    ``axes``: those of a tensor of the score that are kept; the others have size one.
    """
    fact = b.analyzed.fact(load.node)
    if load.axes is None:
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
    return b.call(aten.reshape.default, built, [_lengths(b, fact, demand, sizes[letter]) for letter in axes])
