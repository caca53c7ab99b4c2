"""Real models with real weights, through the public entry points, against their own forward without a cache.

The reference is never another cache: `generate` with the cache of transformers differs from its own model for some.
With `KVPASS_SOAK` set the loops without a cache run to their full 256 tokens for both models; without it Gemma's is cut
short, and the rest of its tokens are checked in one plain forward, which gives what every step of that loop would give.
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

TOKENS = 256
SOAK = "KVPASS_SOAK" in os.environ
PROMPT = "Once upon a time, in a small village by the sea, there lived a"
PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of one hundred",
    "My favourite colour is",
    "In the beginning there was nothing, and then, all of a sudden,",
]


@dataclass(frozen=True)
class Pretrained:
    """A model as transformers loads it, its tokenizer, and how many tokens the loop without a cache is run for."""

    model: Any
    tokenizer: Any
    loop: int

    def encode(self, text: str | list[str]) -> dict[str, Tensor]:
        self.tokenizer.padding_side = "left"
        return dict(self.tokenizer(text, return_tensors="pt", padding=isinstance(text, list)))


def load(name: str, loop: int) -> Pretrained:
    from kvpass.demos import load as load_demo

    model, tokenizer = load_demo(name)
    return Pretrained(model.eval(), tokenizer, TOKENS if SOAK else loop)


@pytest.fixture(scope="module", params=[("smollm2", TOKENS), ("gemma3", 24)], ids=["smollm2", "gemma3"])
def pretrained(request: pytest.FixtureRequest) -> Iterator[Pretrained]:
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    yield load(*request.param)
    torch.set_num_threads(threads)


def greedy(forward: Callable[..., Any], ids: Tensor, count: int) -> Tensor:
    """The loop that everybody writes first."""
    for _ in range(count):
        logits = forward(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


@torch.no_grad()
def test_greedy_is_the_loop_without_a_cache(pretrained: Pretrained) -> None:
    cache = kvpass.Cache(capacity="256MiB", poison=True)
    fast = kvpass.compile(pretrained.model, cache=cache)
    ids = pretrained.encode(PROMPT)["input_ids"]
    got = greedy(fast, ids, TOKENS)
    assert got.shape == (1, ids.shape[1] + TOKENS)
    want = greedy(pretrained.model, ids, pretrained.loop)
    assert got[:, : want.shape[1]].tolist() == want.tolist()

    logits = pretrained.model(input_ids=got[:, :-1], use_cache=False).logits
    assert logits[:, ids.shape[1] - 1 :].argmax(-1).tolist() == got[:, ids.shape[1] :].tolist()
    last = fast(input_ids=got[:, :-1], use_cache=False, logits_to_keep=1).logits
    compare(last, logits[:, -1:])

    stats = cache.stats()
    assert stats.rows_computed <= ids.shape[1] + TOKENS + 1
    assert stats.rows_reused >= TOKENS * (TOKENS - 1) // 2


@torch.no_grad()
def test_left_padded_batch(pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = pretrained.encode(PROMPTS)
    assert len({int(row.sum()) for row in inputs["attention_mask"]}) > 1
    check_generate(pretrained, monkeypatch, inputs, do_sample=False, max_new_tokens=12)


@torch.no_grad()
def test_beams(pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = pretrained.encode(PROMPTS[0])
    check_generate(pretrained, monkeypatch, inputs, do_sample=False, num_beams=4, max_new_tokens=12)


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
    torch._dynamo.reset()
    cache = kvpass.Cache(capacity="256MiB", poison=True)
    monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend="kvpass", options={"cache": cache}))
    torch.manual_seed(0)
    got = model.generate(**inputs, use_cache=False, **options)
    assert got.tolist() == want.tolist()
    assert cache.stats().rows_reused > 0
