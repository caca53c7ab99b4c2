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
    """The graph without the hidden lines: one line stands for them, after all that they read."""
    if not hidden:
        return graph
    inside = dict.fromkeys(n for op in graph.ops if op.name in hidden for n in op.operands if n not in hidden)
    before: list[Op] = []
    after: list[Op] = []
    behind = set(hidden)  # what depends on a hidden line
    for op in graph.ops:
        if op.name in hidden:
            continue
        if behind.isdisjoint(op.operands):
            before.append(op)
        else:
            behind.add(op.name)
            after.append(_rewired(op, hidden))
    fold = Op(FOLD, text, operands=tuple(n for n in inside if n not in behind))
    return replace(graph, ops=(*before, fold, *after))


FOLD = "..."


def _rewired(op: Op, hidden: set[str]) -> Op:
    return replace(op, operands=tuple(dict.fromkeys(FOLD if n in hidden else n for n in op.operands)))
