"""Small whole models whose attention takes other arguments than queries, keys, values and a mask.

Each is `model(ids) -> logits`, or `model(ids, memory)` where it says so; `ATTENTIONS` says how many it has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import einops
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tests.spellings.base import NEG_INF

VOCAB, SIZE, HEADS, MAX_ROWS = 19, 16, 2, 64


class Model(nn.Module):
    """`head(x + mix(x))`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, SIZE), nn.Linear(SIZE, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.mix(x))

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def causal_mask(rows: int, kind: str) -> Tensor:
    """`[S, S]`, of what is hidden, as PyTorch's own modules want it."""
    if kind == "bool":
        return torch.ones(rows, rows, dtype=torch.bool).triu(1)
    if kind == "built":
        return nn.Transformer.generate_square_subsequent_mask(rows)
    return torch.zeros(rows, rows).masked_fill(torch.arange(rows)[:, None] < torch.arange(rows), NEG_INF)


# --- modules of PyTorch ----------------------------------------------------------------------------------------------


class Multihead(Model):
    def __init__(self, kind: str, *, weights: bool = False, batch_first: bool = True, hint: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, HEADS, dropout=0.1, batch_first=batch_first)
        self.kind, self.weights, self.batch_first, self.hint = kind, weights, batch_first, hint

    def mix(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        mask = causal_mask(x.shape[1 if self.batch_first else 0], self.kind)
        y, _ = self.attention(x, x, x, attn_mask=mask, need_weights=self.weights, is_causal=self.hint)
        return y if self.batch_first else y.transpose(0, 1)


class Encoder(Model):
    """`is_causal` is said or not: PyTorch would look into the mask then, which splits the graph."""

    def __init__(self, kind: str, *, batch_first: bool = True, hint: bool | None = False, **kwargs: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, 24, batch_first=batch_first, **kwargs)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(SIZE), enable_nested_tensor=False)
        self.kind, self.batch_first, self.hint = kind, batch_first, hint
        for k, weight in enumerate(self.encoder.parameters()):  # the layers are copies of one
            nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(k))

    def mix(self, x: Tensor) -> Tensor:
        mask = causal_mask(x.shape[1], self.kind)
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.encoder(x, mask=mask, is_causal=self.hint)
        return y if self.batch_first else y.transpose(0, 1)


class EncoderLayer(Model):
    def __init__(self, kind: str, **kwargs: Any) -> None:
        super().__init__()
        self.layer, self.kind = nn.TransformerEncoderLayer(SIZE, HEADS, 24, batch_first=True, **kwargs), kind

    def mix(self, x: Tensor) -> Tensor:
        return self.layer(x, src_mask=causal_mask(x.shape[1], self.kind))


class Decoder(Model):
    """`model(ids, memory)`."""

    def __init__(self, kind: str, *, hint: bool | None = True, **kwargs: Any) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(SIZE, HEADS, 24, batch_first=True, **kwargs)
        self.decoder, self.kind, self.hint = nn.TransformerDecoder(layer, 2), kind, hint
        for k, weight in enumerate(self.decoder.parameters()):
            nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(k))

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        mask = causal_mask(ids.shape[1], self.kind)
        return self.head(self.decoder(self.embed(ids), memory, tgt_mask=mask, tgt_is_causal=self.hint))


# --- flex_attention --------------------------------------------------------------------------------------------------


class Flex(Model):
    """`score`: mask and bias in the score function; else a block mask of that name."""

    def __init__(self, how: str, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.how, self.kv_heads = how, kv_heads
        self.q, self.kv = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2 * kv_heads * SIZE // HEADS)
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25]))

    def mix(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, HEADS, -1).transpose(1, 2)
        k, v = (y.view(b, s, self.kv_heads, -1).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        y = self.attend(q, k, v, s)
        return y.transpose(1, 2).reshape(b, s, SIZE)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
        if self.how == "score":
            return flex_attention(q, k, v, score_mod=self.biased, scale=0.4)

        def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i - j < 5)

        def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return 3.0 * torch.tanh(score / 3.0)

        mask = create_block_mask(window, None, None, rows, rows, device=str(q.device))
        return flex_attention(q, k, v, score_mod=capped, block_mask=mask, enable_gqa=self.kv_heads != HEADS)

    def biased(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i >= j, score + self.slopes[h] * (j - i), NEG_INF)


