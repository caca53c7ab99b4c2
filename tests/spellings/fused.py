"""`scaled_dot_product_attention` in all its forms."""

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tests.spellings.base import NEG_INF, repeat


def sdpa_bool_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    return sdpa(q, k, v, attn_mask=allowed, scale=scale)


def sdpa_float_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, NEG_INF)
    return sdpa(q, k, v, attn_mask=mask, dropout_p=0.0, scale=scale)


def sdpa_is_causal(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    return sdpa(q, k, v, is_causal=True, scale=scale)


def sdpa_enable_gqa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    return sdpa(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True)


def sdpa_default_scale(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    return sdpa(q * (scale * math.sqrt(q.shape[-1])), k, v, attn_mask=allowed)


def sdpa_mask_per_head(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    b, h, s, _ = q.shape
    return sdpa(q, k, v, attn_mask=allowed.expand(b, h, s, s), scale=scale)


def sdpa_float_mask_per_batch(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, NEG_INF)
    return sdpa(q, k, v, mask[None, None].expand(q.shape[0], 1, -1, -1), 0.0, False, scale=scale)


def sdpa_finfo_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    mask = (1.0 - allowed.to(q.dtype)) * torch.finfo(q.dtype).min
    return sdpa(query=q, key=k, value=v, attn_mask=mask, scale=scale)


def sdpa_three_axes(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    q3, k3, v3 = (x.flatten(0, 1) for x in (q, k, v))
    return sdpa(q3, k3, v3, attn_mask=allowed, scale=scale).unflatten(0, q.shape[:2])


def sdpa_five_axes(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """`[B, K, group, S, D]`, the keys broadcast over their group."""
    b, h, s, d = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(b, kv_heads, h // kv_heads, s, d)
    k, v = (x.unsqueeze(2).expand(-1, -1, h // kv_heads, -1, -1) for x in (k, v))
    return sdpa(q, k, v, attn_mask=allowed, scale=scale).reshape(b, h, s, -1)


def sdpa_gqa_is_causal(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def sdpa_rows_first(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """`[B, S, H, D]` in and out, as libraries of fused attention have it."""
    k, v = repeat(q, k, v)
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    out = sdpa(*(x.permute(0, 2, 1, 3) for x in rows), attn_mask=allowed, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def sdpa_scaled_query(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    return sdpa(q * scale, k, v, attn_mask=allowed, scale=1.0)


def sdpa_head_by_head(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    heads = zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)
    return torch.stack([sdpa(*head, attn_mask=allowed, scale=scale) for head in heads], dim=1)
