"""A small layered layout (Sugiyama, Tagawa and Toda 1981): ranks, few crossings, straight arrows.

Graphs of models are tall and narrow, so the plain steps do: the rank of a box is its longest path from an input; arrows
over several ranks pass through points; every rank is ordered by the mean place of its neighbours, a few times over;
then boxes move as near to that mean as their neighbours in the rank allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

Size = tuple[float, float]
_SWEEPS = 12


@dataclass(frozen=True)
class Placed:
    """Centres of boxes, and for each arrow the points through which it passes, from the source's foot."""

    centres: Mapping[str, tuple[float, float]]
    routes: Sequence[tuple[str, str, tuple[tuple[float, float], ...]]]
    width: float
    height: float


@dataclass
class _Net:
    """Boxes and points in ranks, and who is connected with whom in the next rank."""

    ranks: list[list[str]]
    up: dict[str, list[str]] = field(default_factory=dict)
    down: dict[str, list[str]] = field(default_factory=dict)
    chains: list[tuple[str, str, list[str]]] = field(default_factory=list)


def layered(sizes: Mapping[str, Size], arrows: Sequence[tuple[str, str]], gap: Size = (18.0, 26.0)) -> Placed:
    """Place boxes.

    Args:
        sizes: width and height by name, in an order in which every arrow points forwards.
        arrows: pairs of names.
        gap: the least distance of two boxes, sideways and from rank to rank.
    """
    arrows = [(a, b) for a, b in dict.fromkeys(arrows) if a in sizes and b in sizes]
    net = _network(sizes, _ranks(list(sizes), arrows), arrows)
    _order(net)
    x = _sideways(net, sizes, gap[0])
    y, height = _downwards(net, sizes, gap[1])
    half = {n: sizes[n][0] / 2 if n in sizes else 1.0 for n in x}
    left = min((x[n] - half[n] for n in x), default=0.0)
    right = max((x[n] + half[n] for n in x), default=0.0)
    centre = {n: (x[n] - left, y[n]) for n in x}
    routes = [(a, b, tuple(centre[p] for p in points)) for a, b, points in net.chains]
    return Placed({n: centre[n] for n in sizes}, routes, right - left, height)


def _ranks(names: Sequence[str], arrows: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Longest path from the inputs; what nothing leads to stands just above its first reader."""
    into: dict[str, list[str]] = {n: [] for n in names}
    out: dict[str, list[str]] = {n: [] for n in names}
    for a, b in arrows:
        into[b].append(a)
        out[a].append(b)
    rank: dict[str, int] = {}
    for n in names:
        rank[n] = max((rank[a] + 1 for a in into[n]), default=0)
    for n in reversed(names):
        if out[n] and all(len(out[a]) == 1 for a in into[n]):
            rank[n] = min(rank[b] for b in out[n]) - 1
    return rank


def _network(sizes: Mapping[str, Size], rank: Mapping[str, int], arrows: Sequence[tuple[str, str]]) -> _Net:
    net = _Net([[] for _ in range(max(rank.values(), default=-1) + 1)])
    for n in sizes:
        net.ranks[rank[n]].append(n)
    for a, b in arrows:
        points = [f"{a}\0{b}\0{r}" for r in range(rank[a] + 1, rank[b])]
        for r, point in zip(range(rank[a] + 1, rank[b]), points, strict=True):
            net.ranks[r].append(point)
        for s, t in zip([a, *points], [*points, b], strict=True):
            net.down.setdefault(s, []).append(t)
            net.up.setdefault(t, []).append(s)
        net.chains.append((a, b, points))
    return net


def _order(net: _Net) -> None:
    """Sort each rank by the mean place of its neighbours above, then below, in turn."""
    for sweep in range(_SWEEPS):
        towards, ranks = (net.up, net.ranks) if sweep % 2 == 0 else (net.down, net.ranks[::-1])
        place: dict[str, float] = {}
        for rank in ranks:
            wish = {n: [place[m] for m in towards.get(n, ()) if m in place] for n in rank}
            here = {n: k for k, n in enumerate(rank)}
            rank.sort(key=lambda n: sum(wish[n]) / len(wish[n]) if wish[n] else here[n])
            place |= {n: float(k) for k, n in enumerate(rank)}


def _sideways(net: _Net, sizes: Mapping[str, Size], gap: float) -> dict[str, float]:
    x: dict[str, float] = {}
    for rank in net.ranks:
        offset = 0.0
        for n in rank:
            width = sizes.get(n, (6.0, 0.0))[0]
            x[n] = offset + width / 2
            offset += width + gap
    for sweep in range(2 * _SWEEPS):
        for rank in net.ranks if sweep % 2 == 0 else net.ranks[::-1]:
            near = [[x[m] for m in (*net.up.get(n, ()), *net.down.get(n, ()))] for n in rank]
            wish = [sum(ms) / len(ms) if ms else x[n] for n, ms in zip(rank, near, strict=True)]
            widths = [sizes.get(n, (6.0, 0.0))[0] for n in rank]
            x |= dict(zip(rank, _apart(wish, widths, gap), strict=True))
    return x


def _apart(wish: Sequence[float], widths: Sequence[float], gap: float) -> list[float]:
    """The places nearest to what is wished for (least squares) that keep order and distance.

    Without the distances this is isotonic regression, solved by pooling adjacent violators.
    """
    steps = [(a + b) / 2 + gap for a, b in pairwise(widths)]
    shift = np.concatenate(([0.0], np.cumsum(steps)))
    pools: list[tuple[float, int]] = []
    for value in np.asarray(wish) - shift:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [float(v) for v in np.repeat([v for v, _ in pools], [n for _, n in pools]) + shift]


def _downwards(net: _Net, sizes: Mapping[str, Size], gap: float) -> tuple[dict[str, float], float]:
    y: dict[str, float] = {}
    top = 0.0
    for rank in net.ranks:
        height = max((sizes[n][1] for n in rank if n in sizes), default=0.0)
        y |= dict.fromkeys(rank, top + height / 2)
        top += height + gap
    return y, max(top - gap, 0.0)
