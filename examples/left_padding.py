"""Four prompts of different lengths in one batch, padded on the left, as Hugging Face wants them for `generate`.

A padding row has no key that it may see, so its own logits mean nothing in any implementation; what kvpass proves is
that no other row depends on it.

    python examples/left_padding.py
"""

from __future__ import annotations

import torch

from kvpass import demos

PROMPTS = [
    "The capital of Italy is",
    "Once upon a time, in a village by the sea, there lived",
    "Water boils at",
    "Roses are red, violets are",
]
TOKENS = 12


def main() -> None:
    model, tokenizer = demos.load("smollm2")
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)  # input_ids and attention_mask, [4, T]
    options = {"use_cache": False, "do_sample": False, "max_new_tokens": TOKENS}

    want = model.generate(**batch, **options)
    model.forward = torch.compile(model.forward, backend="kvpass")
    got = model.generate(**batch, **options)

    for prompt, row in zip(PROMPTS, got, strict=True):
        print(f"{prompt} |{tokenizer.decode(row[batch.input_ids.shape[1] :], skip_special_tokens=True)}")
    print(f"\nequal to generate(use_cache=False) without kvpass: {torch.equal(got, want)}")


if __name__ == "__main__":
    main()
