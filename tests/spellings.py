"""One attention, written in the many ways that people write it.

Every function takes `q[B, H, S, D]`, `k[B, K, S, D]`, `v[B, K, S, E]`, `allowed` (bool, `[S, S]`, true where query `i`
may see key `j`) and a scale, and returns `[B, H, S, E]`. All of them give the same answer; a compiler that sees
a KV cache in one of them has to see it in all.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.functional import softmax

Spelling = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

NEG_INF = float("-inf")


def repeat_kv(x: Tensor, group: int) -> Tensor:
    """`[B, K, S, D]` to `[B, K * group, S, D]`, the way transformers does it."""
    if group == 1:
        return x
    b, k, s, d = x.shape
    return x[:, :, None].expand(b, k, group, s, d).reshape(b, k * group, s, d)


def _repeat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    return repeat_kv(k, group), repeat_kv(v, group)


# --- scaled_dot_product_attention ---------------------------------------------------------------------------------


def sdpa_bool_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    return sdpa(q, k, v, attn_mask=allowed, scale=scale)


def sdpa_float_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, NEG_INF)
    return sdpa(q, k, v, attn_mask=mask, dropout_p=0.0, scale=scale)


def sdpa_is_causal(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    return sdpa(q, k, v, is_causal=True, scale=scale)


def sdpa_enable_gqa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    return sdpa(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True)


def sdpa_default_scale(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    return sdpa(q * (scale * math.sqrt(q.shape[-1])), k, v, attn_mask=allowed)


# --- a mask that fills --------------------------------------------------------------------------------------------


def masked_fill_inf(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = (q @ k.transpose(-2, -1)) * scale
    return softmax(scores.masked_fill(~allowed, NEG_INF), dim=-1) @ v


def masked_fill_finfo(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    scores = scores.masked_fill(allowed.logical_not(), torch.finfo(scores.dtype).min)
    return torch.matmul(softmax(scores, dim=-1), v)


def masked_fill_in_place(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = (q @ k.mT).mul_(scale)
    scores.masked_fill_(~allowed, NEG_INF)
    return scores.softmax(-1) @ v


def where_inf(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = q.matmul(k.transpose(-1, -2)) / (1.0 / scale)
    return torch.where(allowed, scores, NEG_INF).softmax(dim=-1).matmul(v)


def where_tensor_fill(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = q @ k.transpose(-1, -2) * scale
    fill = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    return torch.where(allowed, scores, fill).softmax(dim=-1) @ v


# --- a mask that is added -----------------------------------------------------------------------------------------


def additive_inf(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, NEG_INF)
    return softmax(q @ k.transpose(-2, -1) * scale + mask, dim=-1) @ v


def additive_1e9(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = q @ k.transpose(-2, -1) * scale
    scores = scores + (1.0 - allowed.to(q.dtype)) * -1e9
    return softmax(scores, dim=-1) @ v


def additive_commuted(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    mask = torch.where(allowed, 0.0, NEG_INF).to(q.dtype)
    return softmax(mask + scale * (q @ k.transpose(-2, -1)), dim=-1) @ v


def baddbmm_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    b, h, s, d = q.shape
    k, v = _repeat(q, k, v)
    mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, NEG_INF).expand(b * h, s, s)
    scores = torch.baddbmm(mask, q.reshape(b * h, s, d), k.reshape(b * h, s, d).transpose(1, 2), beta=1, alpha=scale)
    return torch.bmm(scores.softmax(-1), v.reshape(b * h, s, -1)).view(b, h, s, -1)


# --- the contraction ----------------------------------------------------------------------------------------------


def bmm_merged(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    b, h, s, d = q.shape
    k, v = _repeat(q, k, v)
    scores = torch.bmm(q.reshape(b * h, s, d), k.reshape(b * h, s, d).transpose(1, 2)) * scale
    weights = softmax(scores.masked_fill(~allowed, NEG_INF), dim=2)
    return torch.bmm(weights, v.reshape(b * h, s, -1)).view(b, h, s, -1)


def einsum_bhij(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    weights = softmax(scores.masked_fill(~allowed, NEG_INF), dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def einsum_rows_first(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    weights = torch.where(allowed, scores, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def einsum_keys_first(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Scores stand as `[B, H, key, query]`, so the softmax runs over the axis before the last."""
    k, v = _repeat(q, k, v)
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


def repeat_interleave(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), torch.repeat_interleave(v, group, 1)
    return sdpa(q, k, v, attn_mask=allowed[None, None], scale=scale)


# --- the scale ----------------------------------------------------------------------------------------------------


def scale_before(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = (q * scale) @ k.transpose(-2, -1)
    return softmax(scores.masked_fill(~allowed, NEG_INF), dim=-1) @ v


def scale_split(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    root = math.sqrt(scale)
    scores = (q * root) @ (k * root).transpose(-2, -1)
    return softmax(scores.masked_fill(~allowed, NEG_INF), dim=-1) @ v


def scale_after_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = (q @ k.transpose(-2, -1)).masked_fill(~allowed, NEG_INF)
    return softmax(scores * scale, dim=-1) @ v


# --- the normaliser -----------------------------------------------------------------------------------------------


def softmax_fp32(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~allowed, NEG_INF)
    return softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~allowed, NEG_INF)
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


def log_softmax_exp(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~allowed, NEG_INF)
    return torch.log_softmax(scores, dim=-1).exp() @ v


def logsumexp_by_hand(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    scores = torch.where(allowed, q @ k.transpose(-2, -1) * scale, NEG_INF)
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


def triangle_times_exp(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = _repeat(q, k, v)
    weights = torch.exp(q @ k.transpose(-2, -1) * scale) * allowed.to(q.dtype)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def normalise_last(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Divides after the product with the values, as flash attention does."""
    k, v = _repeat(q, k, v)
    weights = torch.exp(q @ k.transpose(-2, -1) * scale).masked_fill(~allowed, 0.0)
    return (weights @ v) / weights.sum(-1, keepdim=True)


SPELLINGS: dict[str, Spelling] = {
    f.__name__: f
    for f in (
        sdpa_bool_mask,
        sdpa_float_mask,
        sdpa_is_causal,
        sdpa_enable_gqa,
        sdpa_default_scale,
        masked_fill_inf,
        masked_fill_finfo,
        masked_fill_in_place,
        where_inf,
        where_tensor_fill,
        additive_inf,
        additive_1e9,
        additive_commuted,
        baddbmm_mask,
        bmm_merged,
        einsum_bhij,
        einsum_rows_first,
        einsum_keys_first,
        grouped_matmul,
        grouped_einsum,
        head_loop,
        repeat_interleave,
        scale_before,
        scale_split,
        scale_after_mask,
        softmax_fp32,
        softmax_by_hand,
        log_softmax_exp,
        logsumexp_by_hand,
        triangle_times_exp,
        normalise_last,
    )
}

CAUSAL_ONLY = frozenset({"sdpa_is_causal"})
"""Spellings that do not look at `allowed`."""

PADDABLE = frozenset({"sdpa_bool_mask", "sdpa_enable_gqa", "masked_fill_finfo", "where_tensor_fill", "additive_1e9"})
"""Spellings that take `allowed` as `[B, 1, S, S]`, and whose answer is finite where a row has no key left."""
