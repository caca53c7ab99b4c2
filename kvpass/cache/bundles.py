"""Slots that are used together share page ids: a bundle. A call in flight holds a part of each bundle that it uses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvpass.cache.blocks import SCRATCH, Budget, PageId, PageSpace
from kvpass.cache.plan import NewPage, Plan
from kvpass.cache.pools import Pool, SlotSpec, poison_byte
from kvpass.cache.prefix import Node, Tree, twin
from kvpass.cache.residents import Residents


@dataclass(slots=True, eq=False)
class Part:
    """What one call in flight holds of one bundle."""

    bundle: Bundle
    plan: Plan
    raws: Mapping[bytes, Any]
    """The memory that the call writes to; a pool that grows later has other memory."""


@dataclass(slots=True, eq=False)
class Flight:
    """One call between `begin` and `commit` or `abort`.

    Attributes:
        lease: a weak reference to what the caller holds; None before there is one.
        thread: that began it, and ends it.
    """

    batch: int
    length: int
    epoch: int
    start: int = 0
    parts: list[Part] = field(default_factory=list)
    open: bool = True
    stored: bool = False
    lease: Callable[[], object] | None = None
    thread: int = field(default_factory=threading.get_ident)

    @property
    def lost(self) -> bool:
        """Whether its lease was dropped without an end."""
        return self.lease is not None and self.lease() is None


@dataclass(slots=True, eq=False)
class Bundle:
    """A set of slots with one space of page ids and one prefix tree."""

    slots: dict[bytes, SlotSpec]
    space: PageSpace
    tree: Tree
    pools: dict[bytes, Pool]
    poison: bool = False
    pages: int = 0
    """Pages that every pool has, the scratch page included."""
    raws: Mapping[bytes, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, specs: Iterable[SlotSpec], budget: Budget, page_size: int, *, poison: bool) -> Bundle:
        """An empty bundle; its pools have no memory yet."""
        slots = {spec.identity: spec for spec in specs}
        space = PageSpace(budget, page_size * sum(spec.row_bytes for spec in slots.values()))
        pools = {identity: Pool(spec, page_size) for identity, spec in slots.items()}
        return cls(slots, space, Tree(page_size, space), pools, poison)

    def take(self, plan: Plan, flight: Flight) -> None:
        """Give the new pages of a plan their ids, and memory with what they begin with.

        Raises:
            MemoryError: a device has no memory; pages that were given ids are the caller's to give back.
        """
        for new in plan.fresh:
            if new.extends and new.source is not None:
                new.source.writer = flight
            else:
                new.page = self.space.take(plan.table[new.batch][new.index - 1].page if new.index else SCRATCH)
        if self.space.fresh > self.pages:
            self._grow()
        owned = [new.page for new in plan.fresh if not new.extends]
        if self.poison and owned:
            self._poison(owned)
        self._copy(plan)

    def _copy(self, plan: Plan) -> None:
        """Begin new pages with the rows of the page that they branch from; branches of one page all at once."""
        copies: dict[tuple[PageId, int], list[PageId]] = {}
        for new in plan.fresh:
            if new.held and not new.extends and new.source is not None:
                copies.setdefault((new.source.page, new.held), []).append(new.page)
        for (source, held), pages in copies.items():
            for identity, pool in self.pools.items():
                raw, rows = self.raws[identity], slice(0, held * pool.stride)
                raw[:, pages, rows] = raw[:, source, None, rows]

    def _grow(self) -> None:
        first = self.pages == 0
        try:
            for pool in self.pools.values():
                pool.grow(self.space.fresh, self.space.limit + 1)
        finally:
            # A new mapping, never the old one changed: calls in flight hold the old one.
            self.raws = {identity: pool.raw for identity, pool in self.pools.items()}
        self.pages = min(pool.pages for pool in self.pools.values())
        if first and self.poison:
            self._poison([SCRATCH])

    def _poison(self, pages: list[PageId]) -> None:
        for identity, raw in self.raws.items():
            raw[:, pages] = poison_byte(self.slots[identity].dtype)

    def publish(self, part: Part, residents: Residents) -> None:
        """Make the rows of a call visible; pages whose rows somebody else has stored meanwhile are given back."""
        added: list[Node] = []
        for new in part.plan.fresh:
            present = self.tree.find(new.before, new.rows) is not None
            if not present and part.raws is not self.raws:
                self._carry_over(new, part.raws)
            if new.extends and new.source is not None:
                new.source.writer = None
                if not present:
                    self.tree.extend(new.source, new.digest, new.rows, new.filled)
            elif present:
                self.space.give(new.page)
            else:
                node = self.tree.insert(new.before, new.digest, new.rows, new.filled, new.page)
                residents.adopt(node)
                added.append(node)
        for node in added:
            residents.offer(node)

    def _carry_over(self, new: NewPage, written: Mapping[bytes, Any]) -> None:
        """A pool grew while the call ran: the call's rows are in the old memory."""
        first = new.held if new.extends else 0
        for identity, raw in self.raws.items():
            if raw is not written[identity]:
                stride = self.pools[identity].stride
                rows = slice(first * stride, new.filled * stride)
                raw[:, new.page, rows] = written[identity][:, new.page, rows]

    def discard(self, part: Part) -> None:
        """Give back what a call took. Pages without an id were never taken."""
        for new in part.plan.fresh:
            if new.extends and new.source is not None:
                new.source.writer = None
            elif new.page != SCRATCH:
                self.space.give(new.page)

    def release_memory(self) -> None:
        """Give the memory of free pages back to the operating system."""
        if self.space.dirty:
            pages = self.space.take_dirty()
            for pool in self.pools.values():
                pool.release(pages)

    def split(self, leaving: set[bytes], flights: Iterable[Flight], residents: Residents) -> Bundle:
        """Move some slots to a new bundle in which every page and every call in flight is as it is here."""
        slots = {identity: self.slots.pop(identity) for identity in leaving}
        pools = {identity: self.pools.pop(identity) for identity in leaving}
        space = self.space.split(self.tree.page_size * sum(spec.row_bytes for spec in slots.values()))
        twins: dict[Node, Node] = {}
        tree = self.tree.clone(space, twins)
        other = Bundle(slots, space, tree, pools, self.poison, self.pages)
        other.raws, self.raws = _split_raws(self.raws, leaving)
        for flight in flights:
            for part in [part for part in flight.parts if part.bundle is self]:
                theirs, part.raws = _split_raws(part.raws, leaving)
                flight.parts.append(Part(other, _twin_plan(part.plan, tree, twins), theirs))
        for node in tree:
            residents.offer(node)
        return other


def _split_raws(raws: Mapping[bytes, Any], leaving: set[bytes]) -> tuple[dict[bytes, Any], dict[bytes, Any]]:
    theirs = {identity: raw for identity, raw in raws.items() if identity in leaving}
    return theirs, {identity: raw for identity, raw in raws.items() if identity not in leaving}


def _twin_plan(plan: Plan, tree: Tree, twins: dict[Node, Node]) -> Plan:
    """The plan with the nodes of another tree. The tables were made when the call began: the page ids are the same."""
    fresh = [
        replace(new, source=None if new.source is None else twin(new.source, tree, twins)) for new in plan.fresh
    ]  # fmt: skip
    return replace(plan, fresh=fresh, pins=[twin(node, tree, twins) for node in plan.pins])
