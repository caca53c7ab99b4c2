"""Keys and values that are projected up from one narrow row: the row is stored, and the projection moves.

Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) makes the keys and values of all heads from a latent ``c``
of a few hundred numbers, beside a part of the keys that the heads share. For such keys

    q_h . (W_h c_j)  =  (q_h W_h) . c_j        and        sum_j p_j (U_h c_j)  =  U_h (sum_j p_j c_j)

so attention over the latents, with one key head, gives the same result. What a key is made of is read off the graph by
running the ops between the projection and the attention, all of which only move entries, on entry numbers.

A cost model chooses: whether the latent is stored at all, and in each call whether the latents are projected up
(many new rows) or the queries down (few).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import fx

from kvpass.analysis.facts import Kind
from kvpass.analysis.sweep import Analyzed, arguments, sym
from kvpass.ir import Attention
from kvpass.transforms.origins import MOVES, Origins, origins
from kvpass.transforms.plan import storable
from kvpass.transforms.sides import Recognised
from kvpass.transforms.spell import call

aten = torch.ops.aten

BALANCE: Mapping[str, float] = {"cpu": 4.0, "cuda": 200.0}
"""Arithmetic operations that a machine does in the time of reading one byte."""


@dataclass(frozen=True)
class Projection:
    """Where the matrix of each head stands in a weight ``[features, rank]``: rows ``first + head * stride + k``.

    ``transposed``: the weight is ``[rank, features]``.
    """

    weight: fx.Node
    first: int
    stride: int
    size: int
    transposed: bool


@dataclass(frozen=True)
class Costs:
    """What one more cached row costs a step with one new row, in bytes read and operations."""

    bytes: int
    operations: int

    def time(self, balance: float) -> float:
        """In the time of reading a byte, by the roofline."""
        return max(self.bytes, self.operations / balance)


@dataclass(frozen=True)
class Latent:
    """One attention whose keys and values are made from the rows of ``node``.

    Attributes:
        node: ``[B, S, rank + shared]``: the latent, and what the key heads share.
        rank: how many of its numbers go through the projections.
        key, value: those projections.
        depth: where in a key the projected entries begin, where the shared ones do.
        stored, expanded: costs with the latent stored and the queries projected down, and with keys and values stored.
        cheaper: what the costs say.
        lifts: what makes keys and values from it, for all rows where that is cheaper.
    """

    node: fx.Node
    rank: int
    key: Projection
    value: Projection
    depth: tuple[int, int]
    stored: Costs
    expanded: Costs
    spec: Attention
    cheaper: bool
    lifts: frozenset[fx.Node] = field(default_factory=frozenset)

    @property
    def shared(self) -> int:
        return self.spec.head_size - self.key.size

    def absorbed(self, spec: Attention) -> Attention:
        """The attention over the latents: one key head, which is its own value."""
        size = self.rank + self.shared
        return replace(spec, kv_heads=1, head_size=size, value_size=size)

    @property
    def longer(self) -> int:
        """By how many products a score and its value are longer over latents than over keys and values."""
        return 2 * (self.rank + self.shared) - self.spec.head_size - self.spec.value_size

    @property
    def lift(self) -> int:
        """The products of projecting one row up, or one query down and its result up."""
        return self.rank * (self.key.size + self.value.size)

    def lifted(self, new: int, rows: int) -> bool:
        """True where it is cheaper to make the keys and values of all rows anew than to attend to latents.

        ``rows`` projections and short scores, or ``new`` projections and ``new * rows`` scores that are longer.
        """
        return new * rows * self.longer > (rows - new) * self.lift

    @property
    def turn(self) -> int | None:
        """From so many new rows on even a long text is projected up; None where it never is."""
        return None if self.longer <= 0 else -(-self.lift // self.longer)


def expose(analyzed: Analyzed, attentions: Mapping[fx.Node, Recognised]) -> dict[fx.Node, Latent]:
    """Write the latent of each attention that is cheaper with it into the graph; by the attention's result.

    The graph computes what it did: keys and values are made from slices of the latent, which is a value now, and can be
    stored. It has to be analysed anew where anything was found.
    """
    found: dict[fx.Node, Latent] = {}
    writer = _Writer(analyzed.captured.module.graph)
    for out, match in attentions.items():
        parts = _Parts.of(analyzed, match)
        latent = None if parts is None else parts.latent()
        if parts is not None and latent is not None and latent.cheaper:
            found[out] = writer.write(match, parts, latent)
    return found


def weighed(analyzed: Analyzed, match: Recognised) -> Latent | None:
    """What was weighed for an attention whose keys and values are made from rows of less than half their size."""
    parts = _Parts.of(analyzed, match)
    return None if parts is None else parts.latent()


# -- what a key is made of ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """Keys and values taken apart: their projections from ``x``, and what the heads share."""

    analyzed: Analyzed
    match: Recognised
    x: fx.Node
    key: Projection
    value: Projection
    depth: tuple[int, int]
    others: tuple[fx.Node, ...]
    lifts: tuple[fx.Node, ...]

    @staticmethod
    def of(analyzed: Analyzed, match: Recognised) -> _Parts | None:
        spec = match.spec
        if spec.heads != spec.kv_heads or spec.heads == 1 or match.key.group or match.value.group:
            return None
        made = partial(_projects, analyzed)
        key, value = (origins(analyzed, side, made) for side in (match.key, match.value))
        if key is None or value is None:
            return None
        of_value = _projected(analyzed, value)
        of_key = _projected(analyzed, key)
        if len(of_value) != 1 or len(of_key) != 1 or of_value[0][1:] != (0, spec.value_size):
            return None
        (up, low, high), (out, _, _) = of_key[0], of_value[0]
        lifts = (key.sources[up], value.sources[out])
        projections = _projection(analyzed, key, up, low, high), _projection(analyzed, value, out, 0, spec.value_size)
        if projections[0] is None or projections[1] is None or _input(lifts[0]) is not _input(lifts[1]):
            return None
        others = _shared(analyzed, key, up)
        if others is None or not _rows_of_numbers(analyzed, _input(lifts[0])):
            return None
        depth = (low, high if low == 0 else 0)
        return _Parts(analyzed, match, _input(lifts[0]), projections[0], projections[1], depth, others, lifts)

    def latent(self) -> Latent | None:
        """What it would be to store the latent, where that is much less than keys and values."""
        spec, rank = self.match.spec, int(sym(self.x.meta["val"].shape[-1]))
        values = (self.x, *self.others)
        dtypes = {
            node.meta["val"].dtype for node in (*values, self.match.query.node, self.key.weight, self.value.weight)
        }
        if dtypes != {spec.dtype} or not all(storable(self.analyzed, node) for node in values):
            return None
        size = rank + spec.head_size - self.key.size
        per_head = spec.head_size + spec.value_size
        stored = Costs(size * spec.dtype.itemsize, 4 * spec.heads * size)
        expanded = Costs(spec.kv_heads * per_head * spec.dtype.itemsize, 2 * spec.heads * per_head)
        if 2 * stored.bytes >= expanded.bytes:
            return None  # the hidden row of an ordinary layer is half as wide as its keys and values
        balance = BALANCE[self.match.out.meta["val"].device.type]
        cheaper = stored.time(balance) <= expanded.time(balance)
        return Latent(self.x, rank, self.key, self.value, self.depth, stored, expanded, spec, cheaper)


def _input(lift: fx.Node) -> fx.Node:
    x: fx.Node = arguments(lift)[0]
    return x


def _projects(analyzed: Analyzed, node: fx.Node) -> bool:
    """True of ``x W^T`` and ``x W`` without a bias, for a weight of the model."""
    args = arguments(node)
    if node.target not in (aten.linear.default, aten.matmul.default) or len(args) != 2 or node.kwargs:
        return False
    weight: fx.Node = args[1]
    learnt = weight.name in analyzed.captured.constants
    return learnt and weight.meta["val"].dim() == 2 and bool(analyzed.fact(args[0]).deps)


def _projected(analyzed: Analyzed, made: Origins) -> list[tuple[int, int, int]]:
    return [span for span in made.spans() if _projects(analyzed, made.sources[span[0]])]


def _projection(analyzed: Analyzed, made: Origins, source: int, low: int, high: int) -> Projection | None:
    """The rows of a weight that make these entries of every head, where they stand in equal steps."""
    entry, (heads, size) = made.entry[:, low:high], made.entry[:, low:high].shape
    stride = int(entry[1, 0] - entry[0, 0])
    first = int(entry[0, 0])
    regular = first + stride * torch.arange(heads)[:, None] + torch.arange(size)
    lift = made.sources[source]
    features = int(sym(lift.meta["val"].shape[-1]))
    whole = stride >= size and features % stride == 0 and first % stride + size <= stride
    if not whole or not torch.equal(entry, regular):
        return None
    return Projection(arguments(lift)[1], first, stride, size, lift.target is aten.matmul.default)


def _shared(analyzed: Analyzed, key: Origins, up: int) -> tuple[fx.Node, ...] | None:
    """What all heads have in their keys beside the projection: whole rows of numbers, one after the other."""
    found = []
    for source, low, high in key.spans():
        if source == up:
            continue
        node = key.sources[source]
        alike = bool((key.entry[:, low:high] == torch.arange(high - low)).all())
        if not alike or not _rows_of_numbers(analyzed, node) or sym(node.meta["val"].shape[-1]) != high - low:
            return None
        found.append(node)
    spans = [source for source, _, _ in key.spans()]
    beside = spans.index(up) in (0, len(spans) - 1)  # the shared entries stand together
    return tuple(found) if spans.count(up) == 1 and beside else None


def _rows_of_numbers(analyzed: Analyzed, node: fx.Node) -> bool:
    """True of axes batch, rows and numbers, the numbers last, among any of size one."""
    fact = analyzed.fact(node)
    dims = [dim for dim in fact.dims if any(atom.size != 1 for atom in dim)]
    kinds = [dim[0].kind if len(dim) == 1 else Kind.FREE for dim in dims]
    wide = any(atom.kind is not Kind.FREE for dim in dims if len(dim) > 1 for atom in dim)
    return not wide and not fact.ghosts and kinds[-2:] == [Kind.SEQ, Kind.FREE] and kinds[:-2] in ([], [Kind.BATCH])


# -- the graph ------------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Writes latents into a graph, and keys and values that are made from them."""

    graph: fx.Graph
    made: dict[tuple[fx.Node, ...], tuple[int, fx.Node]] = field(default_factory=dict)

    def write(self, match: Recognised, parts: _Parts, latent: Latent) -> Latent:
        """The keys and values anew, from slices of a latent that stands in the graph."""
        place = {node: k for k, node in enumerate(self.graph.nodes)}
        here = place[match.key.node]
        with self.graph.inserting_after(match.key.node):
            anchor = self.graph.call_function(aten.alias.default, (match.key.node,))
        copied: dict[fx.Node, fx.Node] = {}
        with self.graph.inserting_before(anchor):
            node = self._latent((parts.x, *parts.others), here, copied)
            for side in (match.key, match.value):
                new = self._copy(side.node, copied)
                later = {user for user in side.node.users if place.get(user, 0) > here}
                side.node.replace_all_uses_with(new, delete_user_cb=later.__contains__)
        self.graph.erase_node(anchor)
        return replace(latent, node=node, lifts=frozenset(copied.values()) - {node})

    def _latent(self, pieces: tuple[fx.Node, ...], here: int, copied: dict[fx.Node, fx.Node]) -> fx.Node:
        """The pieces in one row; where they were read, their slices of it are to be read."""
        flat = [self._squeezed(piece) for piece in pieces]
        at, node = self.made.get(pieces, (here + 1, flat[0]))
        if at > here:
            node = flat[0] if len(flat) == 1 else call(self.graph, pieces[0], aten.cat.default, flat, -1)
            self.made[pieces] = here, node
        low, last = 0, node.meta["val"].dim() - 1
        for piece, row in zip(pieces, flat, strict=True):
            high = low + int(row.meta["val"].shape[-1])
            cut = row if len(flat) == 1 else call(self.graph, piece, aten.slice.Tensor, node, last, low, high)
            copied[row] = cut
            copied[piece], low = self._unsqueezed(cut, piece), high
        return node

    def _squeezed(self, x: fx.Node) -> fx.Node:
        for axis in reversed(_units(x)):
            x = call(self.graph, x, aten.squeeze.dim, x, axis)
        return x

    def _unsqueezed(self, x: fx.Node, like: fx.Node) -> fx.Node:
        for axis in _units(like):
            x = call(self.graph, like, aten.unsqueeze.default, x, axis)
        return x

    def _copy(self, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node:
        """The same op on copies of its operands; what is no part of the way stays."""
        if node not in copied:
            operands = [a for a in node.all_input_nodes if isinstance(a.meta["val"], torch.Tensor)]
            if node.op != "call_function" or (node.target not in MOVES and not any(a in copied for a in operands)):
                return node
            args = fx.map_arg(node.args, lambda a: self._copy(a, copied))
            kwargs = fx.map_arg(node.kwargs, lambda a: self._copy(a, copied))
            copied[node] = call(self.graph, node, node.target, *args, **kwargs)  # type: ignore[arg-type]
        return copied[node]


def _units(node: fx.Node) -> list[int]:
    return [axis for axis, size in enumerate(node.meta["val"].shape) if sym(size) == 1]
