"""Encoders and decoders, called as ``model(encoder inputs, .., decoder ids)``."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, SIZE, HEADS, PLACEHOLDER = 24, 16, 2, 3


def split(x: Tensor) -> Tensor:
    """``[B, S, D]`` to ``[B, H, S, D / H]``."""
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


class Attention(nn.Module):
    """``bias``: bool or float, broadcastable to ``[B, H, N, S]``, or None."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(SIZE, SIZE) for _ in range(4))
        self.scale = scale

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(memory)), split(self.v(memory))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=self.scale)
        return self.o(y.transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(SIZE, 2 * SIZE), nn.GELU(), nn.Linear(2 * SIZE, SIZE))


class Layer(nn.Module):
    """Norms before the blocks; ``cross`` reads a memory."""

    def __init__(self, cross: bool, scale: float | None = None) -> None:
        super().__init__()
        self.own, self.mlp = Attention(scale), Mlp()
        self.cross = Attention(scale) if cross else None
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(3))

    def forward(
        self, x: Tensor, bias: Tensor | None, causal: bool, memory: Any = None, kept: Tensor | None = None
    ) -> Tensor:
        y = self.norms[0](x)
        x = x + self.own(y, y, bias, causal)
        if self.cross is not None:
            x = x + self.cross(self.norms[1](x), memory, kept)
        return x + self.mlp(self.norms[2](x))


class T5(nn.Module):
    """Buckets of relative positions, no scale, and a padding mask of the encoder that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.encoder, self.decoder = Layer(False, 1.0), Layer(True, 1.0)
        self.near = nn.Embedding(9, HEADS)
        self.before = nn.Embedding(9, HEADS)

    def forward(self, read: Tensor, kept: Tensor, ids: Tensor) -> Tensor:
        hidden = (1.0 - kept[:, None, None, :].float()) * torch.finfo(torch.float32).min
        i, j = torch.arange(read.shape[1])[:, None], torch.arange(read.shape[1])
        bias = self.near((j - i).clamp(-4, 4) + 4).permute(2, 0, 1)[None] + hidden
        memory = self.encoder(self.embed(read), bias, False)
        i, j = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])
        bias = self.before((i - j).clamp(0, 8)).permute(2, 0, 1)[None]
        bias = bias.masked_fill(j > i, torch.finfo(torch.float32).min)
        x = self.decoder(self.embed(ids), bias, False, memory, hidden)
        return F.linear(x * SIZE**-0.5, self.embed.weight)


class Bart(nn.Module):
    """Learned positions, norms after the sum, a bool padding mask; the encoder's result is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCAB, SIZE), nn.Embedding(64, SIZE)
        self.own, self.cross, self.encoder = Attention(), Attention(), Attention()
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(3))
        self.head = nn.Linear(SIZE, VOCAB)

    def forward(self, read: Tensor, kept: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        seen = kept[:, None, None, :].bool()
        memory = self.embed(read) + self.position(torch.arange(read.shape[1]) + 2)
        memory = self.norms[0](memory + self.encoder(memory, memory, seen))
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]) + 2)
        x = self.norms[1](x + self.own(x, x, causal=True))
        x = self.norms[2](x + self.cross(x, memory, seen))
        return self.head(x), memory


class Whisper(nn.Module):
    """Two convolutions, one of which halves the length, and sinusoids; the caller gets the last row."""

    depth = 1

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(5, SIZE, 3, padding=1), nn.Conv1d(SIZE, SIZE, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, SIZE)
        self.embed, self.position = nn.Embedding(VOCAB, SIZE), nn.Embedding(64, SIZE)
        self.encoder, self.decoder, self.head = Layer(False), Layer(True), nn.Linear(SIZE, VOCAB)

    def forward(self, heard: Tensor, ids: Tensor) -> Tensor:
        x = F.gelu(self.second(self.norm(F.gelu(self.first(heard.transpose(1, 2)))))).transpose(1, 2)
        rates = torch.exp(-math.log(100.0) * torch.arange(SIZE // 2) / SIZE)
        angles = torch.arange(x.shape[1])[:, None] * rates
        memory = self.encoder(x + torch.cat([angles.sin(), angles.cos()], -1), None, False)
        x = self.embed(ids) + self.position.weight[: ids.shape[1]]
        for _ in range(self.depth):
            x = self.decoder(x, None, True, memory)
        return self.head(x[:, -1])


class Mixing(Whisper):
    """Of the sounds of a batch the mean is taken away: an answer depends on all of them, and so does what is stored."""

    depth = 2

    def forward(self, heard: Tensor, ids: Tensor) -> Tensor:
        return super().forward(heard - heard.mean(0), ids)


class Prefix(nn.Module):
    """An image in front of text, on one axis with it.

    Args:
        mask: ``causal``; ``prefix``: the image sees all of itself; ``leaky``: it sees the first token as well.
    """

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask
        self.look, self.embed, self.position = nn.Linear(5, SIZE), nn.Embedding(VOCAB, SIZE), nn.Embedding(64, SIZE)
        self.layers = nn.ModuleList(Layer(False) for _ in range(2))
        self.head = nn.Linear(SIZE, VOCAB)

    def forward(self, seen: Tensor, ids: Tensor) -> Tensor:
        x = torch.cat([self.look(seen), self.embed(ids)], dim=1)
        rows = torch.arange(x.shape[1])
        x = x + self.position(rows)
        ahead = {"causal": 0, "prefix": seen.shape[1], "leaky": seen.shape[1] + 1}[self.mask]
        allowed = (rows <= rows[:, None]) | (rows < ahead)
        for layer in self.layers:
            x = layer(x, allowed if ahead else None, not ahead)
        return self.head(x[:, seen.shape[1] :])


class Placeholders(nn.Module):
    """Image features in the places of a token, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.embed = nn.Linear(5, SIZE), nn.Embedding(VOCAB, SIZE)
        self.layer, self.head = Layer(False), nn.Linear(SIZE, VOCAB)

    def forward(self, seen: Tensor, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x.masked_scatter((ids == PLACEHOLDER)[..., None].expand_as(x), self.look(seen))
        return self.head(self.layer(x, None, True))
