"""Graphs as boxes and arrows, before they are set as dot or svg. Long graphs are folded: one layer stands for all."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from kvpass.analysis.sweep import Analyzed
from kvpass.ir import Captured
from kvpass.report.compare import Change, Comparison, compare
from kvpass.report.layers import FOLD, folded, repeats
from kvpass.report.names import Sizes, display_names, leaves
from kvpass.report.stages import fact_text
from kvpass.report.view import Graph, Op, captured_view
from kvpass.transforms.plan import Plan
from kvpass.transforms.rewrite import Incremental

LARGE = 120  # lines from which a graph is folded
_WIDE = 34  # characters in a line of a box


@dataclass(frozen=True)
class Box:
    """One value. ``kind``: what its colour says (`KINDS`). ``lines``: the first is its heading."""

    name: str
    lines: tuple[str, ...]
    kind: str
    title: str  # the whole line, for a tooltip


@dataclass(frozen=True)
class Cluster:
    """One graph: its boxes in order of execution and its arrows by name."""

    title: str
    boxes: tuple[Box, ...]
    arrows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Picture:
    """What one drawing shows, with the kinds that its legend explains."""

    title: str
    clusters: tuple[Cluster, ...]
    legend: tuple[str, ...]


KINDS: Mapping[str, tuple[str, str]] = {  # fill, and what it means
    "input": ("#dbe9fb", "input or output"),
    "plain": ("#ffffff", "op"),
    "removed": ("#f9d6d5", "removed"),
    "added": ("#d3f0d6", "added"),
    "changed": ("#fdf0c4", "changed"),
    "stored": ("#d3f0d6", "stored in the cache"),
    "fold": ("#eeeeee", "layers left out"),
}
_OF_CHANGE = {Change.SAME: "plain", Change.CHANGED: "changed", Change.REMOVED: "removed", Change.ADDED: "added"}


def captured_picture(captured: Captured) -> Picture:
    cluster = _cluster("captured", captured_view(captured), lambda op: "plain")
    return _picture("The captured graph", [cluster])


def facts_picture(analyzed: Analyzed) -> Picture:
    """The captured graph with each value's fact in its box."""
    names, known, sizes = display_names(analyzed.captured), leaves(analyzed), Sizes(analyzed.captured)
    facts = {names.get(n.name, n.name): fact_text(s.fact, sizes, known) for n, s in analyzed.steps.items()}
    cluster = _cluster("facts", captured_view(analyzed.captured), lambda op: "plain", facts)
    return _picture("What each value depends on", [cluster])


def plan_picture(plan: Plan) -> Picture:
    """The captured graph with the stored values marked."""
    stored = {slot.name for slot in plan.slots}
    sizes = Sizes(plan.analyzed.captured)
    axes = {slot.name: sizes.axes(plan.analyzed.fact(slot.node)) for slot in plan.slots}
    notes = {slot.name: f"{axes[slot.name]} {slot.bytes_per_row:,} bytes per row" for slot in plan.slots}
    graph = captured_view(plan.analyzed.captured)
    cluster = _cluster("plan", graph, lambda op: "stored" if op.name in stored else "plain", notes)
    return _picture("What is stored", [cluster])


def incremental_picture(incremental: Incremental) -> Picture:
    """Both graphs, what changed in colour."""
    both = compare(incremental)
    before, after = both.changes()
    hidden, note = hidden_layers(both.before)
    new, came = _without_slots(both), _came_of(both, hidden)
    sides = [
        _cluster("before: all S rows in every call", both.before, _kind(before), hide=hidden, note=note),
        _cluster("after: N = S - P new rows", new, _kind(after), hide=came, note=note),
    ]
    return _picture("Before and after", sides)


def _kind(changes: Mapping[str, Change]) -> Callable[[Op], str]:
    return lambda op: _OF_CHANGE[changes.get(op.name, Change.SAME)]


def _picture(title: str, clusters: Iterable[Cluster]) -> Picture:
    clusters = tuple(clusters)
    seen = {box.kind for cluster in clusters for box in cluster.boxes}
    return Picture(title, clusters, tuple(kind for kind in KINDS if kind in seen))


# -- folding --------------------------------------------------------------------------------------------------------


def hidden_layers(graph: Graph) -> tuple[set[str], str]:
    """The lines of a large graph's repeated layers but the first, and what to say in their place."""
    found = repeats([f"{op.op} {op.shape}" for op in graph.ops]) if len(graph.ops) > LARGE else None
    if found is None:
        return set(), ""
    return {graph.ops[k].name for k in found.hidden}, f"{found.count - 1} more layers of {found.period} ops each"


def _came_of(both: Comparison, hidden: set[str]) -> set[str]:
    """The lines of the new graph that came of hidden lines."""
    return {op.name for op in both.after.ops if op.origin in hidden}


def _without_slots(both: Comparison) -> Graph:
    """The new graph with the arguments of its slots named in the boxes that use them."""
    known = {op.name for op in both.before.ops}
    slots = {op.name for op in both.after.ops if op.op == "input" and op.name not in known}
    ops = [_naming(op, slots) for op in both.after.ops if op.name not in slots]
    return replace(both.after, ops=tuple(ops))


def _naming(op: Op, slots: set[str]) -> Op:
    named = tuple(name for name in op.operands if name in slots)
    return replace(op, operands=tuple(n for n in op.operands if n not in slots), weights=(*op.weights, *named))


# -- boxes ----------------------------------------------------------------------------------------------------------


def _cluster(
    title: str,
    graph: Graph,
    kind: Callable[[Op], str],
    notes: Mapping[str, str] | None = None,
    hide: set[str] | None = None,
    note: str = "",
) -> Cluster:
    if hide is None:
        hide, note = hidden_layers(graph)
    graph = folded(graph, hide, note)
    boxes = tuple(_box(op, _kind_of(op, kind), (notes or {}).get(op.name, "")) for op in graph.ops)
    arrows = tuple((name, op.name) for op in graph.ops for name in op.operands)
    return Cluster(title, boxes, arrows)


def _kind_of(op: Op, kind: Callable[[Op], str]) -> str:
    if op.name == FOLD:
        return "fold"
    chosen = kind(op)
    return "input" if op.op in ("input", "output") and chosen == "plain" else chosen


def _box(op: Op, kind: str, note: str) -> Box:
    head = op.name if op.op == "input" else op.op
    lines = [head, ", ".join(map(_tail, op.weights)), ", ".join(op.settings), note or f"{op.dtype} {op.shape}".strip()]
    shown = [part for text in lines for part in _lines(text)]
    return Box(op.name, tuple(shown), kind, f"{op}  {op.dtype} {op.shape}  {op.source}".strip())


def _tail(weight: str) -> str:
    """The last two parts of a parameter's name: ``q_proj.weight``."""
    return ".".join(weight.split(".")[-2:])


def _lines(text: str) -> list[str]:
    """Text in lines that a box holds; what would need more than three is cut, the tooltip has it all."""
    wrapped = [line for part in text.split("; ") for line in textwrap.wrap(part, _WIDE)]
    return wrapped if len(wrapped) <= 3 else [*wrapped[:2], wrapped[2][: _WIDE - 3] + " .."]
