"""A call of ids alone: transformers returns a cache of its own, which is an output like any other."""

from typing import Any

import pytest
import torch

import kvpass
from kvpass.frontend.api import recording
from tests.zoo.tiny import Mapped, inputs, tiny_model

FAMILIES: dict[str, tuple[Mapped, int]] = {  # and how many last rows of a text are returned
    "llama": ("causal", 1),
    "gemma2": ("causal", 4),  # layers with a window, which keep its rows alone
    "deepseek_v2": ("causal", 1),
    "gpt2": ("causal", 1),
    "t5": ("seq2seq", 1),
}


def _held(answer: Any) -> list[torch.Tensor]:
    """The logits, and the keys and values of a cache of transformers'."""
    caches = [answer.past_key_values]
    if hasattr(caches[0], "self_attention_cache"):
        caches = [caches[0].self_attention_cache, caches[0].cross_attention_cache]
    return [answer.logits, *(x for cache in caches for layer in cache.layers for x in (layer.keys, layer.values))]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_callers_cache_is_an_output(family: str) -> None:
    torch._dynamo.reset()
    mapping, tail = FAMILIES[family]
    model, cache = tiny_model(mapping, family, "sdpa"), kvpass.Cache("8MiB", page_size=4, poison=True)
    work = []
    with torch.no_grad(), recording() as found:
        fast = kvpass.compile(model, cache=cache, verify=False)
        for rows in (9, 10, 14, 6, 20):
            call = {name: value for name, value in inputs(model, rows, 2).items() if name != "use_cache"}
            before = cache.stats().rows_computed
            got, want = _held(fast(**call)), _held(model(**call))
            work.append(cache.stats().rows_computed - before)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    report = kvpass.Report.of(found)
    assert report.proven, str(report)
    assert work[:4] == [18, 2 * tail, 8, 2 * tail], "work is proportional to what is new"
