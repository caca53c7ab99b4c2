"""kvpass's own loop: a stream, prompts of several lengths, a session that branches, and speculation.

python examples/generate.py
"""

from __future__ import annotations

import time

import torch

import kvpass
from kvpass import demos


def main() -> None:
    model, tokenizer = demos.load("smollm2")
    ends = demos.stop_ids(model)
    fast = torch.compile(model, backend="kvpass")
    ids = demos.prompt_ids(tokenizer, "Name three rivers in Europe.")

    for token in kvpass.stream(fast, ids, 40, eos_token_id=ends):
        print(tokenizer.decode([token]), end="", flush=True)
    print("\n")

    questions = ("What is a prime number?", "Translate 'good morning' into French and into Spanish, please.")
    prompts = [demos.prompt_ids(tokenizer, question)[0] for question in questions]
    for prompt, text in zip(prompts, kvpass.generate(fast, prompts, 24, eos_token_id=ends), strict=True):
        print(f"> {tokenizer.decode(text[len(prompt) :], skip_special_tokens=True)}")

    with kvpass.open(fast, ids, logits_to_keep=1) as session, session.fork(3) as three:
        firsts = session.logits[0, -1].topk(3).indices
        three.extend(firsts.unsqueeze(1))
        seconds = three.logits[:, -1].argmax(-1)
        pairs = torch.stack([firsts, seconds], 1).tolist()
        print("\nthe three likeliest beginnings:", [tokenizer.decode(pair) for pair in pairs])

    print()
    wanted = "Repeat this sentence three times: the cat sat on the mat and looked at the dog."
    listing = demos.prompt_ids(tokenizer, wanted)
    for draft in (None, "prompt-lookup"):
        start = time.perf_counter()
        made = kvpass.generate(fast, listing, 48, eos_token_id=ends, draft=draft, details=True)
        taken = time.perf_counter() - start
        told = f"{len(made.tokens[0])} tokens in {made.calls} calls, {taken:.2f} s with compiling"
        print(f"{draft or 'no draft'}: {told}" + (f"; {made.acceptance:.0%} accepted" if draft else ""))


if __name__ == "__main__":
    main()
