"""Where a row stands in the text, as learned tables, sinusoids, rotations or a bias on the scores."""

import torch
from torch import Tensor

from tests.models.config import MAX_ROWS


def frequencies(size: int) -> Tensor:
    return 1.0 / (100.0 ** (torch.arange(0, size, 2).float() / size))


def sinusoids(position: Tensor, size: int) -> Tensor:
    """`[S]` or `[B, S]` positions to `[.., S, size]`."""
    angle = position.unsqueeze(-1).float() * frequencies(size + size % 2).to(position.device)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)[..., :size]


def sinusoid_table(size: int) -> Tensor:
    return sinusoids(torch.arange(MAX_ROWS), size)


def rotary_half(x: Tensor, position: Tensor, inverse: Tensor) -> Tensor:
    """`x[B, H, S, D]` turned by halves (Llama). `position` is `[S]` or `[B, S]`."""
    angle = position[..., None].float() * inverse
    angle = torch.cat((angle, angle), dim=-1)
    if angle.dim() == 3:
        angle = angle.unsqueeze(1)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)


def rotary_interleaved(x: Tensor, position: Tensor, inverse: Tensor) -> Tensor:
    """`x[B, H, S, D]` turned by neighbouring pairs (GPT-J)."""
    angle = torch.einsum("...s,f->...sf", position.float(), inverse)
    if angle.dim() == 3:
        angle = angle.unsqueeze(1)
    sin, cos = angle.sin().to(x.dtype), angle.cos().to(x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def alibi(slopes: Tensor, rows: int) -> Tensor:
    """`[H, S, S]`, `slope * (j - i)`: it does not depend on the length of the text."""
    index = torch.arange(rows, device=slopes.device)
    return slopes.view(-1, 1, 1) * (index[None, :] - index[:, None])
