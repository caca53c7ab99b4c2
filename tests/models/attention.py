"""Attention whose scores carry a bias (ALiBi) or a soft cap, in several spellings."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

from tests.spellings import NEG_INF, repeat_kv

Scored = Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor | None, float | None], Tensor]


def _scores(q: Tensor, k: Tensor, scale: float, cap: float | None) -> Tensor:
    scores = q @ k.transpose(-2, -1) * scale
    return scores if cap is None else cap * torch.tanh(scores / cap)


def scored_masked_fill(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, bias: Tensor | None, cap: float | None
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    scores = _scores(q, repeat_kv(k, group), scale, cap)
    if bias is not None:
        scores = scores + bias
    return softmax(scores.masked_fill(~allowed, NEG_INF), dim=-1) @ repeat_kv(v, group)


def scored_where_finfo(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, bias: Tensor | None, cap: float | None
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    scores = _scores(q, k.repeat_interleave(group, 1), scale, cap)
    if bias is not None:
        scores = bias.unsqueeze(0) + scores
    weights = torch.where(allowed, scores, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v.repeat_interleave(group, 1))


def scored_mask_first(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, bias: Tensor | None, cap: float | None
) -> Tensor:
    """Bias and mask are one tensor, made before the scores; without a cap that tensor goes into SDPA."""
    group = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, group), repeat_kv(v, group)
    mask = torch.zeros_like(allowed, dtype=q.dtype) if bias is None else bias.to(q.dtype)
    mask = mask.masked_fill(~allowed, NEG_INF)
    if cap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return softmax(mask + _scores(q, k, scale, cap), dim=-1) @ v


SCORED: dict[str, Scored] = {f.__name__: f for f in (scored_masked_fill, scored_where_finfo, scored_mask_first)}

SCORED_PADDABLE = frozenset({"scored_where_finfo"})
