"""Page ids and the byte budget: plain bookkeeping, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NewType

PageId = NewType("PageId", int)

SCRATCH = PageId(0)
"""Takes the writes of rows that need not be stored; is never handed out and never read."""


@dataclass(slots=True)
class Budget:
    """Bytes in pages that are handed out, over all bundles. `idle` of them belong to nodes that nobody uses."""

    capacity: int
    used: int = 0
    idle: int = 0

    def fits(self, size: int) -> bool:
        """Whether `size` more bytes can be had, evicting every idle page if need be."""
        return self.used - self.idle + size <= self.capacity


@dataclass(slots=True)
class PageSpace:
    """The page ids that the slots of one bundle share. Ids `1 .. fresh - 1` have been handed out at some time."""

    budget: Budget
    page_bytes: int
    fresh: int = 1
    free: set[PageId] = field(default_factory=set)
    order: list[PageId] = field(default_factory=list)
    """A heap of the free pages, and of some that are no longer free."""
    dirty: set[PageId] = field(default_factory=set)
    """Free pages whose memory the operating system has not got back yet."""

    @property
    def used(self) -> int:
        """Pages handed out."""
        return self.fresh - 1 - len(self.free)

    @property
    def limit(self) -> int:
        """Pages there would be, the scratch page not counted, if this bundle had the whole budget."""
        return self.budget.capacity // self.page_bytes

    def take(self, after: PageId = SCRATCH) -> PageId:
        """Hand out one page, the one that follows ``after`` if it is free. The caller has made room in the budget.

        A sequence whose pages follow each other is read in place.

        Raises:
            MemoryError: the budget has no room.
        """
        if self.budget.used + self.page_bytes > self.budget.capacity:
            raise MemoryError("no room was made in the budget for this page")
        self.budget.used += self.page_bytes
        page = PageId(after + 1)
        if after == SCRATCH or page not in self.free:
            while self.order and self.order[0] not in self.free:
                heappop(self.order)
            page = self.order[0] if self.order else PageId(self.fresh)
        self.free.discard(page)
        self.dirty.discard(page)
        self.fresh = max(self.fresh, page + 1)
        return page

    def give(self, page: PageId) -> None:
        """Take a page back."""
        self.budget.used -= self.page_bytes
        self.free.add(page)
        heappush(self.order, page)
        if len(self.order) > 2 * len(self.free) + 16:
            self.order = sorted(self.free)
        self.dirty.add(page)

    def forget(self, pages: int) -> None:
        """There turned out to be no memory for page ids `pages` and up, none of which is handed out."""
        self.free = {page for page in self.free if page < pages}
        self.order = sorted(self.free)
        self.dirty = {page for page in self.dirty if page < pages}
        self.fresh = min(self.fresh, max(pages, 1))

    def take_dirty(self) -> list[PageId]:
        """The free pages whose memory should go back to the operating system now, in order."""
        pages = sorted(self.dirty)
        self.dirty.clear()
        return pages

    def split(self, page_bytes: int) -> PageSpace:
        """Move `page_bytes` of every page to a new space in which the same ids are free and handed out."""
        self.page_bytes -= page_bytes
        return PageSpace(self.budget, page_bytes, self.fresh, set(self.free), list(self.order), set(self.dirty))
