"""What the entries of an operand are: read off the graph by running the ops that only move entries on entry numbers.

Whatever a model is spelled like, ``k[b, h, s, d]`` is then known to be entry ``e(h, d)`` of row ``s`` of a value that
some other op has made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from kvpass.analysis.facts import Fact, Kind
from kvpass.analysis.sweep import Analyzed, sym
from kvpass.transforms.sides import Side
from kvpass.transforms.spell import JOINS

aten = torch.ops.aten

_JOINS = (*JOINS, aten.stack.default)
MOVES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.transpose.int,
    aten.permute.default,
    aten.movedim.int,
    aten.t.default,
    aten.mT.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.slice.Tensor,
    aten.select.int,
    *_JOINS,
)
"""Ops whose result has no entry that their operands have not."""
_SAMPLES = ((2, 3), (3, 5))  # numbers of sequences and rows at which the movement is looked at


@dataclass(frozen=True)
class Origins:
    """One operand of an attention, ``[H, D]``: from which source each entry of a row comes, and which entry of it."""

    sources: tuple[fx.Node, ...]
    source: torch.Tensor
    entry: torch.Tensor

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """``(source, first, last)``: runs of the depth that come from one source, in all heads."""
        if not bool((self.source == self.source[:1]).all()):
            return
        row = self.source[0].tolist()
        edges = [0, *(k for k in range(1, len(row)) if row[k] != row[k - 1]), len(row)]
        for low, high in pairwise(edges):
            yield row[low], low, high


def origins(analyzed: Analyzed, side: Side, made: Callable[[fx.Node], bool]) -> Origins | None:
    """The entries of an operand by source, where they are the same ones in every row of every sequence.

    Args:
        made: the ops whose results are looked for; what is not made of them is looked at no further than to where it is
            no longer repeated.
    """
    looks = [_looked_at(analyzed, side, made, *sample) for sample in _SAMPLES]
    first = looks[0]
    for look in looks:
        if look is None or first is None or not torch.equal(look.source, first.source):
            return None
        if look.sources != first.sources or not torch.equal(look.entry, first.entry):
            return None
    return first


def _looked_at(
    analyzed: Analyzed, side: Side, made: Callable[[fx.Node], bool], batch: int, rows: int
) -> Origins | None:
    sizes = {analyzed.captured.seq: sympy.Integer(rows)}
    if analyzed.captured.batch.is_Symbol:
        sizes[analyzed.captured.batch] = sympy.Integer(batch)
    numbering = _Numbering(analyzed, sizes, made)
    with unset_fake_temporarily():
        try:
            ids = numbering.run(side.node)
        except _Unknown:
            return None
        fact = analyzed.fact(side.node)
        order = [*side.batch, *side.heads, *side.row, *side.depth]
        left = [k for k in range(fact.real) if k not in order]
        if any(numbering.size(fact, [k]) != 1 for k in left):
            return None
        flat = ids.reshape([numbering.size(fact, [k]) for k in range(fact.real)]).permute(*order, *left)
        shape = [numbering.size(fact, group) for group in (side.batch, side.heads, side.row, side.depth)]
        return numbering.read(flat.reshape(shape))


class _Unknown(Exception):
    """A size or an axis that is not understood."""


class _Numbering:
    """Runs the ops that move entries on entry numbers; every other value is a source, numbered anew."""

    def __init__(
        self, analyzed: Analyzed, sizes: Mapping[sympy.Basic, sympy.Basic], made: Callable[[fx.Node], bool]
    ) -> None:
        self.analyzed, self.sizes, self.made = analyzed, sizes, made
        self.sources: dict[fx.Node, int] = {}
        self.next = 0
        self.lifted: dict[fx.Node, bool] = {}

    def number(self, value: Any) -> Any:
        """A size as it is in the sample."""
        found = sympy.sympify(sym(value)).xreplace(dict(self.sizes))
        if not found.is_Integer:
            raise _Unknown
        return int(found)

    def size(self, fact: Fact, atoms: Sequence[int]) -> int:
        return int(self.number(sympy.Mul(*(fact.atoms[k].size for k in atoms))))

    def run(self, node: fx.Node) -> torch.Tensor:
        if node in self.sources or not self._moves(node):
            return self._numbered(node)

        def given(a: fx.Node) -> Any:
            return self.run(a) if isinstance(a.meta["val"], torch.Tensor) else self.number(a.meta["val"])

        made: torch.Tensor = node.target(*fx.map_arg(node.args, given), **fx.map_arg(node.kwargs, given))  # type: ignore[operator]
        return made

    def _moves(self, node: fx.Node) -> bool:
        """To the projections; and on the way to the rest, to where it is no longer repeated."""
        if node.target not in MOVES:
            return False
        return self._lifted(node) or any(atom.bcast for atom in self.analyzed.fact(node).atoms)

    def _lifted(self, node: fx.Node) -> bool:
        """True where what is looked for is among what is moved."""
        if node not in self.lifted:
            behind = self.analyzed.steps[node].operands if node.target in MOVES else ()
            self.lifted[node] = self.made(node) or any(self._lifted(x) for x in behind)
        return self.lifted[node]

    def _numbered(self, node: fx.Node) -> torch.Tensor:
        shape = [self.number(size) for size in node.meta["val"].shape]
        count = 1
        for size in shape:
            count *= size
        if node not in self.sources:
            self.sources[node], self.next = self.next, self.next + count
        return (self.sources[node] + torch.arange(count)).reshape(shape)

    def read(self, ids: torch.Tensor) -> Origins | None:
        """``[B, H, S, D]`` of numbers as sources and entries; None where a row has entries of other rows."""
        source, entry = torch.empty_like(ids), torch.empty_like(ids)
        for k, (node, base) in enumerate(self.sources.items()):
            found = self._coordinates(node)
            if found is None:
                return None
            sequence, row, place = found
            mine = (ids >= base) & (ids < base + len(place))
            at = (ids - base).clamp(0, len(place) - 1)
            own = torch.arange(ids.shape[0])[:, None, None, None], torch.arange(ids.shape[2])[:, None]
            if bool((mine & ((sequence[at] != own[0]) | (row[at] != own[1]))).any()):
                return None
            source[mine], entry[mine] = k, place[at][mine]
        heads = source[0, :, 0], entry[0, :, 0]
        if bool((source != heads[0][:, None]).any()) or bool((entry != heads[1][:, None]).any()):
            return None
        return Origins(tuple(self.sources), *heads)

    def _coordinates(self, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Of each entry of a source, in order: its sequence, its row, and which entry of the row it is."""
        fact = self.analyzed.fact(node)
        atoms = fact.atoms[: fact.real]
        if [fact.atoms[k].start for k in fact.rows] != [0] or fact.atoms[
            fact.rows[0]
        ].size != self.analyzed.captured.seq:
            return None
        sizes = [self.size(fact, [k]) for k in range(fact.real)]
        place = torch.zeros(sizes, dtype=torch.long)
        along = {kind: torch.zeros(sizes, dtype=torch.long) for kind in Kind}
        for k, atom in enumerate(atoms):
            shape = [sizes[k] if j == k else 1 for j in range(len(sizes))]
            at = torch.arange(sizes[k]).reshape(shape)
            along[atom.kind] = along[atom.kind] * sizes[k] + at
        place = along[Kind.FREE]
        return along[Kind.BATCH].flatten(), along[Kind.SEQ].flatten(), place.flatten()
