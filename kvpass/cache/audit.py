"""Checks of the whole bookkeeping, for tests. Looks at everything, so it is slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvpass.cache.bundles import Bundle, Flight
from kvpass.cache.prefix import Node, Tree
from kvpass.cache.residents import Residents


def audit(bundles: list[Bundle], flights: Iterable[Flight], residents: Residents, page_size: int) -> None:
    """Check every invariant.

    Raises:
        AssertionError: one does not hold; the message says which.
    """
    flights = list(flights)
    budget = residents.budget
    used = sum(bundle.space.used * bundle.space.page_bytes for bundle in bundles)
    _check(budget.used == used, f"the budget counts {budget.used} bytes, the bundles {used}")
    _check(used <= budget.capacity, f"{used} bytes are used, the capacity is {budget.capacity}")
    nodes = [node for bundle in bundles for node in bundle.tree]
    idle = sum(node.tree.space.page_bytes for node in nodes if node.pins == 0)
    _check(budget.idle == idle, f"the budget counts {budget.idle} idle bytes, the nodes {idle}")
    leaves = {node for node in nodes if node.pins == 0 and node.children == 0}
    _check(len(residents.policy) == len(leaves), f"{len(residents.policy)} can be evicted, {len(leaves)} should be")
    _check(all(node in residents.policy for node in leaves), "an unpinned leaf cannot be evicted")
    for bundle in bundles:
        _audit_bundle(bundle, flights)
        _audit_tree(bundle.tree, page_size)


def _audit_bundle(bundle: Bundle, flights: list[Flight]) -> None:
    parts = [(flight, part) for flight in flights for part in flight.parts if part.bundle is bundle]
    pins = Counter(node for _, part in parts for node in part.plan.pins)
    living = set(bundle.tree)
    dead = {node for node in pins if node.dead}
    _check(pins.keys() <= living | dead, "a call pins a node that is in no tree")
    for node in living | dead:
        _check(node.pins == pins[node], f"a node has {node.pins} pins, the calls in flight hold {pins[node]}")
        _check(node.tree is bundle.tree, "a node is in the wrong tree")
    writers = {
        new.source: flight for flight, part in parts for new in part.plan.fresh if new.extends and new.source
    }  # fmt: skip
    extending = sum(new.extends for _, part in parts for new in part.plan.fresh)
    _check(len(writers) == extending, "two calls extend one node")
    for node in living:
        _check(node.writer is writers.get(node), "a node has a writer that does not write")
    owned = [new.page for _, part in parts for new in part.plan.fresh if not new.extends]
    held = [node.page for node in living | dead] + owned
    space = bundle.space
    _check(len(set(held)) == len(held), "a page has two owners")
    _check(space.free <= set(space.order), "a free page would never be handed out")
    _check(set(held).isdisjoint(space.free), "a page is free and held")
    _check(set(held) | space.free == set(range(1, space.fresh)), "a page is lost, or the scratch page is held")
    _check(space.dirty <= space.free, "a page in use would lose its memory")
    _check(all(pool.pages >= space.fresh for pool in bundle.pools.values()) or space.fresh == 1, "no memory for a page")
    _check(bundle.slots.keys() == bundle.pools.keys(), "a slot has no pool")
    pools = [(key, pool) for key, pool in bundle.pools.items() if pool.pages]
    _check(all(bundle.raws.get(key) is pool.raw for key, pool in pools), "an old pool is used")


def _audit_tree(tree: Tree, page_size: int) -> None:
    children: Counter[Node] = Counter()
    full: dict[bytes, Node] = {}
    for before, family in tree.families.items():
        _check(family.rows == [node.rows for node in family.nodes], "a family has other rows than its nodes")
        _check(family.rows == sorted(set(family.rows)), "a family is out of order, or holds rows twice")
        for node in family.nodes:
            _check(node.before == before and not node.dead, "a node is in the wrong family")
            _check(node.parent is tree.full.get(before), "a node has lost its parent")
            _check((node.filled == page_size) == (node.digest is not None), "only a full page has a digest")
            _check(0 < node.filled <= page_size, f"a node holds {node.filled} rows")
            if node.parent is not None:
                children[node.parent] += 1
                _check(node.pins <= 0 or node.parent.pins > 0, "a pinned node has an unpinned parent")
            if node.digest is not None:
                full[node.digest] = node
    _check(tree.full == full, "the digests are not those of the full pages")
    _check(tree.rows == sum(node.filled for node in tree), "the rows are miscounted")
    for node in tree:
        _check(node.children == children[node], f"a node counts {node.children} children, it has {children[node]}")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
