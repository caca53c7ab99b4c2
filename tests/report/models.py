"""One tiny model of each kind that a report speaks of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpass.frontend.api import compile as compile_incremental
from kvpass.frontend.api import recording, wait
from kvpass.report.parts import Record

VOCABULARY, WIDTH, HEADS, ROWS = 11, 8, 2, 16


class Base(nn.Module):
    """Embedding, one attention with a residual, a head; `mix` says how."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kv_heads, size = kv_heads, WIDTH // HEADS
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * size, bias=False) for _ in range(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        counts = (HEADS, self.kv_heads, self.kv_heads)
        q, k, v = (
            part(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for part, n in zip((self.q, self.k, self.v), counts, strict=True)
        )
        return q, k, v

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        return self.head(x + self.mix(x))


class Causal(Base):
    """Scores masked by a registered triangle."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("triangle", torch.tril(torch.ones(ROWS, ROWS, dtype=torch.bool)))

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        rows = x.shape[1]
        scores = (q @ k.transpose(-1, -2)) * 0.5
        scores = scores.masked_fill(~self.triangle[:rows, :rows], float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Sliding(Base):
    """SDPA with a window of four, built in the graph."""

    def window(self, rows: int) -> Tensor:
        i = torch.arange(rows).unsqueeze(1)
        j = torch.arange(rows)
        return (j <= i) & (j > i - 4)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.window(x.shape[1])).transpose(1, 2).flatten(2)


class Mixture(Sliding):
    """As Gemma: full and sliding attention in turn, one key/value head; two layers share each kind."""

    def __init__(self) -> None:
        super().__init__(kv_heads=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for full in (False, False, True):
            q, k, v = self.heads(x)
            mask = None if full else self.window(x.shape[1])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=full, enable_gqa=True)
            x = x + y.transpose(1, 2).flatten(2)
        return self.head(x)


class Bidirectional(Base):
    """Every row sees every row."""

    def mix(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)


class Broken(Causal):
    """Dynamo makes two graphs of it."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.mix(x)
        torch._dynamo.graph_break()
        return self.head(x)


class Padded(Base):
    """The caller's padding mask beside the triangle, with a finite fill; returns its keys and values too."""

    def forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(ids)
        q, k, v = self.heads(x)
        rows = torch.arange(ids.shape[1])
        keep = (rows <= rows.unsqueeze(1)) & attention_mask.bool()[:, None, None, :]
        scores = (q @ k.transpose(-1, -2)).masked_fill(~keep, torch.finfo(torch.float32).min)
        return self.head(x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), k, v


class Unrecognised(Base):
    """The weights are used twice, so no single node can stand for the attention."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        rows = torch.arange(x.shape[1])
        scores = (q @ k.transpose(-1, -2)).masked_fill(rows > rows.unsqueeze(1), float("-inf"))
        weights = scores.softmax(-1)
        return (weights @ v + weights @ k).transpose(1, 2).flatten(2)


class Sorted(Causal):
    """An op that has no rule, in the middle of a graph."""

    def mix(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(super().mix(x))


@dataclass(frozen=True)
class Kind:
    """A model, its arguments, and whether the sequence axis is dynamic from the first call."""

    model: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]] = lambda: (ids(),)
    dynamic: bool = True


def ids() -> Tensor:
    return torch.arange(14).reshape(2, 7) % VOCABULARY


KINDS = {
    "causal": Kind(Causal),
    "sliding": Kind(Sliding),
    "mixture": Kind(Mixture),
    "bidirectional": Kind(Bidirectional),
    "static": Kind(Causal, dynamic=False),
    "broken": Kind(Broken),
    "padded": Kind(Padded, lambda: (ids(), torch.ones(2, 7, dtype=torch.int64))),
    "unrecognised": Kind(Unrecognised),
    "unknown_op": Kind(Sorted),
}


def compiled(name: str) -> list[Record]:
    """The compilations that one call of a kind causes."""
    kind = KINDS[name]
    model = kind.model().eval()
    torch._dynamo.reset()
    with recording() as found, torch.no_grad():
        if kind.dynamic:
            compile_incremental(model, verify=False, tiers="auto")(*kind.args())
        else:
            torch.compile(model, backend="kvpass", dynamic=False)(*kind.args())
    wait()
    torch._dynamo.reset()
    return list(found)
