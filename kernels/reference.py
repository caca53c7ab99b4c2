"""The meaning of `kvpass.ir.Attention`, in plain PyTorch. Every generator of kernels is tested against this file.

Two steps: `visible` evaluates the support into a mask, once for all attentions of a step that share it, and `attention`
computes the products. Where the score is untouched between them, ATen's fused kernel does both.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.ir import SCORE, Attention, B, H, I, J
from kvpass.kernels.walk import DIVIDE, NEGATE, FloorDiv, Target, walk

_CAUSAL = sympy.Le(J, I)


def visible(
    support: sympy.Basic,
    device: torch.device,
    heads: int,
    start: int,
    rows: int,
    names: tuple[str, ...],
    loads: tuple[Tensor, ...],
    keys: int | None = None,
) -> Tensor | None:
    """Which keys each new row sees.

    Args:
        support: predicate over ``b h i j`` (`Attention.support`); ``i`` and ``j`` are rows, not offsets.
        start, rows: ``P`` and ``S``: the new rows are ``P .. S-1``.
        keys: how many there are; ``S`` by default.
        names, loads: the tensors that leaf functions of the support read.

    Returns:
        bool, broadcastable to ``[B, H, N, S]``, or None where every key is seen.
    """
    if support == sympy.true or (rows - start == 1 and support in (_CAUSAL, _CAUSAL_NORMAL)):
        return None
    grid = _grid(start, rows, rows if keys is None else keys, device, heads, loads)
    mask = evaluate(support, grid, dict(zip(names, loads, strict=True)))
    return mask if isinstance(mask, Tensor) else torch.full((1, 1, 1, 1), bool(mask), device=device)


_CAUSAL_NORMAL = sympy.Le(J - I, 0)


def _grid(
    start: int, rows: int, keys: int, device: torch.device, heads: int, loads: tuple[Tensor, ...]
) -> dict[sympy.Basic, Tensor]:
    batch = max((load.shape[0] for load in loads if load.dim()), default=1)
    return {
        B: torch.arange(batch, device=device).view(-1, 1, 1, 1),
        H: torch.arange(heads, device=device).view(1, -1, 1, 1),
        I: torch.arange(start, rows, device=device).view(1, 1, -1, 1),
        J: torch.arange(keys, device=device).view(1, 1, 1, -1),
    }


def attention(
    spec: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    start: int,
    names: tuple[str, ...],
    loads: tuple[Tensor, ...],
) -> Tensor:
    """Softmax attention of the new rows over all rows.

    Args:
        query: ``[B, H, N, D]``. key: ``[B, K, S, D]``. value: ``[B, K, S, Dv]``.
        mask: from `visible`.
        start: ``P``, the row of the first query.
        names, loads: what ``spec.score`` reads, each broadcastable to ``[B, H, N, S]``.

    Returns:
        ``[B, H, N, Dv]`` in ``spec.dtype``.
    """
    one_dtype = query.dtype == key.dtype == value.dtype
    if spec.score == SCORE and not spec.empty_is_nan and spec.sink is None and one_dtype:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=spec.scale, enable_gqa=spec.group > 1
        )
    new = query.shape[2]
    grouped = _unflatten(query, 1, (spec.kv_heads, spec.group)).flatten(2, 3)  # [B, K, G * N, D]
    if spec.softmax_dtype is not None:  # a score of half precision may have lost what the softmax needs
        wide = torch.promote_types(query.dtype, spec.softmax_dtype)
        grouped, key = grouped.to(wide), key.to(wide)
    scores = _unflatten(grouped @ key.mT, 2, (spec.group, new)).flatten(1, 2)  # [B, H, N, S]
    if spec.scale != 1.0:
        scores = scores * spec.scale
    if spec.score != SCORE:
        grid = _grid(start, start + new, key.shape[2], query.device, spec.heads, ()) | {
            B: torch.arange(query.shape[0], device=query.device).view(-1, 1, 1, 1),
            J: torch.arange(key.shape[2], device=query.device).view(1, 1, 1, -1),
        }
        # In float64, so that a function of indices is as exact as the rest.
        symbols: dict[sympy.Basic, Tensor] = {symbol: x.double() for symbol, x in grid.items()}
        leaves = {name: _Broadcast(load) for name, load in zip(names, loads, strict=True)}
        scores = evaluate(spec.score, symbols | {SCORE: scores}, leaves).to(scores.dtype)
    if spec.softmax_dtype is not None:
        scores = scores.to(spec.softmax_dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = _weights(spec, scores, dict(zip(names, loads, strict=True)))
    weights = _unflatten(weights.to(value.dtype), 1, (spec.kv_heads, spec.group)).flatten(2, 3)
    return _unflatten(weights @ value, 2, (spec.group, new)).flatten(1, 2).to(spec.dtype)


def _weights(spec: Attention, scores: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
    """Softmax over the keys, and over the sink."""
    if spec.sink is not None:
        sink = reads[spec.sink].reshape(1, -1, 1, 1).to(scores.dtype).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    weights = scores.softmax(-1)
    if spec.empty_is_nan:
        return weights
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    return weights.masked_fill(empty, 0.0) if bool(empty.any()) else weights


def _unflatten(x: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


class _Broadcast:
    """A read that already has the score's axes: its index arguments are implied."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def evaluate(expr: Any, symbols: Mapping[sympy.Basic, Any], leaves: Mapping[str, Any]) -> Any:
    """An expression over tensors: index symbols and reads are looked up, everything else is broadcast."""
    target: Target[Any] = _Torch(symbols, leaves)
    return walk(expr, target)


