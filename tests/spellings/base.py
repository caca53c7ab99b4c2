"""What the spellings share."""

from collections.abc import Callable

from torch import Tensor

Spelling = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

NEG_INF = float("-inf")


def repeat_kv(x: Tensor, group: int) -> Tensor:
    """`[B, K, S, D]` to `[B, K * group, S, D]`, the way transformers does it."""
    if group == 1:
        return x
    b, k, s, d = x.shape
    return x[:, :, None].expand(b, k, group, s, d).reshape(b, k * group, s, d)


def repeat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with a head for each head of the queries."""
    group = q.shape[1] // k.shape[1]
    return repeat_kv(k, group), repeat_kv(v, group)


def scores_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`[B, H, S, S]`."""
    return (q @ k.transpose(-2, -1)) * scale
