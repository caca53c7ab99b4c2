"""Page ids and the byte budget: plain bookkeeping, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    free: list[PageId] = field(default_factory=list)
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

    def take(self) -> PageId:
        """Hand out one page. The caller has made room in the budget.

        Raises:
            MemoryError: the budget has no room.
        """
        if self.budget.used + self.page_bytes > self.budget.capacity:
            raise MemoryError("no room was made in the budget for this page")
        self.budget.used += self.page_bytes
        if self.free:
            page = self.free.pop()
            self.dirty.discard(page)
            return page
        self.fresh += 1
        return PageId(self.fresh - 1)

    def give(self, page: PageId) -> None:
        """Take a page back."""
        self.budget.used -= self.page_bytes
        self.free.append(page)
        self.dirty.add(page)

    def forget(self, pages: int) -> None:
        """There turned out to be no memory for page ids `pages` and up, none of which is handed out."""
        self.free = [page for page in self.free if page < pages]
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
        return PageSpace(self.budget, page_bytes, self.fresh, list(self.free), set(self.dirty))
