"""The stages of the compiler as text: captured, facts, plan, incremental."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from kvpass.analysis.facts import Fact
from kvpass.analysis.sweep import Analyzed, source_of
from kvpass.ir import Captured
from kvpass.report.compare import Change, Row, compare
from kvpass.report.formula import Leaves, formula
from kvpass.report.gather import graph_report
from kvpass.report.names import Sizes, display_names, leaves, letters, line, place, short
from kvpass.report.parts import Record
from kvpass.report.text import attention_lines, stored_lines
from kvpass.report.view import Graph, captured_view
from kvpass.transforms.plan import Plan
from kvpass.transforms.rewrite import Incremental

_COLOURS = {Change.REMOVED: "\x1b[31m", Change.ADDED: "\x1b[32m", Change.CHANGED: "\x1b[33m", Change.SAME: ""}


@dataclass(frozen=True)
class Look:
    """How text is set: in how many columns of characters, and whether in colour."""

    width: int = 160
    colour: bool = False


def captured_text(captured: Captured) -> str:
    """One line per op; the user's line stands above the ops that it made."""
    return "\n".join(_numbered(captured_view(captured)))


def _numbered(graph: Graph) -> Iterator[str]:
    yield f"# {len(graph.ops)} values; {len(graph.weights)} weights and buffers, named where they are used"
    last = ""
    for op in graph.ops:
        if op.source and op.source != last:
            yield f"# {line(op.source)}"
            last = op.source
        shape = f"  # {op.dtype} {op.shape}" if op.shape and op.op != "input" else ""
        yield f"{op}{shape}"


def facts_text(analyzed: Analyzed, stopped: str = "") -> str:
    """One line per value with its fact. ``stopped``: why the sweep went no further."""
    names, known, sizes = display_names(analyzed.captured), leaves(analyzed), Sizes(analyzed.captured)
    weights = analyzed.captured.constants
    told = {n: s.fact for n, s in analyzed.steps.items() if n.name not in weights or s.fact.expr is not None}
    rows = [(names.get(n.name, n.name), fact_text(fact, sizes, known)) for n, fact in told.items()]
    width = min(max((len(name) for name, _ in rows), default=0), 40)
    lines = ["# [axes] = closed form; row: entry i depends on rows up to i; pair: up to both; whole: on all of them"]
    lines += [f"{name:<{width}}  {text}" for name, text in rows]
    return "\n".join(lines + ([f"# {stopped}"] if stopped else []))


def fact_text(fact: Fact, sizes: Sizes, known: Leaves) -> str:
    """A fact in letters: ``[B, 2·2, S, S] pair; -inf outside j <= i``."""
    names = letters(fact)
    parts = [f"{short(fact.dtype)} {sizes.axes(fact)}" + ("" if fact.expr is None else f" = {_told(fact, known)}")]
    if fact.whole is not None:
        parts[0] += f" whole ({fact.whole.why})"
    elif fact.deps:
        parts[0] += " row" if len(fact.deps) == 1 else " pair"
    if fact.fill is not None:
        parts.append(f"{fact.fill.value} outside {formula(fact.support.xreplace(names), known)}")
    if formula(fact.valid) != "True":
        parts.append(f"meaningful where {formula(fact.valid.xreplace(names), known)}")
    parts += [f"{name}: {cause.why}" for name, cause in fact.tainted() if name != "whole"]
    return "; ".join(parts)


def _told(fact: Fact, known: Leaves) -> str:
    return formula(fact.expr.xreplace(letters(fact)), known) if fact.expr is not None else ""


def plan_text(plan: Plan, record: Record) -> str:
    """What is stored, what is rebuilt, what is computed in every call."""
    report = graph_report(record)
    free = [node for node in plan.analyzed.steps if node in plan.free and node.op != "placeholder"]
    lines = ["Stored", *(f"  {text}" for text in stored_lines(report))]
    lines += ["", "Slots", *(f"  {slot_text(plan, slot.node)}" for slot in plan.slots)]
    lines += ["", f"Rebuilt from the inputs where they are needed: {len(free)} values"]
    lines += [f"  {text}" for text in textwrap.wrap(_ops_of(free), 100)]
    lines += ["", "Attention", *(f"  {text}" for text in attention_lines(report))]
    return "\n".join(lines)


def slot_text(plan: Plan, node: fx.Node) -> str:
    """One slot: its name, its axes, its bytes, the line that computes it."""
    slot, sizes = plan.slot_of(node), Sizes(plan.analyzed.captured)
    if slot is None:
        return ""
    kind = " (output)" if slot.is_output else ""
    axes = sizes.axes(plan.analyzed.fact(node))
    source = f"  # {place(line(source_of(node)))}" if source_of(node) else ""
    return f"{slot.name}{kind}: {short(slot.dtype)} {axes}, {slot.bytes_per_row:,} bytes per row{source}"


def _ops_of(nodes: list[fx.Node]) -> str:
    counts: dict[str, int] = {}
    for node in nodes:
        name = str(node.target).removeprefix("aten.")
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in sorted(counts.items())) or "none"


# -- before and after -----------------------------------------------------------------------------------------------


def incremental_text(incremental: Incremental, look: Look) -> str:
    """Both graphs in two columns; ``-`` removed, ``+`` added, ``~`` changed."""
    both = compare(incremental)
    column = max((look.width - 3) // 2, 30)
    counts = {change: sum(row.change is change for row in both.rows) for change in Change}
    tally = ", ".join(f"{counts[c]} {c.name.lower()}" for c in Change)
    lines = [
        f"# {len(both.before.ops)} values before, {len(both.after.ops)} after: {tally}",
        "# S rows in all, P of them in the cache, N = S - P new",
        f"{'before':<{column}}   after",
    ]
    slots = [slot.name for slot in incremental.plan.slots]
    for row in _one_line_per_slot(both.rows, slots):
        lines += [_coloured(text, row.change, look.colour) for text in _two_columns(row, column)]
    return "\n".join(lines)


def _one_line_per_slot(rows: Iterable[Row], slots: Sequence[str]) -> Iterator[Row]:
    """The four arguments that a slot has, in one line that names it."""
    for row in rows:
        kind, _, k = row.after.name.rpartition("_") if row.after and row.before is None else ("", "", "")
        if row.after is None or row.after.op != "input" or kind not in ("pool", "table", "run", "place"):
            yield row
        elif kind == "pool":
            text = f"pool_{k}, table_{k}, run_{k}, place_{k}: the rows of {slots[int(k)]}"
            yield replace(row, after=replace(row.after, name=text))


def _two_columns(row: Row, column: int) -> Iterator[str]:
    left, right = (_wrapped(str(op) if op else "", column) for op in (row.before, row.after))
    for k in range(max(len(left), len(right))):
        a, b = (part[k] if k < len(part) else "" for part in (left, right))
        yield f"{a:<{column}} {row.change.value} {b}".rstrip()


def _wrapped(text: str, column: int) -> list[str]:
    return textwrap.wrap(text, column, subsequent_indent="    ", break_on_hyphens=False) or [""]


def _coloured(text: str, change: Change, colour: bool) -> str:
    return f"{_COLOURS[change]}{text}\x1b[0m" if colour and _COLOURS[change] else text
