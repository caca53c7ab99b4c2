"""Real models with real weights, through the public entry points, against their own forward without a cache.

The reference is never another cache: `generate` with the cache of transformers differs from its own model for some.
With `KVPASS_SOAK` set 256 tokens are made, and the loop without a cache makes them too. Without it that loop is cut
short, and the rest is checked in one plain forward, which gives what every step of that loop would give.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import kvpass
from tests.property.oracle import compare

pytestmark = [pytest.mark.weights, pytest.mark.slow]

TOKENS, LOOP = (256, 256) if "KVPASS_SOAK" in os.environ else (64, 12)
PROMPT = "Once upon a time, in a small village by the sea, there lived a"
PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of one hundred",
    "My favourite colour is",
    "In the beginning there was nothing, and then, all of a sudden,",
]


@dataclass(frozen=True)
class Pretrained:
    """A model as transformers loads it, its tokenizer, and its compiled forward with the cache behind it."""

    model: Any
    tokenizer: Any
    fast: Callable[..., Any]
    cache: kvpass.Cache

    def encode(self, text: str | list[str]) -> dict[str, Tensor]:
        self.tokenizer.padding_side = "left"
        return dict(self.tokenizer(text, return_tensors="pt", padding=isinstance(text, list)))


@pytest.fixture(autouse=True, scope="module")
def _as_users_have_it() -> Iterator[None]:
    """The compiler's own flags: other tests do without its optimisation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KVPASS_CXXFLAGS", raising=False)
        yield


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def pretrained(request: pytest.FixtureRequest) -> Pretrained:
    from kvpass.demos import load

    torch._dynamo.reset()
    model, tokenizer = load(request.param)
    model.eval()
    cache = kvpass.Cache(capacity="256MiB", poison=True)
    fast = torch.compile(model.forward, backend="kvpass", options={"cache": cache, "tiers": "compiled"})
    return Pretrained(model, tokenizer, fast, cache)


def greedy(forward: Callable[..., Any], ids: Tensor, count: int) -> Tensor:
    """The loop that everybody writes first."""
    for _ in range(count):
        logits = forward(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


@torch.no_grad()
def test_greedy_is_the_loop_without_a_cache(pretrained: Pretrained) -> None:
    cache = kvpass.Cache(capacity="256MiB", poison=True)
    fast = kvpass.compile(pretrained.model, cache=cache, tiers="compiled")
    ids = pretrained.encode(PROMPT)["input_ids"]
    got = greedy(fast, ids, TOKENS)
    assert got.shape == (1, ids.shape[1] + TOKENS)
    want = greedy(pretrained.model, ids, LOOP)
    assert got[:, : want.shape[1]].tolist() == want.tolist()

    logits = pretrained.model(input_ids=got[:, :-1], use_cache=False).logits
    assert logits[:, ids.shape[1] - 1 :].argmax(-1).tolist() == got[:, ids.shape[1] :].tolist()
    last = fast(input_ids=got[:, :-1].contiguous(), use_cache=False, logits_to_keep=1).logits
    compare(last, logits[:, -1:])

    stats = cache.stats()
    assert stats.rows_computed <= ids.shape[1] + TOKENS + 1
    assert stats.rows_reused >= TOKENS * (TOKENS - 1) // 2

    entry = pretrained.model.get_input_embeddings().weight.data[ids[0, 1], :1]
    entry += 1  # moves no version counter
    compare(fast(ids, use_cache=False, logits_to_keep=1).logits, pretrained.model(ids, use_cache=False).logits[:, -1:])
    entry -= 1


@pytest.mark.soak
@torch.no_grad()
def test_left_padded_batch(pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = pretrained.encode(PROMPTS)
    assert len({int(row.sum()) for row in inputs["attention_mask"]}) > 1
    check_generate(pretrained, monkeypatch, inputs, do_sample=False, max_new_tokens=12)


@pytest.mark.soak
@torch.no_grad()
def test_beams(pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = pretrained.encode(PROMPTS[0])
    check_generate(pretrained, monkeypatch, inputs, do_sample=False, num_beams=4, max_new_tokens=12)


@pytest.mark.soak
@torch.no_grad()
def test_sampling_with_a_seed(pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    check_generate(pretrained, monkeypatch, pretrained.encode(PROMPT), do_sample=True, top_k=20, max_new_tokens=12)


def check_generate(
    pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Tensor], **options: Any
) -> None:
    """transformers' own `generate` without its cache, before and after `model.forward` is compiled."""
    model = pretrained.model
    torch.manual_seed(0)
    want = model.generate(**inputs, use_cache=False, **options)
    before = pretrained.cache.stats().rows_reused
    monkeypatch.setattr(model, "forward", pretrained.fast)
    torch.manual_seed(0)
    got = model.generate(**inputs, use_cache=False, **options)
    assert got.tolist() == want.tolist()
    assert pretrained.cache.stats().rows_reused > before
