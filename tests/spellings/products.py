"""The contractions, the heads and the scale."""

import math

import einops
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.functional import softmax

from tests.spellings.base import NEG_INF, repeat


def bmm_merged(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    b, h, s, d = q.shape
    k, v = repeat(q, k, v)
    scores = torch.bmm(q.reshape(b * h, s, d), k.reshape(b * h, s, d).transpose(1, 2)) * scale
    weights = softmax(scores.masked_fill(~allowed, NEG_INF), dim=2)
    return torch.bmm(weights, v.reshape(b * h, s, -1)).view(b, h, s, -1)


def einsum_bhij(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    weights = softmax(scores.masked_fill(~allowed, NEG_INF), dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def einsum_rows_first(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    weights = torch.where(allowed, scores, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def einsum_keys_first(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Scores stand as `[B, H, key, query]`, so the softmax runs over the axis before the last."""
    k, v = repeat(q, k, v)
    scores = torch.einsum("bhjd,bhid->bhji", k, q) * scale
    weights = softmax(scores.masked_fill(~allowed.t(), NEG_INF), dim=-2)
    return torch.einsum("bhji,bhjd->bhid", weights, v)


def grouped_matmul(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """No key is repeated: `[B, K, group, S, D]` against `[B, K, 1, D, S]`."""
    b, h, s, d = q.shape
    q = q.reshape(b, k.shape[1], h // k.shape[1], s, d)
    scores = q @ k.unsqueeze(2).transpose(-2, -1) * scale
    weights = softmax(scores.masked_fill(~allowed, NEG_INF), dim=-1)
    return (weights @ v.unsqueeze(2)).reshape(b, h, s, -1)


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    b, h, s, d = q.shape
    q = q.reshape(b, k.shape[1], h // k.shape[1], s, d)
    scores = torch.einsum("bkgsd,bktd->bkgst", q, k) * scale
    weights = softmax(torch.where(allowed, scores, NEG_INF), dim=-1)
    return torch.einsum("bkgst,bktd->bkgsd", weights, v).reshape(b, h, s, -1)


def head_loop(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].transpose(1, 2) * scale
        weights = softmax(scores.masked_fill(~allowed, NEG_INF), dim=-1)
        heads.append(weights @ v[:, head // group])
    return torch.stack(heads, dim=1)


def vmap_heads(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """One head of one sequence, mapped over both."""
    k, v = repeat(q, k, v)

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax((q @ k.T * scale).masked_fill(~allowed, NEG_INF), dim=-1) @ v

    return torch.vmap(torch.vmap(one))(q, k, v)


def repeat_interleave(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), torch.repeat_interleave(v, group, 1)
    return sdpa(q, k, v, attn_mask=allowed[None, None], scale=scale)


def scale_before(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = (q * scale) @ k.transpose(-2, -1)
    return softmax(scores.masked_fill(~allowed, NEG_INF), dim=-1) @ v


def scale_split(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    root = math.sqrt(scale)
    scores = (q * root) @ (k * root).transpose(-2, -1)
    return softmax(scores.masked_fill(~allowed, NEG_INF), dim=-1) @ v


def scale_after_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = (q @ k.transpose(-2, -1)).masked_fill(~allowed, NEG_INF)
    return softmax(scores * scale, dim=-1) @ v


def einsum_ellipsis(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = torch.einsum("... i d, ... j d -> ... i j", q, k) * scale
    return torch.einsum("...ij,...jd->...id", scores.masked_fill(~allowed, NEG_INF).softmax(-1), v)


def einsum_heads_last(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Scores stand as `[B, query, key, H]`."""
    k, v = repeat(q, k, v)
    scores = torch.einsum("bhid,bhjd->bijh", q, k) * scale
    weights = scores.masked_fill(~allowed[..., None], NEG_INF).softmax(2)
    return torch.einsum("bijh,bhjd->bhid", weights, v)


def einsum_heads_first(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """`[H, B, ..]`, and the values come before the weights."""
    k, v = repeat(q, k, v)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores = torch.einsum("hnid,hnjd->hnij", q, k) * scale
    weights = scores.masked_fill(~allowed, NEG_INF).softmax(-1)
    return torch.einsum("hnjd,hnij->nhid", v, weights)


def einsum_columns(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Rows are columns: `[B, H, D, S]`."""
    k, v = repeat(q, k, v)
    q, k, v = (x.mT for x in (q, k, v))
    weights = (torch.einsum("bhdi,bhdj->bhij", q, k) * scale).masked_fill(~allowed, NEG_INF).softmax(-1)
    return torch.einsum("bhij,bhdj->bhdi", weights, v).mT


def values_first(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Everything transposed: `k q^T`, normalised down the columns, and `v^T w`."""
    k, v = repeat(q, k, v)
    scores = (k @ q.mT * scale).masked_fill(~allowed.mT, NEG_INF)
    return (v.mT @ scores.softmax(-2)).mT


def baddbmm_unread(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """`beta=0`: an uninitialised bias that is not read."""
    b, h, s, d = q.shape
    k, v = repeat(q, k, v)
    empty = torch.empty(b * h, s, s, dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q.reshape(b * h, s, d), k.reshape(b * h, s, d).mT, beta=0.0, alpha=scale)
    weights = scores.view(b, h, s, s).masked_fill(~allowed, NEG_INF).softmax(-1)
    return torch.bmm(weights.view(b * h, s, s), v.reshape(b * h, s, -1)).view(b, h, s, -1)


def grouped_heads_outside(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """`[B, group, K, S, D]` against `[B, 1, K, S, D]`."""
    b, h, s, d = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(b, kv_heads, h // kv_heads, s, d).transpose(1, 2)
    scores = q @ k.unsqueeze(1).mT * scale
    out = scores.masked_fill(~allowed, NEG_INF).softmax(-1) @ v.unsqueeze(1)
    return out.transpose(1, 2).reshape(b, h, s, -1)


def grouped_rows(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """The queries of a group are more rows against the same keys."""
    b, h, s, d = q.shape
    kv_heads, group = k.shape[1], h // k.shape[1]
    scores = q.reshape(b, kv_heads, group * s, d) @ k.mT * scale
    weights = scores.view(b, kv_heads, group, s, s).masked_fill(~allowed, NEG_INF).softmax(-1)
    return (weights.view(b, kv_heads, group * s, s) @ v).reshape(b, h, s, -1)


def head_loop_joined(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Heads by `chunk`, joined along the features and taken apart again."""
    k, v = repeat(q, k, v)
    heads = zip(*(x.chunk(q.shape[1], dim=1) for x in (q, k, v)), strict=True)
    outs = [(a @ b.mT * scale).masked_fill(~allowed, NEG_INF).softmax(-1) @ c for a, b, c in heads]
    return torch.cat(outs, dim=-1).squeeze(1).unflatten(-1, (q.shape[1], -1)).transpose(1, 2)


def einops_merged(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = (einops.repeat(x, "b k s d -> b (k g) s d", g=q.shape[1] // k.shape[1]) for x in (k, v))
    a, b, c = (einops.rearrange(x, "b h s d -> (b h) s d") for x in (q, k, v))
    scores = einops.einsum(a, b, "n i d, n j d -> n i j") * scale
    weights = scores.masked_fill(~allowed, NEG_INF).softmax(-1)
    return einops.rearrange(einops.einsum(weights, c, "n i j, n j d -> n i d"), "(b h) s d -> b h s d", h=q.shape[1])


def einops_grouped(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    q = einops.rearrange(q, "b (k g) s d -> b g k s d", k=k.shape[1])
    scores = einops.einsum(q, k, "b g k i d, b k j d -> b g k i j") * scale
    weights = scores.masked_fill(~allowed, NEG_INF).softmax(-1)
    out = einops.einsum(weights, v, "b g k i j, b k j d -> b g k i d")
    return einops.rearrange(out, "b g k s d -> b (k g) s d")


def scale_tensor(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """A square root of a tensor of no axes."""
    k, v = repeat(q, k, v)
    scores = q @ k.mT / torch.sqrt(torch.tensor(scale**-2, dtype=q.dtype))
    return scores.masked_fill(~allowed, NEG_INF).softmax(-1) @ v


def scale_in_place(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    q = q.clone().mul_(scale)
    return (q @ k.mT).masked_fill_(~allowed, NEG_INF).softmax(-1) @ v
