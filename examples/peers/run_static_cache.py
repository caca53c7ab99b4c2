"""transformers' StaticCache with a step compiled by Inductor: MODEL ROWS BATCH THREADS.

The cache is as long as it must be, and the step has static shapes, which is the best case. Nothing is taken from
Inductor's caches on disk, so that the time of the first step is that of a cold start.
"""

from __future__ import annotations

import sys
import time

import torch
from serving import serve
from torch._inductor import config
from transformers import StaticCache, __version__

from kvpass import demos

config.force_disable_caches = True
name, rows, sequences, threads = sys.argv[1], *map(int, sys.argv[2:5])
torch.set_num_threads(threads)
model, _ = demos.load(name)
cache = StaticCache(config=model.config, max_cache_len=rows)
compiled = torch.compile(model.forward, dynamic=False, fullgraph=True)


@torch.no_grad()
def run(call, ids: torch.Tensor) -> list[int]:  # type: ignore[no-untyped-def]
    logits = call(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    found: list[int] = logits[:, -1].argmax(-1).tolist()
    return found


def prompt(ids: list[list[int]]) -> list[int]:
    cache.reset()
    return run(model, torch.tensor(ids))


def step(tokens: list[int]) -> list[int]:
    return run(compiled, torch.tensor(tokens)[:, None])


first = prompt([[1, 2, 3]] * sequences)
begin = time.perf_counter()
step(first)
serve({"version": f"StaticCache of transformers {__version__}", "ready_s": time.perf_counter() - begin}, prompt, step)
