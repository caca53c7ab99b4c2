"""Random histories against a list of the sequences that were committed."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpass.cache import Cache, Lease, SlotTable
from kvpass.cache.pools import Pool
from tests.cache.support import begin, compute, key, spec, verify

PAGE = 3
SLOTS = [spec("k"), spec("v", (), (4,)), spec("state", (), ()), spec("half", (2, 1), (2,), torch.float64)]
PROGRAMS = [(0, 1), (0, 1, 2), (1,), (2, 3), (0, 3)]
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=5)
contexts = st.sampled_from([b"", b"image"])


class Machine(RuleBasedStateMachine):
    """Calls that overlap, grow, branch, end well or badly; programs that share some of their slots."""

    capacity: int = 10**6
    width = 2
    reserve: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.grown = mock.patch("kvpass.cache.bundles.Pool", functools.partial(Pool, reserve=self.reserve))
        self.grown.start()
        self.history: list[list[int]] = [[0]]
        self.committed: dict[tuple[str, bytes], list[bytes]] = {}
        self.open: list[tuple[Lease, SlotTable, list[list[int]], bytes, int]] = []
        self.epoch = 0
        self.tables: dict[int, SlotTable] = {}

    @initialize(policy=st.sampled_from(["lru", "lfu", "random"]))
    def make(self, policy: str) -> None:
        self.cache = Cache(self.capacity, page_size=PAGE, policy=policy, poison=True)

    def teardown(self) -> None:
        self.grown.stop()

    def expect(self, table: SlotTable, batch: list[list[int]], context: bytes) -> int:
        """Rows that all slots hold for all sequences, but the last."""
        longest = [
            max((_common(key(row, self.width), old, self.width) for old in self.held(slot.name, context)), default=0)
            for slot in table.slots
            for row in batch
        ]
        return min(len(batch[0]) - 1, *longest)

    def held(self, name: str, context: bytes) -> list[bytes]:
        return self.committed.setdefault((name, context), [])

    def call(self, program: int, batch: list[list[int]], context: bytes, *, compute_now: bool) -> None:
        if program not in self.tables:
            self.tables[program] = self.cache.register([SLOTS[i] for i in PROGRAMS[program]])
        table = self.tables[program]
        lease = begin(self.cache, table, batch, context=context, width=self.width)
        self.history += batch
        self.history = self.history[-12:]
        if lease.stored:
            self.look_at(lease, table, batch, context)
            if compute_now:
                compute(lease, table, batch, context, self.width)
                verify(lease, table, batch, context, self.width)
        self.open.append((lease, table, batch, context, self.epoch))
        self.checked(lease)

    def look_at(self, lease: Lease, table: SlotTable, batch: list[list[int]], context: bytes) -> None:
        assert lease.start == self.expect(table, batch, context)

    def checked(self, lease: Lease) -> None:
        assert lease.stored, lease.reason

    @rule(program=st.integers(0, 4), new=tokens, context=contexts, now=st.booleans())
    def fresh(self, program: int, new: list[int], context: bytes, now: bool) -> None:
        self.call(program, [new], context, compute_now=now)

    @rule(program=st.integers(0, 4), new=tokens, context=contexts, pick=st.integers(0), now=st.booleans())
    def grow(self, program: int, new: list[int], context: bytes, pick: int, now: bool) -> None:
        self.call(program, [self.history[pick % len(self.history)][:16] + new], context, compute_now=now)

    @rule(program=st.integers(0, 4), pick=st.integers(0), cut=st.integers(0), context=contexts, data=st.data())
    def batch(self, program: int, pick: int, cut: int, context: bytes, data: Any) -> None:
        old = self.history[pick % len(self.history)][:16]
        old = old[: cut % (len(old) + 1)]
        tails = data.draw(
            st.lists(st.tuples(*[st.integers(0, 1)] * data.draw(st.integers(1, 4))), min_size=2, max_size=4)
        )
        self.call(program, [old + list(tail) for tail in tails], context, compute_now=True)

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0))
    def commit(self, pick: int) -> None:
        lease, table, batch, context, epoch = self.open.pop(pick % len(self.open))
        if lease.stored:
            compute(lease, table, batch, context, self.width)
            verify(lease, table, batch, context, self.width)
            if epoch == self.epoch:
                for slot in table.slots:
                    self.held(slot.name, context).extend(key(row, self.width) for row in batch)
        lease.commit()

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0), lose=st.booleans())
    def abort(self, pick: int, lose: bool) -> None:
        lease = self.open.pop(pick % len(self.open))[0]
        if not lose:
            lease.abort()

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.committed.clear()
        self.epoch += 1

    @rule(program=st.integers(0, 4))
    def forget(self, program: int) -> None:
        self.tables.pop(program, None)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "cache"):
            self.cache._check()


class Small(Machine):
    """Too small for everything: rows may be missing, and calls may not be stored; what is there is right."""

    capacity = 900

    def look_at(self, lease: Lease, table: SlotTable, batch: list[list[int]], context: bytes) -> None:
        assert lease.start <= self.expect(table, batch, context)

    def checked(self, lease: Lease) -> None:
        assert lease.stored == (lease.reason == "")


class Growing(Machine):
    """Pools that are replaced when they grow, as on a GPU."""

    reserve = False


class Wide(Machine):
    """Row keys that are digested before they are kept."""

    width = 40


def _common(left: bytes, right: bytes, width: int) -> int:
    size = min(len(left), len(right)) // width
    return next(
        (i for i in range(size) if left[i * width : (i + 1) * width] != right[i * width : (i + 1) * width]), size
    )


MANY = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), database=None
)  # fmt: skip
TestAmple = Machine.TestCase
TestSmall = Small.TestCase
TestGrowing = Growing.TestCase
TestWide = Wide.TestCase
for _case in (TestAmple, TestSmall, TestGrowing, TestWide):
    _case.settings = MANY
del _case
