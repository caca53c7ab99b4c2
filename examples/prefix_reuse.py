"""Many questions about one text: the rows of the text are computed once, whichever question comes first.

Nothing says what is shared. Rows are found by content: by the ids (and mask, positions, ...) up to that row.

    python examples/prefix_reuse.py
"""

from __future__ import annotations

import time

import torch

import kvpass
from kvpass import demos

QUESTIONS = [f"What does line {number} say?" for number in range(1, 17)]


def main() -> None:
    import this  # prints the text in question

    text = "".join(this.d.get(c, c) for c in this.s)
    model, tokenizer = demos.load("smollm2")
    cache = kvpass.Cache(capacity="256MiB")
    fast = torch.compile(model, backend="kvpass", options={"cache": cache})
    prompts = [demos.prompt_ids(tokenizer, f"{text}\n\n{question}") for question in QUESTIONS]

    with torch.no_grad():
        # Dynamo compiles for the first length alone, then once for all lengths; let it, before the clock starts.
        for text in ("a first text", "and a second, longer text"):
            fast(demos.prompt_ids(tokenizer, text), use_cache=False, logits_to_keep=1)
        before = cache.stats()
        for ids in prompts:
            start = time.perf_counter()
            fast(ids, use_cache=False, logits_to_keep=1)
            now = cache.stats()
            computed = now.rows_computed - before.rows_computed
            print(f"{ids.shape[1]} rows, {computed:4} computed, {1000 * (time.perf_counter() - start):6.0f} ms")
            before = now
    print(f"\n{cache.stats()}")


if __name__ == "__main__":
    main()
