"""Parts of a model that are compiled or recomputed as one: `nested_compile_region` and activation checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kvpass
from kvpass.frontend import export, higher_order
from kvpass.frontend.api import recording

VOCAB, WIDTH = 29, 32
region = torch.compiler.nested_compile_region


class Layer(nn.Module):
    """Attention and an activation; two results, one of them a part of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("gain", torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (p.view(*x.shape[:2], 4, 8).transpose(1, 2) for p in self.mix(self.norm(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out(y.transpose(1, 2).flatten(2)) * self.gain
        return x + nn.functional.silu(y), y


class Regions(nn.Module):
    """Each layer is a region."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        kept = torch.zeros_like(x)
        for layer in self.layers:
            x, y = self.call(layer, x)
            kept = kept + y
        return self.head(x + kept)

    @region
    def call(self, layer: nn.Module, x: Tensor) -> Any:
        return layer(x)


class Checkpoints(Regions):
    """Each layer is recomputed in training."""

    def call(self, layer: nn.Module, x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=False)


class Nested(Regions):
    """Two layers are a region, and each of them one of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for k in (0, 2):
            x = self.pair(self.layers[k], self.layers[k + 1], x)
        return self.head(x)

    @region
    def pair(self, one: nn.Module, two: nn.Module, x: Tensor) -> Tensor:
        return self.call(two, self.call(one, x)[0])[0]


class Backwards(Regions):
    """A region in which later rows are read."""

    @region
    def call(self, layer: nn.Module, x: Tensor) -> Any:
        y, kept = layer(x)
        return y + x.flip(1), kept


def history(kind: Callable[[], nn.Module]) -> tuple[list[int], kvpass.Report]:
    """Rows computed by each call, every answer the model's; the proof stands alone."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, cache = kind().eval(), kvpass.Cache("8MiB", page_size=4, poison=True)
    ids, work = torch.randint(0, VOCAB, (1, 40)), []
    with torch.no_grad(), recording() as found:
        fast = kvpass.compile(model, cache=cache, verify=False)
        for rows in (9, 10, 14, 6, 40):
            before = cache.stats().rows_computed
            torch.testing.assert_close(fast(ids[:, :rows]), model(ids[:, :rows]), rtol=1e-4, atol=1e-5)
            work.append(cache.stats().rows_computed - before)
    return work, kvpass.Report.of(found)


@pytest.mark.parametrize("kind", [Regions, Checkpoints, Nested])
def test_a_region_is_its_ops(kind: Callable[[], nn.Module]) -> None:
    work, report = history(kind)
    assert report.proven, str(report)
    assert len(report.attention) == 4
    assert work == [9, 1, 4, 1, 26]


@pytest.mark.parametrize(("kind", "code"), [(Backwards, "KV202")])
def test_what_a_region_hides_is_seen(kind: Callable[[], nn.Module], code: str) -> None:
    work, report = history(kind)
    assert {refusal.code for refusal in report.refusals} == {code}, str(report)
    assert work == [0] * 5


def test_regions_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, right = [], export.traced
    monkeypatch.setattr(export, "traced", lambda gm, fakes: traced.append(len(gm.graph.nodes)) or right(gm, fakes))
    history(Regions)
    assert sum(traced) < 120  # of 159
    assert len(traced) > 1


def test_the_operands_of_a_region_in_another_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: weights of the same shape that change places."""
    right = higher_order._copy

    def turned(graph: Any, module: Any, made: dict[Any, Any], path: str) -> Any:
        if path:
            norms = [n for n in made if "norm" in n.name]
            values = [made[n] for n in norms]
            made |= dict(zip(norms, reversed(values), strict=True))
        return right(graph, module, made, path)

    monkeypatch.setattr(higher_order, "_copy", turned)
    monkeypatch.setattr(nn.init, "ones_", lambda x: x.data.uniform_(0.5, 1.5))
    with pytest.raises(AssertionError):
        history(Regions)
