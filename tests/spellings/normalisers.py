"""The normaliser."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, softmax

from tests.spellings.base import NEG_INF, repeat, scores_of


def softmax_fp32(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~allowed, NEG_INF)
    return softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~allowed, NEG_INF)
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


def log_softmax_exp(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~allowed, NEG_INF)
    return torch.log_softmax(scores, dim=-1).exp() @ v


def logsumexp_by_hand(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = torch.where(allowed, q @ k.transpose(-2, -1) * scale, NEG_INF)
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


def triangle_times_exp(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    weights = torch.exp(q @ k.transpose(-2, -1) * scale) * allowed.to(q.dtype)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def normalise_last(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Divides after the product with the values, as flash attention does."""
    k, v = repeat(q, k, v)
    weights = torch.exp(q @ k.transpose(-2, -1) * scale).masked_fill(~allowed, 0.0)
    return (weights @ v) / weights.sum(-1, keepdim=True)


def softmax_shifted(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """The largest score is taken off, which a softmax does by itself."""
    k, v = repeat(q, k, v)
    scores = scores_of(q, k, scale).masked_fill(~allowed, NEG_INF)
    return softmax(scores - scores.amax(-1, keepdim=True).detach(), dim=-1) @ v


def softmax_of_columns(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = scores_of(q, k, scale).masked_fill(~allowed, NEG_INF)
    return torch.softmax(scores.transpose(-2, -1), dim=2).transpose(2, 3) @ v


def dropout_off(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    weights = nn.Softmax(dim=-1)(scores_of(q, k, scale).masked_fill(~allowed, NEG_INF))
    return nn.Dropout(0.1).eval()(dropout(weights, 0.5, training=False)) @ v


def exp_without_maximum(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """`exp` computed twice, and -inf before it."""
    k, v = repeat(q, k, v)
    scores = scores_of(q, k, scale).masked_fill(~allowed, NEG_INF)
    return (torch.exp(scores) / torch.exp(scores).sum(-1)[..., None]) @ v


def exp2_log2e(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = scores_of(q, k, scale * 1.4426950408889634).masked_fill(~allowed, NEG_INF)
    weights = torch.exp2(scores - scores.max(dim=-1)[0].unsqueeze(-1))
    return (weights / weights.sum(dim=-1).unsqueeze(-1)) @ v


def power_of_e(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    weights = allowed * math.e ** scores_of(q, k, scale)
    return (weights / weights.sum(-1, True)) @ v


def reciprocal_of_sum(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    weights = torch.where(allowed, scores_of(q, k, scale).exp(), 0.0)
    return (1.0 / weights.sum(-1, keepdim=True) * weights) @ v


def triangle_of_exp(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    weights = torch.tril(torch.exp(scores_of(q, k, scale)))
    return weights / weights.sum(-1, keepdim=True) @ v


def log_space(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = scores_of(q, k, scale).masked_fill(~allowed, NEG_INF)
    scores = scores - scores.amax(dim=-1, keepdim=True)
    return (scores - scores.exp().sum(-1, keepdim=True).log()).exp() @ v


def logsumexp_unsqueezed(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = scores_of(q, k, scale) + torch.where(allowed, 0.0, NEG_INF).to(q.dtype)
    return torch.exp(scores - scores.logsumexp(-1).unsqueeze(-1)) @ v


def exp_in_fp32(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = scores_of(q, k, scale).masked_fill(~allowed, torch.finfo(q.dtype).min).float()
    weights = (scores - scores.max(-1, keepdim=True)[0]).exp()
    return (weights / weights.sum(-1, keepdim=True)).type_as(q) @ v


def normalise_last_einsum(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Rows first, and the sum is transposed to stand beside them."""
    k, v = repeat(q, k, v)
    scores = scores_of(q, k, scale).masked_fill(~allowed, NEG_INF)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = torch.einsum("bhij,bhjd->bihd", weights, v)
    return (out / weights.sum(-1).transpose(1, 2).unsqueeze(-1)).transpose(1, 2)


def normalise_last_rows(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """The product is moved before it is divided, by the reciprocal."""
    k, v = repeat(q, k, v)
    weights = torch.exp(scores_of(q, k, scale)) * allowed
    total = weights.sum(-1, keepdim=True).transpose(1, 2)
    return ((weights @ v).transpose(1, 2) * total.reciprocal()).transpose(1, 2)
