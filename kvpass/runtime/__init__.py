"""One compiled program and one cache: match, run, commit."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvpass.forked import in_child

if TYPE_CHECKING:
    from kvpass.cache import Cache

_lock = threading.Lock()
_default: Cache | None = None


def default_cache() -> Cache:
    """The process-wide cache, made at first use: 1 GiB, pages of 64 rows, LRU."""
    global _default
    with _lock:
        if _default is None:
            from kvpass.cache import Cache

            _default = Cache()
        return _default


def _forked() -> None:
    global _lock
    _lock = threading.Lock()


in_child(_forked)

__all__ = ["default_cache"]
