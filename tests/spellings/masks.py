"""A mask that fills, and one that is added."""

import torch
from torch import Tensor
from torch.nn.functional import softmax

from tests.spellings.base import NEG_INF, repeat, scores_of


def masked_fill_inf(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = (q @ k.transpose(-2, -1)) * scale
    return softmax(scores.masked_fill(~allowed, NEG_INF), dim=-1) @ v


def masked_fill_finfo(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    scores = scores.masked_fill(allowed.logical_not(), torch.finfo(scores.dtype).min)
    return torch.matmul(softmax(scores, dim=-1), v)


def masked_fill_in_place(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = (q @ k.mT).mul_(scale)
    scores.masked_fill_(~allowed, NEG_INF)
    return scores.softmax(-1) @ v


def where_inf(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = q.matmul(k.transpose(-1, -2)) / (1.0 / scale)
    return torch.where(allowed, scores, NEG_INF).softmax(dim=-1).matmul(v)


def where_tensor_fill(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = q @ k.transpose(-1, -2) * scale
    fill = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    return torch.where(allowed, scores, fill).softmax(dim=-1) @ v


def additive_inf(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, NEG_INF)
    return softmax(q @ k.transpose(-2, -1) * scale + mask, dim=-1) @ v


def additive_1e9(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    scores = q @ k.transpose(-2, -1) * scale
    scores = scores + (1.0 - allowed.to(q.dtype)) * -1e9
    return softmax(scores, dim=-1) @ v


def additive_commuted(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    mask = torch.where(allowed, 0.0, NEG_INF).to(q.dtype)
    return softmax(mask + scale * (q @ k.transpose(-2, -1)), dim=-1) @ v


def baddbmm_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    b, h, s, d = q.shape
    k, v = repeat(q, k, v)
    mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, NEG_INF).expand(b * h, s, s)
    scores = torch.baddbmm(mask, q.reshape(b * h, s, d), k.reshape(b * h, s, d).transpose(1, 2), beta=1, alpha=scale)
    return torch.bmm(scores.softmax(-1), v.reshape(b * h, s, -1)).view(b, h, s, -1)


def masked_fill_1e4(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    return softmax(scores_of(q, k, scale).masked_fill(allowed == 0, -1e4), dim=-1) @ v


def where_chain(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """One condition after the other; the first one is implied by the second."""
    k, v = repeat(q, k, v)
    index = torch.arange(q.shape[2], device=q.device)
    scores = torch.where(index[:, None] >= index, scores_of(q, k, scale), NEG_INF)
    scores = torch.where(allowed, scores, torch.full_like(scores, NEG_INF))
    return torch.matmul(torch.softmax(scores, -1), v)


def where_reversed(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    return torch.where(~allowed, -1e9, scores_of(q, k, scale)).softmax(-1) @ v


def where_number_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    ones = allowed.to(q.dtype)
    return torch.where(ones > 0.5, scores_of(q, k, scale), torch.tensor(NEG_INF)).softmax(-1) @ v


def mask_by_index(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """`mask[hidden] = -inf`."""
    k, v = repeat(q, k, v)
    mask = torch.zeros_like(allowed, dtype=q.dtype)
    mask[~allowed] = NEG_INF
    return softmax(scores_of(q, k, scale) + mask, dim=-1) @ v


def mask_by_vmap(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """A function of two numbers, mapped over both axes."""
    k, v = repeat(q, k, v)
    rows = torch.arange(allowed.shape[0])

    def kept(i: Tensor, j: Tensor) -> Tensor:
        return i.new_ones((), dtype=torch.bool) & allowed[i, j]

    mask = torch.vmap(torch.vmap(kept, in_dims=(None, 0)), in_dims=(0, None))(rows, rows)
    return softmax(scores_of(q, k, scale).masked_fill(~mask, NEG_INF), dim=-1) @ v


def mask_written_in_place(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    mask = torch.empty_like(allowed, dtype=q.dtype)
    mask.fill_(1.0).copy_(allowed).sub_(1.0).mul_(1e9)
    scores = scores_of(q, k, scale)
    scores += mask
    return scores.softmax(-1) @ v


def scores_by_index(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """`scores[..., hidden] = -inf`."""
    k, v = repeat(q, k, v)
    scores = scores_of(q, k, scale)
    scores[:, :, ~allowed] = NEG_INF
    return scores.softmax(-1) @ v


def additive_finfo(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    inverted = 1.0 - allowed[None, None].to(q.dtype)
    mask = inverted.masked_fill(inverted.bool(), torch.finfo(q.dtype).min)
    return softmax(scores_of(q, k, scale) + mask, dim=-1) @ v


def additive_floor(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Nothing below the smallest number, so that two masks do not add up to -inf."""
    k, v = repeat(q, k, v)
    lowest = torch.finfo(q.dtype).min
    scores = scores_of(q, k, scale) + torch.where(allowed, 0.0, lowest).to(q.dtype)
    return torch.max(scores, torch.tensor(lowest)).softmax(-1) @ v


def additive_log(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """The logarithm of a mask of ones and zeros."""
    k, v = repeat(q, k, v)
    return softmax(scores_of(q, k, scale) + allowed.to(q.dtype).log(), dim=-1) @ v


def multiplied_and_added(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """`s * m - 1e4 * (1 - m)`."""
    k, v = repeat(q, k, v)
    mask = allowed.to(q.dtype)
    return softmax(scores_of(q, k, scale) * mask - 1e4 * (1 - mask), dim=-1) @ v


def zeroed_again(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Weights that are zero are set to zero."""
    k, v = repeat(q, k, v)
    weights = softmax(scores_of(q, k, scale).masked_fill(~allowed, torch.finfo(q.dtype).min), dim=-1)
    return weights.masked_fill(~allowed, 0.0) @ v


def multiplied_again(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    k, v = repeat(q, k, v)
    weights = softmax(torch.where(allowed, scores_of(q, k, scale), -1e9), dim=-1)
    return (weights * allowed) @ v
