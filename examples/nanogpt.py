"""A small GPT as people write it: learned positions, no cache, its own sampling loop. kvpass never edits this file.

python examples/nanogpt.py          learn the Zen of Python by heart, then recite it through kvpass
"""

from __future__ import annotations

import codecs
import contextlib
import io
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, block: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("past", torch.ones(block, block).tril().bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        scores = q @ k.transpose(-2, -1) / (C // self.heads) ** 0.5
        scores = scores.masked_fill(~self.past[:T, :T], float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, block: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, block)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, layers: int = 3, width: int = 96, heads: int = 3, block: int = 128) -> None:
        super().__init__()
        self.block = block
        self.tokens = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Embedding(block, width)
        self.layers = nn.Sequential(*(Block(width, heads, block) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET), bias=False)
        self.apply(start_small)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] to logits [B, T, V]."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.layers(x)))

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int, temperature: float = 1.0) -> Tensor:
        for _ in range(count):
            logits = self(ids[:, -self.block :])[:, -1] / temperature
            ids = torch.cat([ids, logits.softmax(-1).multinomial(1)], dim=1)
        return ids


def start_small(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def encode(text: str) -> Tensor:
    """Text to ids [1, T]; characters outside the alphabet are left out."""
    return torch.tensor([[ALPHABET.index(c) for c in text if c in ALPHABET]])


def decode(ids: list[int]) -> str:
    return "".join(ALPHABET[i] for i in ids)


def corpus() -> str:
    """The Zen of Python, which ships with it as a riddle: short enough to be learnt by heart in seconds."""
    with contextlib.redirect_stdout(io.StringIO()):  # importing `this` prints it
        import this
    return codecs.decode(this.s, "rot13")


def train(model: GPT, text: str, steps: int = 700, batch: int = 4, seed: int = 0) -> float:
    """Fit the model to the text in place; returns the last loss in nats per character."""
    generator = torch.Generator().manual_seed(seed)
    data = encode(text)[0]
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    loss = torch.zeros(())
    for _ in range(steps):
        starts = torch.randint(len(data) - model.block, (batch,), generator=generator)
        rows = torch.stack([data[i : i + model.block + 1] for i in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    model = GPT()
    start = time.perf_counter()
    loss = train(model, corpus())
    print(f"trained in {time.perf_counter() - start:.0f} s, loss {loss:.2f} nats per character\n")

    prompt = encode("Beautiful is ")
    texts = []
    for forward in (model.forward, torch.compile(model.forward, backend="kvpass")):
        model.forward = forward
        torch.manual_seed(0)
        texts.append(decode(model.eval().generate(prompt, 100, temperature=0.5)[0].tolist()))
    print(texts[1])
    print(f"\nequal to the text without kvpass: {texts[0] == texts[1]}")


if __name__ == "__main__":
    main()
