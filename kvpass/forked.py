"""What a forked child puts right first: of the threads of its parent it has the one that forked.

A lock that another thread held is held for ever, and what another thread was about to do is never done.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from weakref import WeakSet


def in_child(action: Callable[[], object]) -> None:
    """Have this done in every child, before anything else is."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=action)


class Locked:
    """Has a lock, in a child a new one. What it guards must be whole at every bytecode, or say that it is not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _living.add(self)

    def _forked(self) -> None:
        """Forget what other threads had begun."""


_living: WeakSet[Locked] = WeakSet()


def _renew() -> None:
    for owner in list(_living):
        owner._lock = threading.Lock()
        owner._forked()


in_child(_renew)
