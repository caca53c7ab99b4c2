"""Which page goes first when room is needed. A policy is an order over two counters; nothing else."""

from __future__ import annotations

import difflib
import heapq
import random
from typing import Generic, Protocol, TypeVar


class Entry(Protocol):
    """What a policy may look at."""

    last_use: int
    uses: int


E = TypeVar("E", bound=Entry)


class Policy(Generic[E]):
    """A set of entries from which `pop` takes the one of lowest rank; entries of equal rank leave in order of arrival.

    The counters of an entry may change only while it is outside the set. Every method is O(log n), amortised.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], int, E]] = []
        self._ticket: dict[E, int] = {}
        self._tickets = 0

    def rank(self, entry: E) -> tuple[float, ...]:
        """The order; the lowest goes first."""
        raise NotImplementedError

    def add(self, entry: E) -> None:
        """Put an entry into the set, or rank it anew."""
        self._tickets += 1
        heapq.heappush(self._heap, (self.rank(entry), self._tickets, entry))
        self._ticket[entry] = self._tickets  # last: what has a ticket is on the heap, whatever breaks this off
        # Entries leave the heap lazily; without this a cache that never evicts would keep all of them.
        if len(self._heap) > 2 * len(self._ticket) + 64:
            self._heap = [item for item in self._heap if self._ticket.get(item[2]) == item[1]]
            heapq.heapify(self._heap)

    def discard(self, entry: E) -> None:
        """Take an entry out of the set, if it is there."""
        self._ticket.pop(entry, None)

    def pop(self) -> E:
        """Take out the entry that should be evicted first.

        Raises:
            KeyError: the set is empty.
        """
        while self._heap:
            _, ticket, entry = self._heap[0]
            found = self._ticket.get(entry) == ticket
            if found:
                del self._ticket[entry]
            heapq.heappop(self._heap)
            if found:
                return entry
        raise KeyError("nothing to evict")

    def __len__(self) -> int:
        return len(self._ticket)

    def __contains__(self, entry: object) -> bool:
        return entry in self._ticket


class LRU(Policy[E]):
    """Least recently used first."""

    def rank(self, entry: E) -> tuple[float, ...]:
        return (entry.last_use,)


class LFU(Policy[E]):
    """Least often used first; among equals, the least recently used."""

    def rank(self, entry: E) -> tuple[float, ...]:
        return (entry.uses, entry.last_use)


class Random(Policy[E]):
    """In an order that depends on the seed only."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def rank(self, entry: E) -> tuple[float, ...]:
        return (self._random.random(),)


POLICIES: dict[str, type[Policy[Entry]]] = {"lfu": LFU, "lru": LRU, "random": Random}


def policy_class(name: str) -> type[Policy[Entry]]:
    """The policy of that name.

    Raises:
        TypeError: the name is not a string.
        ValueError: there is none; the message names the nearest.
    """
    if not isinstance(name, str):
        raise TypeError(f"policy must be a str, not {type(name).__name__}: {name!r}")
    if name in POLICIES:
        return POLICIES[name]
    near = difflib.get_close_matches(name.lower(), POLICIES, n=1, cutoff=0.0)
    raise ValueError(f"there is no eviction policy {name!r}; did you mean {near[0]!r}? ({', '.join(POLICIES)})")
