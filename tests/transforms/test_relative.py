"""Relative shifts by a view: what they are is looked up, and nothing may read what they put above the diagonal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import kvpass
from kvpass.analysis.kept import only_where
from kvpass.analysis.table import RULES, Op
from kvpass.frontend.api import recording
from tests.coverage.base import DEPTH, HEADS, NEG_INF, SIZE, VOCAB, Decoder, build, grid
from tests.property.oracle import Mismatch, check_same

LONGEST = 32


class Shifted(Decoder):
    """Scores of vectors of a distance, which ``shift`` moves into place, and which ``score`` joins with the others."""

    layers = 2

    def __init__(self) -> None:
        super().__init__()
        self.content, self.place = (
            nn.Parameter(torch.randn(HEADS, 1, DEPTH)),
            nn.Parameter(torch.randn(HEADS, 1, DEPTH)),
        )
        self.table, self.of_places = nn.Embedding(2 * LONGEST - 1, SIZE), nn.Linear(SIZE, SIZE, bias=False)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        places = self.of_places(self.places(x.shape[1])).view(-1, HEADS, DEPTH)
        scores = (q + self.content) @ k.mT
        return self.merge(
            self.weights(scores, self.shift(torch.einsum("bhid,jhd->bhij", q + self.place, places))) @ v, layer
        )

    def places(self, s: int) -> Tensor:
        return angles(torch.arange(s - 1, -1, -1.0))

    def shift(self, x: Tensor) -> Tensor:
        b, h, s, _ = x.shape
        return pad(x, (1, 0)).view(b, h, s + 1, s)[:, :, 1:].view(b, h, s, s)

    def weights(self, scores: Tensor, shifted: Tensor) -> Tensor:
        return (self.masked(scores + shifted) * DEPTH**-0.5).softmax(-1)

    def masked(self, scores: Tensor) -> Tensor:
        i, j = grid(scores[:, 0])
        return scores.masked_fill(j > i, NEG_INF)


def angles(place: Tensor) -> Tensor:
    angle = torch.outer(place, 100.0 ** (-torch.arange(0, SIZE, 2) / SIZE))
    return torch.cat((angle.sin(), angle.cos()), -1)


class Joined(Shifted):
    """A column of zeros is joined, not padded."""

    def shift(self, x: Tensor) -> Tensor:
        b, h, s, _ = x.shape
        return torch.cat((x.new_zeros(b, h, s, 1), x), 3).view(b, h, s + 1, s)[:, :, 1:].view_as(x)


class WithoutHeads(Shifted):
    """Texts and heads are one axis meanwhile."""

    def shift(self, x: Tensor) -> Tensor:
        b, h, s, _ = x.shape
        return pad(x.reshape(b * h, s, s), (1, 0)).view(b * h, s + 1, s)[:, 1:].reshape(b, h, s, s)


class RowsAndKeysFirst(Shifted):
    """``[S, S, B, H]``, as the authors of Transformer-XL have it."""

    def shift(self, x: Tensor) -> Tensor:
        x = x.permute(2, 3, 0, 1)
        s, _, b, h = x.shape
        return torch.cat((x.new_zeros(s, 1, b, h), x), 1).view(s + 1, s, b, h)[1:].view_as(x).permute(2, 3, 0, 1)


class OfATable(Shifted):
    """Looked up by distance."""

    def places(self, s: int) -> Tensor:
        return self.table(s - 1 - torch.arange(s))


class Clamped(Shifted):
    """Distances of 6 and more are one."""

    def places(self, s: int) -> Tensor:
        return angles(torch.arange(s - 1, -1, -1.0).clamp(max=6))


class EndOfATable(Shifted):
    """The last entries."""

    def places(self, s: int) -> Tensor:
        return self.table.weight[-s:]


class Smoothed(Shifted):
    """Each vector the mean of two neighbours of one table: two places of it are turned."""

    def places(self, s: int) -> Tensor:
        table = self.table.weight
        return (table[2 * LONGEST - 1 - s :] + table[2 * LONGEST - 2 - s : -1]) / 2


class BothSides(Shifted):
    """From ``s - 1`` to ``1 - s``."""

    def places(self, s: int) -> Tensor:
        return angles(torch.arange(s - 1, -s, -1.0))

    def shift(self, x: Tensor) -> Tensor:
        b, h, s, n = x.shape
        return pad(x, (1, 0)).view(b, h, n + 1, s)[:, :, 1:].view(b, h, s, n)[..., :s]


class MiddleOfATable(BothSides):
    """The entries around the middle one, for both sides."""

    def places(self, s: int) -> Tensor:
        return self.table.weight[None, LONGEST - s : LONGEST + s - 1]


class FlatMeanwhile(BothSides):
    """Padded behind, and again as one long axis."""

    def shift(self, x: Tensor) -> Tensor:
        b, h, s, n = x.shape
        return pad(pad(x, (0, 1)).view(b, h, s * 2 * s), (0, s - 1)).view(b, h, s + 1, n)[:, :, :s, s - 1 :]


class WithoutPadding(BothSides):
    """A vector more, of a distance that no two rows have, in place of the column; picked by index (XLNet)."""

    def places(self, s: int) -> Tensor:
        return angles(torch.arange(s, -s, -1.0))

    def shift(self, x: Tensor) -> Tensor:
        b, h, s, n = x.shape
        return x.reshape(b, h, n, s)[:, :, 1:].reshape(b, h, s, n - 1).index_select(3, torch.arange(s))


class Window(Shifted):
    """The last four rows."""

    def masked(self, scores: Tensor) -> Tensor:
        i, j = grid(scores[:, 0])
        return scores.masked_fill((j > i) | (j < i - 4), NEG_INF)


class FiniteMask(Shifted):
    """Added."""

    def masked(self, scores: Tensor) -> Tensor:
        i, j = grid(scores[:, 0])
        return scores + torch.where(j > i, -1e9, 0.0)


class Quotients(Shifted):
    """Weights that are no softmax."""

    def weights(self, scores: Tensor, shifted: Tensor) -> Tensor:
        return (scores + shifted).tril() * 0.2


PROVEN = [
    Shifted, Smoothed, Joined, WithoutHeads, RowsAndKeysFirst, OfATable, Clamped, EndOfATable, BothSides,
    MiddleOfATable, FlatMeanwhile, WithoutPadding, Window, FiniteMask, Quotients,
]  # fmt: skip


class Unmasked(Shifted):
    """Every key is seen."""

    def masked(self, scores: Tensor) -> Tensor:
        return scores


class OneTooMany(Shifted):
    """The next key as well: its score is a zero."""

    def masked(self, scores: Tensor) -> Tensor:
        i, j = grid(scores[:, 0])
        return scores.masked_fill(j > i + 1, NEG_INF)


class Centred(Shifted):
    """A mean over all keys, before they are masked."""

    def weights(self, scores: Tensor, shifted: Tensor) -> Tensor:
        return (self.masked(scores + shifted - shifted.mean(-1, keepdim=True))).softmax(-1)


class Mirrored(Shifted):
    """Key and row change places, and what stood above the diagonal stands below."""

    def weights(self, scores: Tensor, shifted: Tensor) -> Tensor:
        return self.masked(scores + shifted.mT).softmax(-1)


class OneColumn(Shifted):
    """What the first rows see of the fourth key is of the rows below them."""

    def weights(self, scores: Tensor, shifted: Tensor) -> Tensor:
        return self.masked(scores * (1.0 + shifted[..., 3:4])).softmax(-1)


class Returned(Shifted):
    """The caller gets what stands above the diagonal."""

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        q = self.project(x, 0)[0]
        places = self.of_places(self.places(x.shape[1])).view(-1, HEADS, DEPTH)
        return self.head(x), self.shift(torch.einsum("bhid,jhd->bhij", q, places))


class CountedFromTheStart(Shifted):
    """What a vector is for depends on how long the text is."""

    def places(self, s: int) -> Tensor:
        return angles(torch.arange(s).float())


class OtherWay(Shifted):
    """Padded behind: rows are shifted to the left, over their beginning."""

    def shift(self, x: Tensor) -> Tensor:
        b, h, s, _ = x.shape
        return pad(x, (0, 1)).view(b, h, s + 1, s)[:, :, 1:]


REFUSED = {
    Unmasked: "KV202", OneTooMany: "KV202", Centred: "KV202", Mirrored: "KV202", Returned: "KV202",
    CountedFromTheStart: "KV203", OtherWay: "KV207",
}  # fmt: skip


def answers(kind: type[Decoder]) -> kvpass.Report:
    """Texts that grow, become shorter, branch and are others, without the check at compile time."""
    torch._dynamo.reset()
    model = build(kind)
    ids, other = (torch.randint(0, VOCAB, (2, n), generator=torch.Generator().manual_seed(n)) for n in (17, 12))
    branched = ids.clone()
    branched[:, 5] = (branched[:, 5] + 1) % VOCAB
    with torch.no_grad(), recording() as found:
        fast = kvpass.compile(model, cache=kvpass.Cache(capacity="8MiB", page_size=4), verify=False, tiers="eager")
        for text in (ids[:, :9], ids[:, :10], ids[:, :14], ids[:, :6], branched[:, :12], ids, other):
            check_same(fast, model, [text])
    return kvpass.Report.of(found)


@pytest.mark.parametrize("kind", PROVEN, ids=lambda kind: kind.__name__)
def test_shifts_are_looked_up(kind: type[Decoder]) -> None:
    report = answers(kind)
    assert report.proven, str(report)
    assert len(report.attention) == (0 if kind is Quotients else kind.layers * report.graphs)
    assert all(attention.lowering.startswith("C++") for attention in report.attention)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_stands_above_the_diagonal_may_not_be_read(kind: type[Decoder]) -> None:
    report = answers(kind)
    assert {refusal.code for refusal in report.refusals} == {REFUSED[kind]}, str(report)


def test_without_the_proof_another_row_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases can fail: the same rule, but that everything may be read."""
    rule = RULES[only_where]

    def everything(op: Op) -> Any:
        out: Any = rule(op)
        return replace(out, parts=replace(out.parts, valid=sympy.true))

    monkeypatch.setitem(RULES, only_where, everything)
    with pytest.raises(Mismatch):
        answers(OneColumn)
