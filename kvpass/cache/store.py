"""The cache: look up, lend pages, make new rows visible, evict."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast
from weakref import WeakValueDictionary, ref

from kvpass.cache.audit import audit
from kvpass.cache.blocks import Budget
from kvpass.cache.bundles import Bundle, Flight, Part
from kvpass.cache.capacity import format_bytes, parse_capacity
from kvpass.cache.eviction import Policy, policy_class
from kvpass.cache.lease import Lease, SlotTable
from kvpass.cache.plan import Plan, plan_pages
from kvpass.cache.pools import SlotSpec
from kvpass.cache.prefix import Chain, Match, Node, root_digest
from kvpass.cache.residents import Residents
from kvpass.cache.stats import CacheStats, SlotStats
from kvpass.forked import Locked


class Cache(Locked):
    """Rows that programs have computed, found again by the contents of the inputs. Safe to use from several threads.

    Args:
        capacity: bytes; or a string such as "2GiB", "512MB", "1.5 GiB"; or a float in (0, 1], a fraction of the memory
            that is free now. Pages in use never take more. (One scratch page per slot comes on top.)
        page_size: rows per page.
        policy: what is evicted first: "lru", "lfu" or "random".
        salt: keeps what is stored under it apart from everything stored under another.
        poison: fill fresh pages with NaN, for tests.

    Raises:
        TypeError, ValueError: an argument is malformed; the message says which and how.
    """

    def __init__(
        self,
        capacity: str | float = "1GiB",
        *,
        page_size: int = 64,
        policy: str = "lru",
        salt: str | bytes | None = None,
        poison: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(page_size, bool) or not isinstance(page_size, int):
            raise TypeError(f"page_size must be an int, not {type(page_size).__name__}: {page_size!r}")
        if page_size < 1:
            raise ValueError(f"page_size must be at least one row, but it is {page_size}")
        if salt is not None and not isinstance(salt, str | bytes):
            raise TypeError(f"salt must be a str, bytes or None, not {type(salt).__name__}")
        self.page_size = page_size
        self._policy = policy
        self._poison = poison
        self._salt = salt.encode() if isinstance(salt, str) else salt
        self._budget = Budget(parse_capacity(capacity))
        self._residents = self._nobody()
        self._home: dict[bytes, Bundle] = {}
        self._tables: WeakValueDictionary[tuple[SlotSpec, ...], SlotTable] = WeakValueDictionary()
        self._flights: set[Flight] = set()
        self._epoch = 0
        self._changing = False  # also after a change that was broken off
        self._lookups = self._rows_reused = self._rows_computed = 0

    def register(self, slots: Sequence[SlotSpec]) -> SlotTable:
        """Make slots known. Registering the same slots again returns the same table.

        Raises:
            ValueError: no slots, or a slot whose identity is known with another shape, dtype or device.
        """
        specs = tuple(slots)
        with self._lock:
            self._change()
            table = self._tables.get(specs)
            if table is None:
                self._check_specs(specs)
                self._forget_unused()
                self._refine(specs)
                table = self._tables[specs] = SlotTable(self, specs)
                self._arrange()
            self._changing = False
            return table

    def begin(self, table: SlotTable, keys: Sequence[bytes], width: int, context: bytes, *, limit: int) -> Lease:
        """Find the rows of a batch, and get pages for those that are not held.

        Args:
            keys: for each batch row the bytes of all its rows, `S * width` each.
            context: everything else that the rows depend on.
            limit: `start` of the lease is at most this; less than S, so that at least one row is computed.

        Raises:
            ValueError: malformed arguments. Nothing has changed then.
        """
        length = _check_call(self, table, keys, width, limit)
        root = root_digest(self._salt, context, width, self.page_size)
        distinct = {key: Chain(root, key, width, self.page_size) for key in keys}
        chains = [distinct[key] for key in keys]
        with self._lock:
            self._change()
            self._end_lost()
            self._lookups += 1
            self._residents.clock += 1
            flight = Flight(len(keys), length, self._epoch)
            self._flights.add(flight)
            try:
                reason = self._lend(flight, table.bundles, chains, limit)
                lease = Lease(self, table, flight, reason)
            except BaseException:
                self._land(flight, publish=False)
                raise
            finally:
                self._release_memory()
            flight.lease = ref(lease)
            self._changing = False
            return lease

    def stats(self) -> CacheStats:
        """What the cache did and what it holds now."""
        with self._lock:
            self._change()
            self._end_lost()
            self._changing = False
            by_slot: dict[str, SlotStats] = {}
            bundles = self._bundles()
            for bundle in bundles:
                pages, rows = bundle.space.used, bundle.tree.rows
                for identity, spec in bundle.slots.items():
                    size = pages * bundle.pools[identity].page_bytes
                    old = by_slot.get(spec.name, SlotStats(0, 0, 0))
                    by_slot[spec.name] = SlotStats(old.pages + pages, old.rows + rows, old.bytes + size)
            used = sum(bundle.space.used for bundle in bundles)
            idle = sum(node.pins == 0 for bundle in bundles for node in bundle.tree)
            return CacheStats(
                self._lookups, self._rows_reused, self._rows_computed, self._budget.used, self._budget.capacity,
                used, used - idle, self._residents.evictions, by_slot,
            )  # fmt: skip

    def clear(self) -> None:
        """Drop everything. Calls in flight keep their pages until they end, and what they compute is not stored."""
        with self._lock:
            self._change()
            self._end_lost()
            self._epoch += 1
            for bundle in self._bundles():
                for node in bundle.tree.clear():
                    self._residents.bury(node)
            self._release_memory()
            self._changing = False

    def __len__(self) -> int:
        """Rows held. Slots that are never used apart count as one row."""
        with self._lock:
            return sum(bundle.tree.rows for bundle in self._bundles())

    def __bool__(self) -> bool:
        return True  # an empty cache is still a cache: `cache or default` must not lose it

    def __copy__(self) -> Cache:
        return self

    def __deepcopy__(self, memo: object) -> Cache:
        return self  # whoever copies the options of `torch.compile` means this cache, not another

    def __repr__(self) -> str:
        used, capacity = format_bytes(self._budget.used), format_bytes(self._budget.capacity)
        return f"<kvpass.Cache {used} of {capacity}, {len(self)} rows, policy={self._policy!r}>"

    def _lend(self, flight: Flight, bundles: Sequence[Bundle], chains: list[Chain], limit: int) -> str:
        """Give a flight its parts, or return the reason why not."""
        residents = self._residents
        found = [{chain: bundle.tree.match(chain) for chain in set(chains)} for bundle in bundles]
        plans: list[Plan] = []
        # A page to be copied needs a page more than the sequence has. Where that is too much, compute its rows again.
        for copy in (True, False):
            plans = [self._plan(chains, matches, copy=copy) for matches in found]
            for plan in plans:
                for node in plan.pins:
                    residents.pin(node)
            flight.parts = [Part(bundle, plan, {}) for bundle, plan in zip(bundles, plans, strict=True)]
            need = sum(part.plan.pages * part.bundle.space.page_bytes for part in flight.parts)
            if self._budget.fits(need):
                break
            self._drop_parts(flight)
        else:
            return self._why_not(flight, bundles, plans)
        residents.make_room(need)
        try:
            for part in flight.parts:
                part.bundle.take(part.plan, flight)
                part.raws = part.bundle.raws
        except MemoryError as error:
            self._drop_parts(flight)
            for bundle in bundles:
                bundle.space.forget(bundle.pages)  # or every later call would ask for this memory again
            return str(error)
        flight.start = min(limit, *(part.plan.held for part in flight.parts))
        flight.stored = True
        return ""

    def _plan(self, chains: list[Chain], matches: dict[Chain, Match], *, copy: bool) -> Plan:
        return plan_pages(chains, [matches[chain] for chain in chains], self.page_size, copy=copy)

    def _why_not(self, flight: Flight, bundles: Sequence[Bundle], plans: list[Plan]) -> str:
        pairs = list(zip(bundles, plans, strict=True))
        needed = sum(plan.distinct * bundle.space.page_bytes for bundle, plan in pairs)
        capacity = self._budget.capacity
        who, verb = ("a sequence", "needs") if flight.batch == 1 else (f"{flight.batch} sequences", "need")
        what = f"{who} of {flight.length} rows {verb} {format_bytes(needed)}"
        if needed > capacity:
            return f"{what}; the cache holds {format_bytes(capacity)}"
        busy = format_bytes(self._budget.used - self._budget.idle)
        return f"{what}; other calls are using {busy} of the {format_bytes(capacity)} that the cache holds"

    def _end(self, flight: Flight, *, publish: bool) -> None:
        with self._lock:
            if not flight.open:
                raise RuntimeError("this lease has ended: commit or abort it once")
            self._change()
            self._land(flight, publish=publish)
            if publish:
                self._rows_reused += flight.batch * flight.start
                self._rows_computed += flight.batch * (flight.length - flight.start)
            self._release_memory()
            self._changing = False

    def _land(self, flight: Flight, *, publish: bool) -> None:
        flight.open = False
        self._flights.discard(flight)
        if publish and flight.epoch == self._epoch:
            for part in flight.parts:
                part.bundle.publish(part, self._residents)
                for node in reversed(part.plan.pins):
                    self._residents.unpin(node)
            flight.parts = []
        else:
            self._drop_parts(flight)

    def _drop_parts(self, flight: Flight) -> None:
        for part in flight.parts:
            part.bundle.discard(part)
            for node in reversed(part.plan.pins):
                self._residents.unpin(node)
        flight.parts = []

    def _end_lost(self) -> None:
        """Abort leases that were dropped without an end."""
        for flight in [flight for flight in self._flights if flight.lost]:
            self._land(flight, publish=False)

    def _forked(self) -> None:
        for flight in self._flights:
            if flight.lease is not None and flight.thread != threading.get_ident():
                flight.lease = _dropped

    def _change(self) -> None:
        """Begin a change, of which whoever holds the lock says the end.

        An interrupt may break one off at any bytecode. What it leaves is looked at here, and made anew where it is not
        whole: rows are lost then, which costs time. Calls in flight keep the memory that they have, until they end.
        """
        if self._changing and not self._whole():
            self._begin_anew()
        self._changing = True

    def _whole(self) -> bool:
        if any(identity not in bundle.slots for identity, bundle in self._home.items()):
            return False
        budgets = [self._residents.budget, *(bundle.space.budget for bundle in self._bundles())]
        if any(budget is not self._budget for budget in budgets):
            return False
        if any(spec.identity not in self._home for table in list(self._tables.values()) for spec in table.slots):
            return False
        if any(flight.lease is None for flight in self._flights):
            return False
        try:
            audit(self._bundles(), self._flights, self._residents, self.page_size)
        except AssertionError:
            return False
        self._arrange()
        return True

    def _begin_anew(self) -> None:
        for flight in self._flights:
            flight.parts = []
        self._epoch += 1
        self._flights, self._home = set(), {}
        self._budget = Budget(self._budget.capacity)
        evictions, self._residents = self._residents.evictions, self._nobody()
        self._residents.evictions = evictions
        for table in list(self._tables.values()):
            self._refine(table.slots)
        self._arrange()

    def _nobody(self) -> Residents:
        return Residents(self._budget, cast("Policy[Node]", policy_class(self._policy)()))

    def _arrange(self) -> None:
        for table in list(self._tables.values()):
            table.arrange(self._home)

    def _bundles(self) -> list[Bundle]:
        return list(dict.fromkeys(self._home.values()))

    def _release_memory(self) -> None:
        for bundle in self._bundles():
            bundle.release_memory()

    def _check_specs(self, specs: tuple[SlotSpec, ...]) -> None:
        if not specs:
            raise ValueError("a program without slots has nothing to cache")
        known = {identity: bundle.slots[identity] for identity, bundle in self._home.items()}
        for spec in specs:
            other = known.setdefault(spec.identity, spec)
            if other.storage != spec.storage:
                raise ValueError(f"slots {other.name!r} and {spec.name!r} have one identity but different rows")

    def _refine(self, specs: tuple[SlotSpec, ...]) -> None:
        """Make the slots of a program a union of bundles."""
        wanted = {spec.identity: spec for spec in specs}
        for bundle in self._bundles():
            leaving = wanted.keys() & bundle.slots.keys()
            if leaving and len(leaving) < len(bundle.slots):
                part = bundle.split(leaving, self._flights, self._residents)
                self._home.update(dict.fromkeys(leaving, part))
        new = [spec for identity, spec in wanted.items() if identity not in self._home]
        if new:
            bundle = Bundle.of(new, self._budget, self.page_size, poison=self._poison)
            self._home.update(dict.fromkeys(bundle.slots, bundle))

    def _forget_unused(self) -> None:
        """Drop bundles that hold nothing and that no living program uses: a changed weight leaves them behind."""
        alive = {spec.identity for table in list(self._tables.values()) for spec in table.slots}
        for bundle in self._bundles():
            if bundle.space.used == 0 and alive.isdisjoint(bundle.slots):
                for identity in bundle.slots:
                    del self._home[identity]

    def _check(self) -> None:
        """Raise AssertionError if the bookkeeping is wrong. For tests: it looks at everything."""
        with self._lock:
            self._change()
            self._end_lost()
            self._changing = False
            audit(self._bundles(), self._flights, self._residents, self.page_size)


def _dropped() -> None:
    """What is left of a lease whose thread is not there."""


def _check_call(cache: Cache, table: SlotTable, keys: Sequence[bytes], width: int, limit: int) -> int:
    """The common length of the keys, in rows."""
    if table.cache is not cache:
        raise ValueError("this slot table was registered with another cache")
    if width < 1:
        raise ValueError(f"a row key has at least one byte, but width is {width}")
    sizes = {len(key) for key in keys}
    if len(sizes) != 1:
        raise ValueError(f"the keys of a batch are of one length, but these are of {sorted(sizes)} bytes")
    length, rest = divmod(sizes.pop(), width)
    if rest:
        raise ValueError(f"a key of {length * width + rest} bytes is not a whole number of rows of {width} bytes")
    if not 0 <= limit < length:
        raise ValueError(f"limit must be in 0 .. {length - 1} for {length} rows, but it is {limit}")
    return length
