"""Ops that treat the entries along one axis alike: what is computed of some of them is that part of the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from kvpass.analysis.rules import pointwise
from kvpass.analysis.rules.contraction import einsum_names
from kvpass.analysis.sweep import arguments, dim_of, sym
from kvpass.analysis.table import RULES
from kvpass.transforms.spell import JOINS, named

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
REDUCTIONS = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default)
SIZED = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default)
"""Ops whose second argument is the shape of the result."""

RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints)


def axis_of(node: fx.Node, axes: Mapping[fx.Node, int]) -> int | None:
    """Along which axis of the result its entries are alike; None where they are not.

    Args:
        axes: that axis of the operands that have one. The others are the same for all entries.
    """
    target, args = node.target, arguments(node)
    tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    if not isinstance(node.meta.get("val"), torch.Tensor) or not axes:
        return None
    rank = node.meta["val"].dim()
    rule = RULES.get(target)
    if rule is not None and rule.__module__ == pointwise.__name__:
        return _aligned(tensors, axes, rank)
    if target in (aten.matmul.default, aten.bmm.default):
        return _of_product(args[0], args[1], axes, rank)
    if target is aten.outer.default:
        return int(args[1] in axes) if len(set(args)) == 2 and len(axes) == 1 else None
    if target is aten.einsum.default:
        return _of_einsum(str(args[0]), list(args[1]), axes)
    if target is aten.baddbmm.default:
        return _of_biased(args[0], args[1], args[2], axes, rank)
    if target in JOINS:
        found = {axes.get(a) for a in tensors}
        axis = found.pop()
        return axis if not found and axis is not None and dim_of(node, 1) % rank != axis else None
    if target is aten.scaled_dot_product_attention.default:
        return _of_attention(node, axes, rank)
    return _of_one(node, axes[args[0]], rank) if set(axes) == {args[0]} else None


def told_axes(node: fx.Node) -> set[int]:
    """The axes that an op is told; all of them where it is told none."""
    rank, given = int(arguments(node)[0].meta["val"].dim()), named(node)["dim"]
    dims = given if isinstance(given, (list, tuple)) else [given]
    return set(range(rank)) if not dims or None in dims else {int(d) % rank for d in dims}


def _of_one(node: fx.Node, axis: int, rank: int) -> int | None:
    """Of an op on one tensor of rows, whose other operands are weights."""
    target, args = node.target, arguments(node)
    before: int = args[0].meta["val"].dim()
    if target in (*SOFTMAX, *REDUCTIONS, aten.slice.Tensor, aten.select.int):
        dims = told_axes(node)
        return None if axis in dims else axis - (0 if rank == before else sum(d < axis for d in dims))
    if target is aten.linear.default:
        return axis if axis < before - 1 else None
    if target in (aten.layer_norm.default, aten.rms_norm.default):
        return axis if axis < before - len(args[1]) else None
    if target in RESHAPES:
        return _of_reshape(node, axis)
    return _moved(node, axis, rank)


def _moved(node: fx.Node, axis: int, rank: int) -> int | None:
    """Of an op that only moves axes."""
    target, args = node.target, arguments(node)
    if target is aten.transpose.int:
        a, b = int(args[1]) % rank, int(args[2]) % rank
        return {a: b, b: a}.get(axis, axis)
    if target in (aten.t.default, aten.mT.default):
        return {rank - 2: rank - 1, rank - 1: rank - 2}.get(axis, axis) if rank > 1 else None
    if target is aten.permute.default:
        order: list[int] = list(args[1])
        return next(k for k, d in enumerate(order) if d % rank == axis)
    if target is aten.unsqueeze.default:
        return axis + int(args[1] % rank <= axis)
    if target is aten.squeeze.dim:
        before: int = args[0].meta["val"].dim()
        gone = int(args[1]) % before
        return None if gone == axis else axis - int(gone < axis and rank < before)
    if target is aten.expand.default:
        return axis + rank - int(args[0].meta["val"].dim())
    return None


def _aligned(tensors: list[fx.Node], axes: Mapping[fx.Node, int], rank: int) -> int | None:
    """Where broadcasting puts the axis: the same place for all, and the others have one entry there."""
    first, axis = next(iter(axes.items()))
    behind = int(first.meta["val"].dim()) - axis
    return rank - behind if all(_fits(a, axes, behind) for a in tensors) else None


def _fits(a: fx.Node, axes: Mapping[fx.Node, int], behind: int) -> bool:
    """Whether an operand has the axis as number ``behind`` from the end, or one entry there."""
    shape = a.meta["val"].shape
    if a in axes:
        return len(shape) - axes[a] == behind
    return len(shape) < behind or bool(shape[-behind] == 1)


def _of_product(left: fx.Node, right: fx.Node, axes: Mapping[fx.Node, int], rank: int) -> int | None:
    """Rows of the left matrix, columns of the right one, or one product for each entry; not what is summed over."""
    dims = [a.meta["val"].dim() for a in (left, right)]
    if min(dims) < 2 or left is right:
        return None
    if axes.get(left) == dims[0] - 1 or axes.get(right) == dims[1] - 2:
        return None
    found = {rank - dim + axes[a] for a, dim in zip((left, right), dims, strict=True) if a in axes}
    if len(found) != 1:
        return None
    (axis,) = found
    if axis < rank - 2:
        return axis if all(_fits(a, axes, rank - axis) for a in (left, right)) else None
    return None if axes.keys() >= {left, right} else axis


def _of_einsum(equation: str, factors: list[fx.Node], axes: Mapping[fx.Node, int]) -> int | None:
    """An axis of the result, which no factor has but those of rows, and these as the same letter."""
    names, out = einsum_names(equation, [a.meta["val"].dim() for a in factors])
    letters = {mine[axes[a]] for a, mine in zip(factors, names, strict=True) if a in axes}
    letter = letters.pop()
    if letters or letter not in out or len(set(factors)) < len(factors):
        return None
    own = [mine.count(letter) == (a in axes) for a, mine in zip(factors, names, strict=True)]
    return out.index(letter) if all(own) else None


def _of_biased(bias: fx.Node, left: fx.Node, right: fx.Node, axes: Mapping[fx.Node, int], rank: int) -> int | None:
    """``bias + left @ right``: the bias has the axis, too, or one entry there."""
    axis = _of_product(left, right, {a: k for a, k in axes.items() if a is not bias}, rank)
    if axis is None or bias in (left, right):
        return None
    return axis if _fits(bias, axes, rank - axis) else None


def _of_attention(node: fx.Node, axes: Mapping[fx.Node, int], rank: int) -> int | None:
    """Queries; a mask has them, too, or is the same for all of them."""
    given = named(node)
    mask = given["attn_mask"]
    if axes.get(given["query"]) != rank - 2 or given["key"] in axes or given["value"] in axes:
        return None
    if given["is_causal"] or given["dropout_p"] != 0:  # causal: from the first of these queries on
        return None
    return rank - 2 if mask is None or _fits(mask, axes, 2) else None


def _of_reshape(node: fx.Node, axis: int) -> int | None:
    """Row-major: the axis that has the same size behind the same number of entries."""
    old, new = ([sym(d) for d in value.shape] for value in (arguments(node)[0].meta["val"], node.meta["val"]))
    for k, size in enumerate(new):
        if size == old[axis] and _product(new[:k]) == _product(old[:axis]):
            return k
    return None


def _product(sizes: list[Any]) -> Any:
    found: Any = 1
    for size in sizes:
        found = found * size
    return found
