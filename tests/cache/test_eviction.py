"""One suite for all policies; then what is special to each."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import pytest

from kvpass.cache.eviction import LFU, LRU, POLICIES, Policy, Random, policy_class


@dataclass(eq=False)
class Item:
    last_use: int = 0
    uses: int = 0


class Contract:
    """What every policy keeps."""

    make: ClassVar[type[Policy[Item]]]

    def test_pops_each_entry_once(self) -> None:
        policy, items = self.make(), [Item(i, i % 3) for i in range(50)]
        for item in items:
            policy.add(item)
        popped = [policy.pop() for _ in items]
        assert set(popped) == set(items)
        assert len(policy) == 0
        with pytest.raises(KeyError):
            policy.pop()

    def test_discarded_entries_are_not_popped(self) -> None:
        policy, keep, drop = self.make(), Item(2), Item(1)
        policy.add(drop)
        policy.add(keep)
        policy.discard(drop)
        policy.discard(Item())
        assert (keep in policy, drop in policy, len(policy)) == (True, False, 1)
        assert policy.pop() is keep

    def test_adding_again_does_not_double(self) -> None:
        policy, item = self.make(), Item()
        policy.add(item)
        policy.discard(item)
        policy.add(item)
        policy.add(item)
        assert policy.pop() is item
        assert len(policy) == 0

    def test_like_a_set(self) -> None:
        policy, chance, there = self.make(), random.Random(1), set[Item]()
        items = [Item(chance.randrange(9), chance.randrange(9)) for _ in range(20)]
        for _ in range(3000):
            item = chance.choice(items)
            if chance.random() < 0.4:
                item.last_use += item not in there
                policy.add(item)
                there.add(item)
            elif chance.random() < 0.7 or not there:
                policy.discard(item)
                there.discard(item)
            else:
                there.remove(policy.pop())
            assert len(policy) == len(there)
            assert all((item in policy) == (item in there) for item in items)
        assert len(policy._heap) < 200, "entries that have left must not pile up"


class TestLRU(Contract):
    make = LRU

    def test_order(self) -> None:
        assert order(LRU(), [(3, 1), (1, 9), (2, 5)]) == [1, 2, 0]

    def test_equals_leave_in_order_of_arrival(self) -> None:
        assert order(LRU(), [(1, 0), (1, 0), (1, 0)]) == [0, 1, 2]


class TestLFU(Contract):
    make = LFU

    def test_order(self) -> None:
        assert order(LFU(), [(3, 2), (1, 9), (2, 2)]) == [2, 0, 1]


class TestRandom(Contract):
    make = Random

    def test_depends_on_the_seed_only(self) -> None:
        items = [(i, i) for i in range(30)]
        assert order(Random(1), items) == order(Random(1), items)
        assert order(Random(1), items) != order(Random(2), items)


def order(policy: Policy[Item], counters: list[tuple[int, int]]) -> list[int]:
    items = [Item(*pair) for pair in counters]
    for item in items:
        policy.add(item)
    return [items.index(policy.pop()) for _ in items]


def test_every_policy_is_under_contract() -> None:
    assert set(POLICIES.values()) == {suite.make for suite in Contract.__subclasses__()}


@pytest.mark.parametrize(("name", "near"), [("lur", "lru"), ("LRU", "lru"), ("rnd", "random"), ("lfuu", "lfu")])
def test_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"no eviction policy '{name}'; did you mean '{near}'"):
        policy_class(name)
