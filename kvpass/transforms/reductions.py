"""Reductions over one axis, and where their axes stand beside those of what was reduced.

The axes of a value are named by the axes of another one: a list with a number for each, None for an axis of size one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvpass.analysis.sweep import arguments
from kvpass.transforms.spell import same

aten = torch.ops.aten
_MOVES = (aten.unsqueeze.default, aten.transpose.int, aten.permute.default)


@dataclass(frozen=True)
class Reduction:
    """``source`` reduced along ``axis``; ``names`` are the axes of the result, after some moves."""

    source: fx.Node
    axis: int
    names: list[int | None]

    def stands_beside(self) -> bool:
        """True where each entry stands in the place of those that it was reduced from."""
        return self.names == beside(self.source, self.axis)


def beside(x: fx.Node, axis: int) -> list[int | None]:
    """The axes of what has one entry in the place of one axis of ``x``."""
    return [None if k == axis else k for k in range(x.meta["val"].dim())]


def unmoved(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """A value before its axes were moved about, and the ops that did so, the last one first."""
    moves = []
    while node.target in _MOVES or (node.target is aten.expand.default and _same_rank(node)):
        moves.append(node)
        node = arguments(node)[0]
    return node, moves


def _same_rank(node: fx.Node) -> bool:
    return bool(arguments(node)[0].meta["val"].dim() == node.meta["val"].dim())


def moved(node: fx.Node, names: list[int | None]) -> list[int | None]:
    """The names of the axes behind an op of `_MOVES`."""
    if node.target is aten.expand.default:
        return names
    names = list(names)
    args, rank = arguments(node), len(names)
    if node.target is aten.unsqueeze.default:
        names.insert(args[1] % (rank + 1), None)
    elif node.target is aten.transpose.int:
        a, b = args[1] % rank, args[2] % rank
        names[a], names[b] = names[b], names[a]
    elif node.target is aten.permute.default:
        names = [names[k] for k in args[1]]
    return names


def reduced(node: fx.Node, *targets: Callable[..., Any]) -> Reduction | None:
    """The reduction along one axis that a node is, by an op of the targets."""
    node, moves = unmoved(node)
    if node.target is operator.getitem and arguments(node)[1] == 0:
        node = arguments(node)[0]
    if node.target not in targets:
        return None
    source, axes, *rest = arguments(node)
    if isinstance(axes, (list, tuple)):
        if len(axes) != 1:
            return None
        (axes,) = axes
    axis = axes % source.meta["val"].dim()
    names = [k for k in beside(source, axis) if (rest and rest[0]) or k is not None]
    for move in reversed(moves):
        names = moved(move, names)
    return Reduction(source, axis, names)


def sum_of(node: fx.Node) -> Reduction | None:
    """A sum along one axis, in the type of its terms."""
    found = reduced(node, aten.sum.dim_IntList)
    return found if found is not None and found.source.meta["val"].dtype == node.meta["val"].dtype else None


def log_of_sum(node: fx.Node) -> tuple[fx.Node, int] | None:
    """``(x, axis)`` where a node is ``log(sum(exp(x)))`` along an axis that it keeps as one of size one."""
    if node.target is not aten.log.default:
        found = reduced(node, aten.logsumexp.default)
        return (found.source, found.axis) if found is not None and found.stands_beside() else None
    found = sum_of(arguments(node)[0])
    if found is None or not found.stands_beside() or found.source.target is not aten.exp.default:
        return None
    return arguments(found.source)[0], found.axis


def before_shift(x: fx.Node, axis: int) -> fx.Node:
    """What the maximum along the axis was taken from, which a softmax does not notice."""
    if x.target is not aten.sub.Tensor or len(arguments(x)) != 2 or x.kwargs:
        return x
    whole, top = arguments(x)
    found = reduced(top, aten.max.dim, aten.amax.default) if isinstance(top, fx.Node) else None
    if found is None or not found.stands_beside() or found.axis != axis or not same(found.source, whole):
        return x
    return whole  # type: ignore[no-any-return]
