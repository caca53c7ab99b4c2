"""The tensors that rows live in."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from kvpass.cache.blocks import PageId

_LINUX_NORESERVE = 0x4000  # mmap.MAP_NORESERVE, which Python knows from 3.13 on
HUGE_PAGE = 2 * 2**20  # bytes of a huge page
_SMALL = 2 * HUGE_PAGE  # bytes of a head's rows from which on they may stand in huge pages


@dataclass(frozen=True)
class SlotSpec:
    """One value that is stored per row.

    A row has shape `before + after`; the pool of the slot has shape `[*before, pages, page_size, *after]`. For the keys
    of an attention `before` is `(K,)` and `after` is `(D,)`: pages that follow each other are one table per head.
    Slots with the same `identity` (32 bytes) hold the same rows, whichever program computed them. `name` is for people.

    Raises:
        ValueError: an identity that is not 32 bytes, or a dimension below one.
    """

    identity: bytes
    before: tuple[int, ...]
    after: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    name: str

    def __post_init__(self) -> None:
        if len(self.identity) != 32:
            raise ValueError(f"the identity of slot {self.name!r} must be 32 bytes, but it is {self.identity!r}")
        if any(size < 1 for size in self.before + self.after):
            raise ValueError(f"slot {self.name!r} has a row of shape {self.before + self.after}: nothing to store")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.before + self.after) * self.dtype.itemsize

    @property
    def storage(self) -> tuple[Any, ...]:
        """What two slots of one identity must agree on."""
        return (self.before, self.after, self.dtype, self.device)


class Pool:
    """The rows of one slot, `tensor` of shape `[*before, pages, page_size, *after]`.

    `raw` is the same memory as bytes, `[prod(before), pages, page_size * bytes of after]`: a numpy array on the CPU,
    where it is several times faster than torch for small copies, and a tensor elsewhere. On the CPU the pool is
    reserved at its full size at once, and the operating system provides memory when a page is first touched. Elsewhere
    it grows, so `tensor` and `raw` may be replaced.
    """

    def __init__(self, spec: SlotSpec, page_size: int, *, reserve: bool | None = None) -> None:
        self.spec = spec
        self.page_size = page_size
        self.reserve = spec.device.type == "cpu" if reserve is None else reserve
        self.stride = math.prod(spec.after) * spec.dtype.itemsize
        """Bytes from row to row on the last axis of `raw`."""
        self.parts = math.prod(spec.before)
        """How many places of the memory a page is spread over."""
        self.pages = 0
        self.tensor: torch.Tensor = torch.empty(0)
        self.raw: Any = None
        self._map: mmap.mmap | None = None

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.spec.row_bytes * self.page_size

    def grow(self, pages: int, limit: int) -> None:
        """Have at least `pages` pages, and at most `limit`; old pages keep their contents.

        Raises:
            MemoryError: the device has not enough; the pool is as it was.
        """
        if pages <= self.pages:
            return
        pages = limit if self.reserve else min(limit, max(pages, 2 * self.pages))
        try:
            # The pool outlives this call, and a tensor made in inference mode could not be written to outside it.
            with torch.inference_mode(False), torch.no_grad():
                flat, memory = self._allocate(pages * self.page_bytes)
                shape = (*self.spec.before, pages, self.page_size, *self.spec.after)
                tensor = flat.view(self.spec.dtype).view(shape)
                raw: Any = flat.view(self.parts, pages, -1)
                raw = raw.numpy() if self.spec.device.type == "cpu" else raw
                if self.pages:
                    raw[:, : self.pages] = self.raw
        except (RuntimeError, OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"no memory for {pages} pages of slot {self.spec.name!r}: {error}") from error
        self.pages, self.tensor, self.raw, self._map = pages, tensor, raw, memory

    def _allocate(self, size: int) -> tuple[torch.Tensor, mmap.mmap | None]:
        if not self.reserve:
            return torch.empty(size, dtype=torch.uint8, device=self.spec.device), None
        if not hasattr(mmap, "MAP_PRIVATE"):
            return torch.frombuffer(memory := mmap.mmap(-1, size), dtype=torch.uint8), memory
        # Python's default is a shared mapping, and the memory of a shared mapping is not given back by MADV_DONTNEED.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_LINUX_NORESERVE if sys.platform == "linux" else 0)
        memory = mmap.mmap(-1, size, flags=flags)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self._advise(memory, flat.data_ptr(), size)
        return flat, memory

    def _advise(self, memory: mmap.mmap, base: int, size: int) -> None:
        """Ask for huge pages: rows in random order miss the TLB, and a read of long contexts gains 3 to 9 %.

        A huge page is provided whole. So the first rows of each head are left out, and what is provided in vain is at
        most half of what is in use.
        """
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        each = size // self.parts
        for part in range(self.parts):
            start = -(-(base + part * each + _SMALL) // HUGE_PAGE) * HUGE_PAGE - base
            stop = (base + (part + 1) * each) // HUGE_PAGE * HUGE_PAGE - base
            if start < stop:
                with contextlib.suppress(OSError):  # a kernel that was built without them
                    memory.madvise(mmap.MADV_HUGEPAGE, start, stop - start)

    def release(self, pages: Sequence[PageId]) -> None:
        """Give the memory of these pages (in ascending order) back to the operating system, where that can be done.

        A page of the operating system that a page in use shares stays.
        """
        if self._map is None or not pages or not hasattr(mmap, "MADV_DONTNEED"):
            return
        breaks = [i for i, (left, right) in enumerate(pairwise(pages), 1) if right != left + 1]
        size = self.stride * self.page_size
        for first, last in zip([0, *breaks], [*breaks, len(pages)], strict=True):
            for part in range(0, self.parts * self.pages, self.pages):
                start = -(-(part + pages[first]) * size // mmap.PAGESIZE) * mmap.PAGESIZE
                stop = (part + pages[last - 1] + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
                if start < stop:
                    self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def poison_byte(dtype: torch.dtype) -> int:
    """A byte that, repeated, is NaN in a floating dtype and garbage in any other."""
    if dtype == torch.bool:
        return 0x01  # any other byte would not be a bool
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0x7F
    return 0x80 if "fnuz" in str(dtype) else 0xFF
