"""Repeated layers: the longest stretch of a graph in which one sequence of ops comes again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvpass.report.view import Graph, Op

_SHORTEST = 6  # ops: less is a habit, not a layer


@dataclass(frozen=True)
class Repeat:
    """Lines ``start .. start + period * count`` are ``count`` times the same ``period`` lines."""

    start: int
    period: int
    count: int

    @property
    def hidden(self) -> range:
        """The lines of all but the first."""
        return range(self.start + self.period, self.start + self.period * self.count)


def repeats(words: Sequence[str]) -> Repeat | None:
    """The repetition that covers the most words; of several the shortest period. None where nothing repeats."""
    codes = np.unique(np.asarray(words), return_inverse=True)[1] if words else np.zeros(0, int)
    best: Repeat | None = None
    for period in range(_SHORTEST, len(words) // 2 + 1):
        start, length = _longest(codes[:-period] == codes[period:])
        count = length // period + 1
        if count > 1 and (best is None or period * count > best.period * best.count):
            best = Repeat(start, period, count)
    return best


def _longest(hits: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], hits, [False])).astype(int)))
    if not len(edges):
        return 0, 0
    starts, ends = edges[::2], edges[1::2]
    k = int(np.argmax(ends - starts))
    return int(starts[k]), int(ends[k] - starts[k])


def folded(graph: Graph, hidden: set[str], text: str) -> Graph:
    """The graph without the hidden lines; one line stands for them, where values pass through them."""
    if not hidden:
        return graph
    placed = False
    ops: list[Op] = []
    inside = tuple(dict.fromkeys(n for op in graph.ops if op.name in hidden for n in op.operands if n not in hidden))
    made_before = {op.name for op in graph.ops[: next(k for k, op in enumerate(graph.ops) if op.name in hidden)]}
    for op in graph.ops:
        if op.name not in hidden:
            ops.append(_rewired(op, hidden))
        elif not placed:
            placed = True
            ops.append(Op(FOLD, text, operands=tuple(n for n in inside if n in made_before)))
    return replace(graph, ops=tuple(ops))


FOLD = "..."


def _rewired(op: Op, hidden: set[str]) -> Op:
    return replace(op, operands=tuple(dict.fromkeys(FOLD if n in hidden else n for n in op.operands)))
