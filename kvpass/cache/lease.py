"""What the runtime gets for one call: where rows are, where new rows go, and one end."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from kvpass.cache.bundles import Bundle, Flight
from kvpass.cache.pools import Pool, SlotSpec

if TYPE_CHECKING:
    from kvpass.cache.store import Cache


class SlotTable:
    """The slots of one program, as `Cache.register` returns it. Keep it as long as the program."""

    __slots__ = ("__weakref__", "bundles", "cache", "groups", "pools", "slots", "where")

    def __init__(self, cache: Cache, slots: tuple[SlotSpec, ...]) -> None:
        self.cache = cache
        self.slots = slots
        self.bundles: tuple[Bundle, ...] = ()
        self.pools: tuple[Pool, ...] = ()
        self.groups: tuple[tuple[int, torch.device], ...] = ()
        """A bundle and a device: the slots that share tables."""
        self.where: tuple[int, ...] = ()
        """The group of each slot."""

    def arrange(self, home: Mapping[bytes, Bundle]) -> None:
        """Learn the bundles of the slots; a bundle that is split makes this necessary again."""
        homes = [home[spec.identity] for spec in self.slots]
        self.bundles = tuple(dict.fromkeys(homes))
        self.pools = tuple(bundle.pools[spec.identity] for bundle, spec in zip(homes, self.slots, strict=True))
        pairs = zip(homes, self.slots, strict=True)
        keys = [(self.bundles.index(bundle), spec.device) for bundle, spec in pairs]
        self.groups = tuple(dict.fromkeys(keys))
        self.where = tuple(self.groups.index(key) for key in keys)

    def __len__(self) -> int:
        return len(self.slots)


class SlotView(NamedTuple):
    """One slot in one call. All tensors are on the slot's device; slots of one bundle share the last three."""

    pool: torch.Tensor
    """`[*before, pages, page_size, *after]`. Row `i` of batch row `b` is in page `block_table[b, i // page_size]`."""
    block_table: torch.Tensor
    """int32 `[B, ceil(S / page_size)]`."""
    run: int
    """The first page, where there is one sequence and its pages follow each other: it is then one table. Else -1."""
    write_row: torch.Tensor
    """int64 `[B * (S - start)]`, batch row by batch row: `page * page_size + offset` of each new row; in page 0, the
    scratch page, if it is not to be stored."""


_Views = tuple[torch.Tensor, int, torch.Tensor]


class Lease:
    """The pages of one call, pinned until `commit` or `abort`, of which exactly one is called, once.

    As a context manager it commits at the end of the block and aborts on an exception, unless the block ended it.
    """

    def __init__(self, cache: Cache, table: SlotTable, flight: Flight, reason: str) -> None:
        self._flight = flight
        self._cache = cache
        self._where = table.where
        self._groups = table.groups
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
        self._views: list[_Views | None] = [None] * len(self._groups)
        # A flight's parts may be split while the call runs; its page ids stay what they are now.
        self._plans = [part.plan for part in flight.parts]
        if self.stored:
            self.pools = tuple([pool.tensor for pool in table.pools])

    def slot(self, index: int) -> SlotView:
        """The pool and the tables of slot `index`.

        Raises:
            RuntimeError: the call is not stored.
        """
        if not self.stored:
            raise RuntimeError(f"this call runs without the cache: {self.reason}")
        group = self._where[index]
        return SlotView(self.pools[index], *(self._views[group] or self._make_views(group)))

    def arguments(self) -> list[Any]:
        """The fields of all slots, one behind the other."""
        views = [held or self._make_views(group) for group, held in enumerate(self._views)]
        out: list[Any] = []
        for pool, group in zip(self.pools, self._where, strict=True):
            out += (pool, *views[group])
        return out

    def _make_views(self, group: int) -> _Views:
        bundle, device = self._groups[group]
        plan, size = self._plans[bundle], self._cache.page_size
        block_table = torch.from_numpy(plan.block_table()).to(device)
        rows = torch.from_numpy(plan.write_rows(self.start, self.length, size)).to(device)
        self._views[group] = views = (block_table, plan.run(), rows)
        return views

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
