"""Hugging Face's own `generate`, with its cache switched off and kvpass behind `forward`: greedy, sampling, beams.

python examples/hf_generate.py
"""

from __future__ import annotations

import time
from typing import Any

import torch

import kvpass
from kvpass import demos

TOKENS = 24
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 40},
    "beams of 4": {"do_sample": False, "num_beams": 4},
}


def main() -> None:
    model, tokenizer = demos.load("smollm2")
    ids = demos.prompt_ids(tokenizer, "Name three rivers in Europe.")
    plain = model.forward
    fast = torch.compile(model.forward, backend="kvpass")
    cache = kvpass.default_cache()

    for way, options in WAYS.items():
        texts, seconds = [], []
        for forward in (plain, fast):
            model.forward = forward
            torch.manual_seed(0)
            start = time.perf_counter()
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), use_cache=False, max_new_tokens=TOKENS, **options
            )
            seconds.append(time.perf_counter() - start)
            texts.append(output[0, ids.shape[1] :].tolist())
        print(f"{way}: {tokenizer.decode(texts[1], skip_special_tokens=True)}")
        print(f"  equal: {texts[0] == texts[1]}; without a cache {seconds[0]:.1f} s, kvpass {seconds[1]:.1f} s")
        print("  (compiling included)\n" if way == "greedy" else "")
    print(cache.stats())


if __name__ == "__main__":
    main()
