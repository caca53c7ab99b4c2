"""What the runtime gets for one call: where rows are, where new rows go, and one end."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy
import torch
from numpy.typing import NDArray

from kvpass.cache.bundles import Flight
from kvpass.cache.plan import write_offsets
from kvpass.cache.pools import SlotSpec

if TYPE_CHECKING:
    from kvpass.cache.store import Cache


class SlotTable:
    """The slots of one program, as `Cache.register` returns it. Keep it as long as the program."""

    __slots__ = ("__weakref__", "cache", "slots")

    def __init__(self, cache: Cache, slots: tuple[SlotSpec, ...]) -> None:
        self.cache = cache
        self.slots = slots

    def __len__(self) -> int:
        return len(self.slots)


class SlotView(NamedTuple):
    """One slot in one call. All tensors are on the slot's device; slots of one bundle share the last three."""

    pool: torch.Tensor
    """`[pages, *before, page_size, *after]`. Row `i` of batch row `b` is in page `block_table[b, i // page_size]`."""
    block_table: torch.Tensor
    """int32 `[B, ceil(S / page_size)]`."""
    write_page: torch.Tensor
    """int64 `[B * (S - start)]`, batch row by batch row: the page of each new row; 0, the scratch page, if it is not
    to be stored."""
    write_offset: torch.Tensor
    """int64 `[B * (S - start)]`: the row within that page."""


class _Tables:
    """The tables of one part, on the host, and on each device that asked."""

    __slots__ = ("_host", "_on")

    def __init__(self, host: tuple[NDArray[numpy.int32], NDArray[numpy.int64], NDArray[numpy.int64]]) -> None:
        self._host = host
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = self._on.get(device)
        if found is None:
            block_table, page, offset = (torch.from_numpy(array).to(device) for array in self._host)
            found = self._on[device] = (block_table, page, offset)
        return found


class Lease:
    """The pages of one call, pinned until `commit` or `abort`, of which exactly one is called, once.

    As a context manager it commits at the end of the block and aborts on an exception, unless the block ended it itself.
    """

    def __init__(self, cache: Cache, table: SlotTable, flight: Flight, reason: str, where: tuple[int, ...]) -> None:
        self._cache = cache
        self._slots = table.slots
        self._flight = flight
        self._where = where
        self.start = flight.start
        """The first row that the call has to compute."""
        self.length = flight.length
        """All rows of each sequence."""
        self.batch = flight.batch
        self.stored = flight.stored
        """False if there was no room: nothing is held, `start` is 0 and the call runs without the cache."""
        self.reason = reason
        """Why `stored` is False, as a sentence; otherwise empty."""
        self.pools: tuple[torch.Tensor, ...] = ()
        """One per slot, in the order of registration."""
        self._tables: list[_Tables] = []
        if self.stored:
            bundles = [part.bundle for part in flight.parts]
            pairs = zip(self._slots, where, strict=True)
            self.pools = tuple(bundles[index].pools[spec.identity].tensor for spec, index in pairs)
            size = cache.page_size
            offsets = write_offsets(self.batch, self.start, self.length, size)
            for part in flight.parts:
                pages = part.plan.write_pages(self.start, self.length, size)
                self._tables.append(_Tables((part.plan.block_table(), pages, offsets)))

    def slot(self, index: int) -> SlotView:
        """The pool and the tables of slot `index`.

        Raises:
            RuntimeError: the call is not stored.
        """
        if not self.stored:
            raise RuntimeError(f"this call runs without the cache: {self.reason}")
        return SlotView(self.pools[index], *self._tables[self._where[index]].on(self._slots[index].device))

    def commit(self) -> None:
        """Make the new rows visible and unpin.

        Raises:
            RuntimeError: the lease has ended already.
        """
        self._cache._end(self._flight, publish=True)

    def abort(self) -> None:
        """Give the new pages back and unpin: the cache is as before, less what had to be evicted.

        Raises:
            RuntimeError: the lease has ended already.
        """
        self._cache._end(self._flight, publish=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._flight.open:
            self._cache._end(self._flight, publish=kind is None)

    def __del__(self) -> None:
        # Any thread may get here, even one that holds the cache's lock: leave the flight for the next call to end.
        if self._flight.open:
            self._cache._lost.append(self._flight)
