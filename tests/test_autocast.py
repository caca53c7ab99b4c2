"""Autocast is honoured: rows of one precision are not those of another, and each op runs in the one that it had."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

import kvpass
from kvpass.frontend import autocast
from kvpass.frontend.api import recording
from tests.coverage.base import HEADS, NEG_INF, SIZE, VOCAB, Decoder, build, grid

BF16 = torch.bfloat16


def half(**options: Any) -> torch.autocast:
    return torch.autocast("cpu", BF16, **options)


class Inside(Decoder):
    """All of the model; two layers, so that one is traced for both."""

    layers = 2

    def forward(self, ids: Tensor, *more: Any) -> Tensor:
        with half():
            return super().forward(ids)


class Parts(Decoder):
    """Scores in bfloat16, a softmax that autocast leaves in float32, values and head in float32, one op in between."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        with half():
            scores = (q @ k.mT).masked_fill(j > i, NEG_INF)
            with half(enabled=False):
                weights = scores.float().softmax(-1)
            mixed = weights @ v
        return self.merge(mixed.float(), layer)


class Einsum(Decoder):
    """Converts its operands where it has moved their axes: more than a conversion in front of it."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        with half():
            scores = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(j > i, NEG_INF)
            mixed = torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v.float()).flatten(2)
            return self.out[layer](mixed) * (1 + cosine_similarity(mixed, x, -1)[..., None])


class Ready(nn.Module):
    """PyTorch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, 2 * SIZE, batch_first=True)
        self.embed, self.layers = nn.Embedding(VOCAB, SIZE), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(SIZE, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.layers(self.embed(ids), mask=mask, is_causal=True))


class Sdpa(Decoder):
    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        return self.merge(scaled_dot_product_attention(*self.project(x, layer), is_causal=True), layer)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "inside": lambda: build(Inside),
    "parts": lambda: build(Parts),
    "einsum": lambda: build(Einsum),
    "ready": lambda: Ready().eval(),
    "sdpa": lambda: build(Sdpa),
}


def close(got: Tensor, want: Tensor) -> None:
    """Equal but for the order of sums in bfloat16."""
    torch.testing.assert_close(got, want, rtol=2e-2, atol=3e-2)


def played(model: nn.Module, around: bool, **options: Any) -> tuple[list[int], kvpass.Report]:
    torch._dynamo.reset()
    cache, work = kvpass.Cache("8MiB", page_size=4, poison=True), []
    ids = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), recording() as found:
        fast = kvpass.compile(model, cache=cache, **options)
        for rows in (9, 10, 14, 6, 30):
            before = cache.stats().rows_computed
            with half(enabled=around):
                close(fast(ids[:, :rows]), model(ids[:, :rows]))
            work.append(cache.stats().rows_computed - before)
    return work, kvpass.Report.of(found)


@pytest.mark.parametrize("tiers", ["eager", "compiled"])
@pytest.mark.parametrize(
    ("name", "around"), [*((n, True) for n in MODELS), *((n, False) for n in ("inside", "parts", "einsum"))]
)
def test_is_proven_cached_and_equal(name: str, around: bool, tiers: str) -> None:
    work, report = played(MODELS[name](), around, verify=tiers == "compiled", tiers=tiers)
    assert report.proven, str(report)
    assert work == [18, 2, 8, 2, 32]


def test_rows_of_one_precision_are_not_those_of_another() -> None:
    torch._dynamo.reset()
    model, cache = build(Sdpa), kvpass.Cache("8MiB")
    fast, ids = kvpass.compile(model, cache=cache, verify=False), torch.randint(0, VOCAB, (1, 12))
    with torch.no_grad(), recording() as found:
        for enabled in (False, True, False, True):
            before = cache.stats().rows_computed
            for rows in (7, 8, 12):
                with half(enabled=enabled):
                    close(fast(ids[:, :rows]), model(ids[:, :rows]))
            first = before < 24 and cache.stats().rows_computed - before == 12
            assert first or cache.stats().rows_computed - before == 3
    assert [record.refusal for record in found] == [None, None]


def test_a_conversion_that_is_missed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocast._Writer, "told", lambda self, node, state: {})
    with pytest.raises(AssertionError):
        played(build(Inside), False, verify=False)


def test_autocast_that_is_off_changes_nothing() -> None:
    class Exact(Decoder):
        def forward(self, ids: Tensor, *more: Any) -> Tensor:
            with half(enabled=False):
                return super().forward(ids)

    work, report = played(build(Exact), False)
    assert report.proven
    assert work == [18, 2, 8, 2, 32]
