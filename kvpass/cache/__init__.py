"""Pages, prefix tree, eviction, pools: rows that programs have computed, found again by content."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpass.cache.lease import Lease, SlotTable, SlotView
    from kvpass.cache.pools import SlotSpec
    from kvpass.cache.stats import CacheStats, SlotStats
    from kvpass.cache.store import Cache

__all__ = ["Cache", "CacheStats", "Lease", "SlotSpec", "SlotStats", "SlotTable", "SlotView"]

_HOME = {
    "Cache": "store",
    "CacheStats": "stats",
    "Lease": "lease",
    "SlotSpec": "pools",
    "SlotStats": "stats",
    "SlotTable": "lease",
    "SlotView": "lease",
}


def __getattr__(name: str) -> object:
    """Import on first use: the bookkeeping is to be had without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