class _Torch:
    """Tensors, and Python numbers where nothing is a tensor yet."""

    def __init__(self, symbols: Mapping[sympy.Basic, Any], leaves: Mapping[str, Any]) -> None:
        self.symbols, self.leaves, self.ops = symbols, leaves, _TABLE

    def number(self, value: sympy.Basic) -> Any:
        if value in (sympy.true, sympy.false):
            return bool(value)
        return int(value) if value.is_Integer and abs(value) < 1 << 62 else float(value)

    def symbol(self, symbol: sympy.Symbol) -> Any:
        return self.symbols[symbol]

    def read(self, name: str, indices: Iterator[Any]) -> Any:
        leaf = self.leaves[name]
        if isinstance(leaf, _Broadcast):
            return leaf.tensor
        return leaf[tuple(k if isinstance(k, (int, Tensor)) else int(k) for k in indices)]

    def select(self, condition: Any, yes: Any, no: Any) -> Any:
        if isinstance(condition, bool):
            return yes if condition else no
        return torch.where(condition, yes, no)


def _unary(torch_function: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda x: torch_function(x if isinstance(x, Tensor) else torch.as_tensor(x))


def _power(base: Any, exponent: Any) -> Any:
    """In floating point where an exponent may be negative: torch's powers of whole numbers would be zero."""
    whole = isinstance(base, int) or (isinstance(base, Tensor) and not base.is_floating_point())
    if whole and (isinstance(exponent, Tensor) or exponent < 0):
        base = torch.as_tensor(base, dtype=torch.float64)
    return base**exponent


_TABLE: dict[Any, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Pow: _power,
    NEGATE: operator.neg,
    DIVIDE: operator.truediv,
    FloorDiv: operator.floordiv,
    sympy.Mod: operator.mod,
    sympy.And: operator.and_,
    sympy.Or: operator.or_,
    sympy.Xor: operator.xor,
    sympy.Not: lambda x: not x if isinstance(x, bool) else ~x,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
    sympy.Max: lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
    sympy.Min: lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    sympy.Abs: abs,
    sympy.floor: lambda x: x.floor() if isinstance(x, Tensor) and x.is_floating_point() else x,
    sympy.tanh: _unary(torch.tanh),
    sympy.exp: _unary(torch.exp),
}
