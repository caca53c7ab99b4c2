"""What a cache did and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvpass.cache.capacity import format_bytes


@dataclass(frozen=True)
class SlotStats:
    """What is held under one slot name."""

    pages: int
    rows: int
    bytes: int


@dataclass(frozen=True)
class CacheStats:
    """Counters since the cache was made, and what it holds now. Rows are counted per batch row, once per call.

    `pages_used`, `pages_pinned` and `bytes_used` include the pages of calls in flight; a page of a bundle of slots
    counts as one page.
    """

    lookups: int
    rows_reused: int
    rows_computed: int
    bytes_used: int
    bytes_capacity: int
    pages_used: int
    pages_pinned: int
    evictions: int
    by_slot: Mapping[str, SlotStats]

    @property
    def hit_rate(self) -> float:
        """Rows reused over all rows that were asked for; 0 before the first call."""
        rows = self.rows_reused + self.rows_computed
        return self.rows_reused / rows if rows else 0.0

    def __str__(self) -> str:
        lines = [
            f"look-ups       {self.lookups}",
            f"rows           {self.rows_reused} reused, {self.rows_computed} computed ({self.hit_rate:.1%} reused)",
            f"memory         {format_bytes(self.bytes_used)} of {format_bytes(self.bytes_capacity)}",
            f"pages          {self.pages_used} used, {self.pages_pinned} pinned, {self.evictions} evicted",
        ]
        alike: dict[SlotStats, list[str]] = {}
        for name, slot in self.by_slot.items():
            alike.setdefault(slot, []).append(name)
        for slot, names in alike.items():
            who = names[0] if len(names) == 1 else f"{len(names)} slots, {names[0]} .."
            lines.append(f"  {who:<28} {slot.rows} rows, {slot.pages} pages, {format_bytes(slot.bytes)} each")
        return "\n".join(lines)
