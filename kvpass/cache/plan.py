"""Which pages a call reads, extends, copies and writes: decided from a match, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray

from kvpass.cache.blocks import SCRATCH, PageId
from kvpass.cache.prefix import Chain, Digest, Match, Node


@dataclass(slots=True, eq=False)
class NewPage:
    """Rows `held .. filled - 1` of page `index` of batch row `batch`: the rows that a call adds to one page."""

    batch: int
    index: int
    before: Digest
    digest: Digest | None
    rows: bytes
    filled: int
    held: int = 0
    source: Node | None = None
    """Where rows `0 .. held - 1` are."""
    extends: bool = False
    """The page of `source` is written on, rather than copied."""
    page: PageId = SCRATCH


@dataclass(slots=True)
class Plan:
    """The pages of one call in one bundle. `table[b][i]` is the page that holds page `i` of batch row `b`."""

    table: list[list[Node | NewPage]] = field(default_factory=list)
    fresh: list[NewPage] = field(default_factory=list)
    """In an order in which every page comes after the page before it."""
    held: int = 0
    """Rows that every batch row finds in the cache."""
    pins: list[Node] = field(default_factory=list)

    @property
    def pages(self) -> int:
        """Pages that must be allocated."""
        return sum(not new.extends for new in self.fresh)

    @property
    def distinct(self) -> int:
        """Pages that the call needs to be there at once."""
        entries = (entry for row in self.table for entry in row)
        return len({id(entry.source if isinstance(entry, NewPage) and entry.extends else entry) for entry in entries})

    def block_table(self) -> NDArray[numpy.int32]:
        """Page ids, int32 `[B, ceil(S / page_size)]`."""
        return numpy.array([[entry.page for entry in row] for row in self.table], dtype=numpy.int32)

    def run(self) -> int:
        """The first page of a single sequence whose pages follow each other in memory, or -1."""
        if len(self.table) != 1:
            return -1
        first = self.table[0][0].page
        together = all(entry.page == page for page, entry in enumerate(self.table[0], first))
        return first if together else -1

    def write_rows(self, start: int, length: int, page_size: int) -> NDArray[numpy.int64]:
        """Where each row from `start` on goes, counted in rows of the pool: int64 `[B * (length - start)]`.

        A row that is not stored goes to the scratch page.
        """
        rows = numpy.tile(numpy.arange(start, length, dtype=numpy.int64) % page_size, (len(self.table), 1))
        for new in self.fresh:
            first = new.index * page_size - start
            rows[new.batch, first + new.held : first + new.filled] += new.page * page_size
        return rows.reshape(-1)


def plan_pages(chains: Sequence[Chain], matches: Sequence[Match], page_size: int, *, copy: bool) -> Plan:
    """Plan one bundle. Without `copy`, rows that would have to be copied into a new page are computed again instead.

    Batch rows that begin with the same whole pages, or are equal, share what is new too: the first one writes it.
    """
    plan = Plan()
    known: dict[tuple[Digest, bytes], NewPage] = {}
    pins: dict[Node, None] = {}
    extended: set[Node] = set()
    for batch, (chain, match) in enumerate(zip(chains, matches, strict=True)):
        held = match.length(page_size)
        row: list[Node | NewPage] = [*match.nodes]
        pins.update(dict.fromkeys(match.nodes))
        if held == chain.length and match.tail is not None:
            row.append(match.tail)
            pins[match.tail] = None
        first = len(row)
        for index in range(first, -(-chain.length // page_size)):
            new = known.get((chain.before(index), chain.page(index)))
            if new is None:
                new = _new_page(chain, index, batch, page_size)
                if index == first and match.tail is not None:
                    _join(new, match.tail, match.tail_rows, page_size, extended, copy=copy)
                if new.source is not None:
                    pins[new.source] = None
                known[new.before, new.rows] = new
                plan.fresh.append(new)
            if index == first:
                held = index * page_size + new.held
            row.append(new)
        plan.held = held if batch == 0 else min(plan.held, held)
        plan.table.append(row)
    plan.pins = list(pins)
    return plan


def _new_page(chain: Chain, index: int, batch: int, page_size: int) -> NewPage:
    filled = min(page_size, chain.length - index * page_size)
    digest = chain.before(index + 1) if filled == page_size else None
    return NewPage(batch, index, chain.before(index), digest, chain.page(index), filled)


def _join(new: NewPage, tail: Node, rows: int, page_size: int, extended: set[Node], *, copy: bool) -> None:
    """Let a new page begin with the rows of the page in which the match ended."""
    free = tail.writer is None and tail not in extended
    new.extends = free and tail.filled == rows and rows < page_size
    if new.extends or copy:
        new.source, new.held = tail, rows
    if new.extends:
        new.page = tail.page
        extended.add(tail)
