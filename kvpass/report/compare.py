"""Before and after, side by side: what each captured value became.

A row of the comparison is one captured value and one value that came of it. The right column follows the order of the
left one, so that what belongs together stands together; `kvpass dump --format json` has the order of execution.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvpass.report.view import Graph, Op, captured_view, incremental_view
from kvpass.transforms.rewrite import Incremental


class Change(enum.Enum):
    """What the rewrite did to a line; the value is its mark."""

    SAME = " "
    CHANGED = "~"
    REMOVED = "-"
    ADDED = "+"


@dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    change: Change
    before: Op | None
    after: Op | None


@dataclass(frozen=True)
class Comparison:
    """Both graphs and their rows; ``changes`` tells of each line of either graph by name."""

    before: Graph
    after: Graph
    rows: tuple[Row, ...]

    def changes(self) -> tuple[dict[str, Change], dict[str, Change]]:
        before = {row.before.name: row.change for row in self.rows if row.before is not None}
        after = {row.after.name: row.change for row in self.rows if row.after is not None}
        return before, after


def compare(incremental: Incremental) -> Comparison:
    """Align the captured and the incremental graph."""
    before, after = captured_view(incremental.plan.analyzed.captured), incremental_view(incremental)
    return Comparison(before, after, tuple(_rows(before, after)))


def _rows(before: Graph, after: Graph) -> Iterator[Row]:
    came: dict[str, list[Op]] = {}
    first = {op.name for op in before.ops}
    for op in after.ops:
        place = op.origin or (op.name if op.op in ("input", "output") and op.name in first else "")
        came.setdefault(place, []).append(op)
    origin = {op.name: op.origin or op.name for op in after.ops}
    for op in came.get("", []):
        yield Row(Change.ADDED, None, op)
    for op in before.ops:
        yield from _became(op, came.get(op.name, []), origin)


def _became(op: Op, made: list[Op], origin: dict[str, str]) -> Iterator[Row]:
    """One captured value beside all that came of it; the one that resembles it stands on its line."""
    if not made:
        yield Row(Change.REMOVED, op, None)
        return
    likely = [m for m in made if _same(op, m, origin)] + [m for m in made if m.op in (op.op, "attention")]
    main = (likely or made)[0]
    place = made.index(main)
    for other in made[:place]:
        yield Row(Change.ADDED, None, other)
    yield Row(Change.SAME if _same(op, main, origin) else Change.CHANGED, op, main)
    for other in made[place + 1 :]:
        yield Row(Change.ADDED, None, other)


def _same(op: Op, made: Op, origin: dict[str, str]) -> bool:
    """The same op on the same values, whatever these are called now."""
    translated = re.sub(r"[A-Za-z_][\w.]*", lambda m: origin.get(m.group(), m.group()), made.args)
    return op.op == made.op and op.args == translated