class Documents(Model):
    """Texts that end with token 0 and do not see each other: the mask function reads a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(SIZE, 3 * SIZE)

    def forward(self, ids: Tensor) -> Tensor:
        (b, s), x = ids.shape, self.embed(ids)
        text = (ids == 0).cumsum(1)
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4)

        def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (text[b, i] == text[b, j]) & (j <= i)

        mask = create_block_mask(same, b, None, s, s, device=str(ids.device))
        y = flex_attention(q, k, v, block_mask=mask)
        return self.head(x + y.transpose(1, 2).reshape(b, s, SIZE))


# --- where queries, keys and values come from ------------------------------------------------------------------------


class Joined(Model):
    """One product for queries, keys and values, and the ways to take it apart."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.qkv, self.out, self.how = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE), how

    def mix(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.split(x, b, s)
        mask = None
        if self.how == "expanded":
            mask = torch.ones(s, s, dtype=torch.bool).tril().expand(b, 1, s, s)
        y = sdpa(q, k, v, mask, is_causal=mask is None).transpose(1, 2).reshape(b, s, SIZE)
        if self.how == "addmm":
            return torch.addmm(self.out.bias, y.view(-1, SIZE), self.out.weight.t()).view(b, s, SIZE)
        return self.out(y)

    def split(self, x: Tensor, b: int, s: int) -> tuple[Tensor, ...]:
        size = SIZE // HEADS
        if self.how == "addmm":  # a convolution of width one, as GPT-2 has it
            y = torch.addmm(self.qkv.bias, x.view(-1, SIZE), self.qkv.weight.t()).view(b, s, 3 * SIZE)
            return tuple(part.view(b, s, HEADS, size).permute(0, 2, 1, 3) for part in y.split(SIZE, dim=2))
        y = self.qkv(x)
        if self.how == "by_head":  # the three stand beside each other in every head
            return y.view(b, s, HEADS, 3 * size).transpose(1, 2).chunk(3, dim=-1)
        if self.how == "interleaved":
            y = y.view(b, s, HEADS, size, 3)
            return tuple(y[..., k].transpose(1, 2) for k in range(3))
        if self.how == "unbind":
            return y.reshape(b, s, 3, HEADS, size).permute(2, 0, 3, 1, 4).unbind(0)
        return tuple(einops.rearrange(y, "b s (three h d) -> three b h s d", three=3, h=HEADS))


class Complex(Model):
    """Rotary positions as a product of complex numbers."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(SIZE, 3 * SIZE)
        angles = torch.outer(torch.arange(MAX_ROWS), 100.0 ** -(torch.arange(0, SIZE // HEADS, 2) / (SIZE // HEADS)))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: x.shape[1], None]).flatten(3).type_as(x)

    def mix(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, -1).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (self.turned(q), self.turned(k), v))
        return sdpa(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, SIZE)


# --- scores ----------------------------------------------------------------------------------------------------------


class Scores(Model):
    """Numbers that are learned, and products in higher precision."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.qkv, self.how = nn.Linear(SIZE, 3 * SIZE), how
        self.one, self.each = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor([[[0.5]], [[0.3]]]))

    def mix(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.how == "upcast":
            scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * 0.4
        else:
            scores = q @ k.transpose(-1, -2) * (self.one if self.how == "temperature" else self.each)
        index = torch.arange(s)
        weights = scores.masked_fill(index[:, None] < index, NEG_INF).softmax(-1).to(v.dtype)
        return (weights @ v).transpose(1, 2).reshape(b, s, SIZE)


class Padded(Model):
    """`model(ids, keep)`: rows that see no key are NaN, or zero where what is hidden is set to zero again."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.qkv, self.how = nn.Linear(SIZE, 3 * SIZE), how

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        (b, s), x = ids.shape, self.embed(ids)
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        index = torch.arange(s)
        causal = index <= index[:, None]
        y = self.attend(q @ k.mT * 0.3, v, causal & keep[:, None, None, :].bool(), causal)
        return self.head(y.transpose(1, 2).reshape(b, s, SIZE))

    def attend(self, scores: Tensor, v: Tensor, seen: Tensor, causal: Tensor) -> Tensor:
        weights = torch.exp(scores) * seen
        if self.how == "last":
            return (weights @ v) / weights.sum(-1, keepdim=True)
        if self.how == "first":
            return (weights / weights.sum(-1, keepdim=True)) @ v
        weights = scores.masked_fill(~seen, NEG_INF).softmax(-1)
        hidden = causal if self.how == "weaker" else seen
        return (weights * seen if self.how == "product" else weights.masked_fill(~hidden, 0.0)) @ v


class Blocks(Model):
    """Blocks of queries in a Python loop; `outside`: a block mask that was made before the call."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.qkv, self.how = nn.Linear(SIZE, 3 * SIZE), how
        self.made: Any = None

    def mix(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.how == "outside":
            return flex_attention(q, k, v, block_mask=self.made).transpose(1, 2).reshape(b, s, SIZE)
        index = torch.arange(s)
        outs = []
        for block, row in zip(self.cut(q), self.cut(index[None, None, :, None]), strict=True):
            outs.append((block @ k.mT).masked_fill(index > row, NEG_INF).softmax(-1) @ v)
        return torch.cat(outs, 2).transpose(1, 2).reshape(b, s, SIZE)

    def cut(self, x: Tensor) -> list[Tensor]:
        """Rows `[.., S, D]` in blocks."""
        rows = x.shape[2]
        if self.how == "chunk":
            return list(x.chunk(2, 2))
        if self.how == "split":
            return list(x.split(16, 2))
        if self.how == "range":
            return [x[:, :, at : at + 4] for at in range(0, rows, 4)]
        found, at = [], 0
        while at < rows:
            found.append(x[:, :, at : at + 16])
            at += 16
        return found


def causal_block_mask(rows: int) -> Any:
    return create_block_mask(lambda b, h, i, j: j <= i, None, None, rows, rows, device="cpu")


@dataclass(frozen=True)
class Module:
    """A model, how many attentions it has, and its type."""

    make: Callable[[], Model]
    attentions: int = 1
    dtype: torch.dtype = torch.float32
    memory: bool = False

    def build(self) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.make().eval().to(self.dtype)


MODULES: dict[str, Module] = {
    "multihead_bool": Module(lambda: Multihead("bool")),
    "multihead_float": Module(lambda: Multihead("float", batch_first=False)),
    "multihead_is_causal": Module(lambda: Multihead("built", hint=True)),
    "multihead_weights": Module(lambda: Multihead("bool", weights=True)),
    "multihead_weights_rows_first": Module(lambda: Multihead("built", weights=True, hint=True, batch_first=False)),
    "encoder": Module(lambda: Encoder("bool"), 2),
    "encoder_norm_first": Module(lambda: Encoder("float", hint=True, norm_first=True, activation="gelu"), 2),
    "encoder_by_its_mask": Module(lambda: Encoder("bool", hint=None), 2),
    "encoder_rows_first": Module(lambda: Encoder("built", hint=True, batch_first=False, bias=False), 2),
    "encoder_layer": Module(lambda: EncoderLayer("built")),
    "encoder_layer_norm_first": Module(lambda: EncoderLayer("bool", norm_first=True, activation="gelu")),
    "decoder": Module(lambda: Decoder("built"), 4, memory=True),
    "decoder_by_its_mask": Module(lambda: Decoder("built", hint=None), 4, memory=True),
    "decoder_norm_first": Module(lambda: Decoder("bool", norm_first=True), 4, memory=True),
    "flex_score": Module(lambda: Flex("score")),
    "flex_block_mask": Module(lambda: Flex("window", kv_heads=1)),
    "flex_documents": Module(Documents),
    "joined_addmm": Module(lambda: Joined("addmm")),
    "joined_by_head": Module(lambda: Joined("by_head")),
    "joined_interleaved": Module(lambda: Joined("interleaved")),
    "joined_unbind": Module(lambda: Joined("unbind")),
    "joined_einops": Module(lambda: Joined("einops")),
    "mask_for_each_text": Module(lambda: Joined("expanded")),
    "rotary_complex": Module(Complex),
    "temperature": Module(lambda: Scores("temperature")),
    "temperature_of_heads": Module(lambda: Scores("each")),
    "blocks_by_chunk": Module(lambda: Blocks("chunk")),
    "blocks_by_split": Module(lambda: Blocks("split"), 2),  # two graphs: one block, two blocks
    "blocks_until_the_end": Module(lambda: Blocks("while"), 2),
    "upcast": Module(lambda: Scores("upcast"), dtype=torch.bfloat16),
}

PADDED: dict[str, bool] = {"first": True, "last": True, "filled": True, "product": True, "weaker": False}
"""Ways of `Padded`, and whether it is lowered."""

REFUSED: dict[str, tuple[Callable[[], Model], str]] = {
    "blocks_in_a_loop": (lambda: Blocks("range"), "KV101"),
    "block_mask_from_outside": (lambda: Blocks("outside"), "KV101"),
}
"""Models that run as they are written, and the code of the reason."""
