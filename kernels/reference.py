"""The meaning of `kvpass.ir.Attention`, in plain PyTorch. Every generator of kernels is tested against this file.

Two steps: `visible` evaluates the support into a mask, once for all attentions of a step that share it, and `attention`
computes the products. Where the score is untouched between them, ATen's fused kernel does both.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import Tensor

from kvpass.ir import SCORE, Attention, B, H, I, J

_CAUSAL = sympy.Le(J, I)


def visible(
    support: sympy.Basic,
    device: torch.device,
    heads: int,
    start: int,
    rows: int,
    names: tuple[str, ...],
    loads: tuple[Tensor, ...],
) -> Tensor | None:
    """Which keys each new row sees.

    Args:
        support: predicate over ``b h i j`` (`Attention.support`); ``i`` and ``j`` are rows, not offsets.
        start, rows: ``P`` and ``S``: the new rows are ``P .. S-1``, the keys ``0 .. S-1``.
        names, loads: the tensors that leaf functions of the support read.

    Returns:
        bool, broadcastable to ``[B, H, N, S]``, or None where every key is seen.
    """
    if support == sympy.true or (rows - start == 1 and support in (_CAUSAL, _CAUSAL_NORMAL)):
        return None
    grid = _grid(start, rows, device, heads, loads)
    mask = evaluate(support, grid, dict(zip(names, loads, strict=True)))
    return mask if isinstance(mask, Tensor) else torch.full((1, 1, 1, 1), bool(mask), device=device)


_CAUSAL_NORMAL = sympy.Le(J - I, 0)


def _grid(
    start: int, rows: int, device: torch.device, heads: int, loads: tuple[Tensor, ...]
) -> dict[sympy.Basic, Tensor]:
    batch = max((load.shape[0] for load in loads if load.dim()), default=1)
    return {
        B: torch.arange(batch, device=device).view(-1, 1, 1, 1),
        H: torch.arange(heads, device=device).view(1, -1, 1, 1),
        I: torch.arange(start, rows, device=device).view(1, 1, -1, 1),
        J: torch.arange(rows, device=device).view(1, 1, 1, -1),
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
    if spec.score == SCORE and not spec.empty_is_nan:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=spec.scale, enable_gqa=spec.group > 1
        )
    new = query.shape[2]
    grouped = _unflatten(query, 1, (spec.kv_heads, spec.group)).flatten(2, 3)  # [B, K, G * N, D]
    scores = _unflatten(grouped @ key.mT, 2, (spec.group, new)).flatten(1, 2)  # [B, H, N, S]
    if spec.scale != 1.0:
        scores = scores * spec.scale
    if spec.score != SCORE:
        leaves = dict(zip(names, loads, strict=True))
        scores = evaluate(spec.score, {SCORE: scores}, {k: _Broadcast(v) for k, v in leaves.items()})
    if spec.softmax_dtype is not None:
        scores = scores.to(spec.softmax_dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    if not spec.empty_is_nan and mask is not None:
        weights = weights.nan_to_num(0.0) if bool((~mask.any(-1)).any()) else weights
    weights = _unflatten(weights.to(value.dtype), 1, (spec.kv_heads, spec.group)).flatten(2, 3)
    return _unflatten(weights @ value, 2, (spec.group, new)).flatten(1, 2).to(spec.dtype)


def _unflatten(x: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


class _Broadcast:
    """A load that already has the score's axes: its index arguments are implied."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def evaluate(expr: Any, symbols: Mapping[sympy.Basic, Any], leaves: Mapping[str, Any]) -> Any:
    """An expression over tensors: index symbols and leaf functions are looked up, everything else is broadcast."""
    if expr in symbols:
        return symbols[expr]
    if expr == sympy.true or expr == sympy.false:
        return bool(expr)
    if expr.is_number:
        return int(expr) if expr.is_Integer and abs(expr) < 1 << 62 else float(expr)
    if isinstance(expr, AppliedUndef):
        leaf = leaves[expr.func.__name__]
        if isinstance(leaf, _Broadcast):
            return leaf.tensor
        return leaf[tuple(_index(evaluate(a, symbols, leaves)) for a in expr.args)]
    if isinstance(expr, sympy.Piecewise):
        return _piecewise(expr, symbols, leaves)
    if isinstance(expr, (sympy.floor, Relational)) and any(not n.is_Integer for n in expr.atoms(sympy.Rational)):
        return _whole_numbers(expr, symbols, leaves)
    args = [evaluate(arg, symbols, leaves) for arg in expr.args]
    return _TABLE[expr.func](*args)


def _whole_numbers(expr: Any, symbols: Mapping[sympy.Basic, Any], leaves: Mapping[str, Any]) -> Any:
    """``floor(x / 49)`` and ``x / 49 < y`` without fractions: in floating point 49 * (1 / 49) is less than one."""
    fraction = expr.args[0] if isinstance(expr, sympy.floor) else expr.lhs - expr.rhs
    above, below = sympy.together(fraction).as_numer_denom()
    if not below.is_Integer:
        raise NotImplementedError(f"{expr} divides by something else than a number")
    number = evaluate(above, symbols, leaves)
    if isinstance(expr, sympy.floor):
        return number // int(below)
    return _TABLE[expr.func](number, 0)


def _index(value: Any) -> Any:
    return value if isinstance(value, (int, Tensor)) else int(value)


def _piecewise(expr: sympy.Piecewise, symbols: Mapping[sympy.Basic, Any], leaves: Mapping[str, Any]) -> Any:
    out: Any = None
    for value, cond in reversed(expr.args):
        branch = evaluate(value, symbols, leaves)
        test = evaluate(cond, symbols, leaves)
        out = branch if out is None or test is True else torch.where(test, branch, out)
    return out


def _fold(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *args: reduce(function, args)


def _unary(torch_function: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda x: torch_function(x if isinstance(x, Tensor) else torch.as_tensor(x))


_TABLE: dict[Any, Callable[..., Any]] = {
    sympy.Add: _fold(operator.add),
    sympy.Mul: _fold(operator.mul),
    sympy.Pow: operator.pow,
    sympy.And: _fold(operator.and_),
    sympy.Or: _fold(operator.or_),
    sympy.Xor: _fold(operator.xor),
    sympy.Not: lambda x: not x if isinstance(x, bool) else ~x,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
    sympy.Max: _fold(lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b))),
    sympy.Min: _fold(lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b))),
    sympy.Abs: abs,
    sympy.floor: lambda x: x.floor() if isinstance(x, Tensor) and x.is_floating_point() else x,
    sympy.tanh: _unary(torch.tanh),
    sympy.exp: _unary(torch.exp),
}
