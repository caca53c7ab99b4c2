"""The cache as the runtime uses it."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable

import pytest
import torch

from kvpass.cache import Cache, CacheStats, SlotTable
from kvpass.cache.capacity import format_bytes, free_memory, parse_capacity
from kvpass.cache.prefix import Chain, root_digest
from tests.cache.support import begin, compute, expected, key, read, run, spec, verify

K, V = spec("k"), spec("v", (), (4,))
PAGE = 4
PAGE_BYTES = PAGE * (K.row_bytes + V.row_bytes)


def make(pages: int = 1000, *, policy: str = "lru", salt: str | None = None) -> tuple[Cache, SlotTable]:
    cache = Cache(pages * PAGE_BYTES, page_size=PAGE, policy=policy, salt=salt, poison=True)
    return cache, cache.register([K, V])


def held(cache: Cache, table: SlotTable, tokens: list[int]) -> int:
    """Rows of a text that the cache holds, found without a call: a call could evict."""
    chain = Chain(root_digest(cache._salt, b"", 8, PAGE), key(tokens), 8, PAGE)
    return min(bundle.tree.match(chain).length(PAGE) for bundle in table.bundles)


def snapshot(cache: Cache) -> tuple[object, ...]:
    cache._check()
    stats = cache.stats()
    rows = sorted((node.rows, node.page) for bundle in cache._bundles() for node in bundle.tree)
    return rows, stats.bytes_used, stats.pages_used, stats.pages_pinned, stats.rows_reused, stats.rows_computed


# ---------------------------------------------------------------------------------------------- what is found


def test_a_text_grows_in_place() -> None:
    cache, table = make()
    for size in range(1, 20):
        assert run(cache, table, [list(range(size))]) == size - 1
        cache._check()
    assert (len(cache), cache.stats().pages_used) == (19, 5)


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 8, 9])
def test_a_branch_copies_at_most_one_page(cut: int) -> None:
    cache, table = make()
    run(cache, table, [list(range(10))])
    before = cache.stats().pages_used
    assert run(cache, table, [[*range(cut), 50]]) == cut
    assert cache.stats().pages_used == before + 1
    assert held(cache, table, list(range(10))) == 10


def test_the_same_again_and_a_shorter_text_take_no_pages() -> None:
    cache, table = make()
    run(cache, table, [list(range(10))])
    before = cache.stats().pages_used
    assert run(cache, table, [list(range(10))]) == 9
    assert run(cache, table, [list(range(7))]) == 6
    assert cache.stats().pages_used == before


def test_limit_and_the_rows_beyond_it() -> None:
    cache, table = make()
    run(cache, table, [list(range(10))])
    lease = begin(cache, table, [list(range(11))], limit=5)
    assert lease.start == 5
    offsets = [1, 2, 3, 0, 1, 2]  # rows 5 .. 9 are held: only row 10 is stored
    assert lease.slot(0).write_row.tolist() == [*offsets[:-1], 3 * PAGE + offsets[-1]]
    compute(lease, table, [list(range(11))])
    verify(lease, table, [list(range(11))])
    lease.commit()


def test_equal_rows_of_a_batch_share_pages() -> None:
    cache, table = make()
    batch = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]
    run(cache, table, batch)
    assert cache.stats().pages_used == 3
    lease = begin(cache, table, [[*row, 7] for row in batch])
    assert lease.start == 5
    blocks = lease.slot(0).block_table.tolist()
    assert blocks[0] == blocks[1] != blocks[2]
    lease.abort()


def test_the_batch_starts_where_its_shortest_match_ends() -> None:
    cache, table = make()
    run(cache, table, [list(range(9))])
    assert run(cache, table, [list(range(9)), [0, 1, 2, 50, 51, 52, 53, 54, 55]]) == 3
    assert held(cache, table, [0, 1, 2, 50, 51, 52, 53, 54, 55]) == 9


def test_one_row_of_a_batch_extends_a_page_and_the_others_copy_it() -> None:
    cache, table = make()
    run(cache, table, [[1, 2]])
    batch = [[1, 2, 3], [1, 2, 4], [1, 2, 5]]
    assert run(cache, table, batch) == 2
    cache._check()
    assert cache.stats().pages_used == 3
    assert [held(cache, table, row) for row in batch] == [3, 3, 3]


@pytest.mark.parametrize("other", [{"context": b"x"}, {"width": 9}])
def test_context_and_width_separate(other: dict[str, bytes | int]) -> None:
    cache, table = make()
    assert run(cache, table, [[0] * 8]) == 0
    assert run(cache, table, [[0] * 8], **other) == 0  # type: ignore[arg-type]
    assert run(cache, table, [[0] * 8], **other) == 7  # type: ignore[arg-type]


def test_salt_is_part_of_every_digest() -> None:
    trees = [make(salt=salt) for salt in (None, "", "a", "b")]
    for cache, table in trees:
        run(cache, table, [[1, 2, 3, 4]])
    digests = {node.before for cache, _ in trees for bundle in cache._bundles() for node in bundle.tree}
    assert len(digests) == 4


def test_tables_are_shared_and_typed() -> None:
    cache, table = make()
    lease = begin(cache, table, [[1, 2, 3, 4, 5, 6]] * 2)
    k, v = lease.slot(0), lease.slot(1)
    assert k.block_table is v.block_table
    assert (k.block_table.dtype, k.write_row.dtype) == (torch.int32, torch.int64)
    assert (k.block_table.shape, k.run, k.write_row.shape) == ((2, 2), -1, (12,))
    assert (k.pool.shape[:1], k.pool.shape[2:], v.pool.shape[1:]) == ((2,), (PAGE, 3), (PAGE, 4))
    assert lease.pools[0] is k.pool
    lease.abort()


def test_fresh_pages_are_poisoned_even_when_used_before() -> None:
    cache, table = make(2)
    run(cache, table, [list(range(8))])
    lease = begin(cache, table, [list(range(50, 58))])
    assert read(lease, 0, K).isnan().all()
    assert read(lease, 1, V).isnan().all()
    lease.abort()
    lease = begin(cache, table, [[50, 51]])
    compute(lease, table, [[50, 51]])
    lease.commit()
    lease = begin(cache, table, [[50, 60]])  # a copy: row 0 of the page, and nothing of row 1
    assert read(lease, 0, K)[0, 1].isnan().all()
    assert torch.equal(read(lease, 0, K)[0, :1], expected(K, [50], b"", 0, 8))
    lease.abort()


# -------------------------------------------------------------------------------------------------- ends of a call


def test_abort_restores() -> None:
    cache, table = make()
    run(cache, table, [list(range(10))])
    for batch in ([[*range(10), 1]], [[*range(6), 1]], [list(range(40, 50))], [[*range(10), 5], [*range(10), 6]]):
        before = snapshot(cache)
        lease = begin(cache, table, batch)
        compute(lease, table, batch)
        lease.abort()
        assert snapshot(cache) == before
    assert run(cache, table, [[*range(10), 1]]) == 10


def test_an_exception_aborts_and_a_lease_ends_once() -> None:
    cache, table = make()
    before = snapshot(cache)
    with pytest.raises(ZeroDivisionError), begin(cache, table, [[1, 2]]) as lease:
        raise ZeroDivisionError
    assert snapshot(cache) == before
    for end in (lease.commit, lease.abort):
        with pytest.raises(RuntimeError, match="ended"):
            end()
    with begin(cache, table, [[1, 2]]) as lease:
        compute(lease, table, [[1, 2]])
        lease.commit()
    assert len(cache) == 2


def test_a_lease_that_was_dropped_is_aborted() -> None:
    cache, table = make()
    begin(cache, table, [[1, 2, 3]])
    gc.collect()
    assert cache.stats().pages_used == 0
    cache._check()


def test_rows_of_another_call_are_visible_after_its_commit_only() -> None:
    cache, table = make()
    first = begin(cache, table, [[1, 2, 3]])
    assert held(cache, table, [1, 2, 3]) == 0
    compute(first, table, [[1, 2, 3]])
    first.commit()
    assert held(cache, table, [1, 2, 3]) == 3


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_calls_extend_the_same_tail(order: tuple[int, int]) -> None:
    cache, table = make()
    run(cache, table, [[1, 2]])
    texts = [[1, 2, 3], [1, 2, 4]]
    leases = [begin(cache, table, [text]) for text in texts]
    pages = [lease.slot(0).block_table.item() for lease in leases]
    assert pages[0] == 1 != pages[1]  # the first one writes on the page, the second on a copy
    for lease, text in zip(leases, texts, strict=True):
        compute(lease, table, [text])
    for index in order:
        leases[index].commit()
        cache._check()
    assert [held(cache, table, text) for text in texts] == [3, 3]
    assert [run(cache, table, [[*text, 5]]) for text in texts] == [3, 3]


@pytest.mark.parametrize("texts", [([1, 2, 3, 4, 5, 6],) * 2, ([1, 2, 3], [1, 2, 3, 4, 5, 6])])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("before", [[], [1, 2]])
def test_two_calls_compute_the_same_rows(texts: tuple[list[int], ...], reverse: bool, before: list[int]) -> None:
    cache, table = make()
    if before:
        run(cache, table, [before])
    leases = [(begin(cache, table, [text]), text) for text in texts]
    for lease, text in reversed(leases) if reverse else leases:
        compute(lease, table, [text])
        lease.commit()
        cache._check()
    assert held(cache, table, [1, 2, 3, 4, 5, 6]) == 6
    if len(texts[0]) == len(texts[1]):
        assert cache.stats().pages_used <= 3


def test_clear_while_a_call_runs() -> None:
    cache, table = make()
    run(cache, table, [list(range(6))])
    lease = begin(cache, table, [list(range(9))])
    cache.clear()
    cache._check()
    assert (len(cache), cache.stats().pages_used) == (0, 3)
    compute(lease, table, [list(range(9))])
    verify(lease, table, [list(range(9))])
    lease.commit()
    cache._check()
    assert (len(cache), cache.stats().pages_used) == (0, 0)


# ------------------------------------------------------------------------------------------------------- capacity


def test_too_small_for_the_sequence() -> None:
    cache, table = make(2)
    before = snapshot(cache)
    with begin(cache, table, [list(range(9))]) as lease:
        assert not lease.stored
        assert lease.reason == "a sequence of 9 rows needs 480 B; the cache holds 320 B"
        assert lease.start == 0
        with pytest.raises(RuntimeError, match="needs 480 B"):
            lease.slot(0)
    assert snapshot(cache)[:4] == before[:4]
    assert cache.stats().rows_computed == 9


def test_too_small_while_others_run() -> None:
    cache, table = make(3)
    other = begin(cache, table, [list(range(8))])
    lease = begin(cache, table, [list(range(20, 28))])
    assert (
        lease.reason
        == "a sequence of 8 rows needs 320 B; other calls are using 320 B of the 480 B that the cache holds"
    )
    lease.commit()
    other.abort()
    assert run(cache, table, [list(range(20, 28))]) == 0
    assert held(cache, table, list(range(20, 28))) == 8


def test_a_page_smaller_than_nothing() -> None:
    cache = Cache(10, page_size=PAGE)
    table = cache.register([K, V])
    assert not begin(cache, table, [[1]]).stored
    cache._check()


def test_a_branch_fits_when_its_copy_does_not() -> None:
    """The page to copy from and the copy do not fit both: compute the rows again, rather than never store the text."""
    cache, table = make(2)
    run(cache, table, [list(range(8))])
    assert run(cache, table, [[*range(6), 50, 51]]) == 4
    assert held(cache, table, [*range(6), 50, 51][:7]) == 7


def test_eviction_takes_unpinned_leaves_only() -> None:
    cache, table = make(6)
    run(cache, table, [list(range(8))])  # two pages
    run(cache, table, [[*range(4), 20, 21, 22, 23]])  # one page, under the first
    lease = begin(cache, table, [[*range(4), 20, 21, 22, 23, 24]])  # one page; pins the other branch
    assert begin(cache, table, [list(range(50, 66))]).stored is False  # four pages, and only one can go
    cache._check()
    assert cache.stats().evictions == 0
    with begin(cache, table, [list(range(50, 58))]) as other:  # two are free
        compute(other, table, [list(range(50, 58))])
    with begin(cache, table, [list(range(60, 64))]) as other:
        compute(other, table, [list(range(60, 64))])
    assert cache.stats().evictions == 1
    assert held(cache, table, list(range(8))) == 4  # the leaf went, its parent is pinned
    lease.abort()
    cache._check()


@pytest.mark.parametrize(("policy", "gone"), [("lru", 1), ("lfu", 2)])
def test_the_policy_chooses(policy: str, gone: int) -> None:
    cache, table = make(3, policy=policy)
    texts = [[10 * i + j for j in range(4)] for i in range(3)]
    for index in (0, 1, 1, 2, 0):
        run(cache, table, [texts[index]])
    run(cache, table, [[90, 91, 92, 93]])
    left = [index for index in range(3) if len(_match(cache, texts[index])) == 0]
    assert left == [gone]


def test_lru_takes_a_text_from_its_end() -> None:
    cache, table = make(4)
    run(cache, table, [list(range(12))])
    run(cache, table, [[50]])
    run(cache, table, [[60]])
    run(cache, table, [[70]])
    assert held(cache, table, list(range(12))) == 4


@pytest.mark.parametrize("rows", [1, 30])
def test_bytes_never_exceed_the_capacity(rows: int) -> None:
    cache, table = make(20)
    for index in range(60):
        run(cache, table, [[index % 7, *range(rows + index % 11)]])
        assert cache.stats().bytes_used <= 20 * PAGE_BYTES
        cache._check()
    assert cache.stats().evictions > 0


def _match(cache: Cache, tokens: list[int]) -> list[object]:
    rows = key(tokens)
    return [node for bundle in cache._bundles() for node in bundle.tree if node.rows == rows]


# -------------------------------------------------------------------------------------------------- several programs


def test_registering_again_gives_the_same_table() -> None:
    cache, table = make()
    assert cache.register([K, V]) is table
    with pytest.raises(ValueError, match="one identity but different rows"):
        cache.register([spec("k", (3,))])
    with pytest.raises(ValueError, match="without slots"):
        cache.register([])
    with pytest.raises(ValueError, match="another cache"):
        begin(make()[0], table, [[1]])


def test_programs_share_the_slots_that_they_have_in_common() -> None:
    cache, table = make()
    run(cache, table, [list(range(10))])
    small = cache.register([K])
    cache._check()
    assert run(cache, small, [list(range(10))]) == 9
    both = cache.register([K, spec("w")])
    cache._check()
    assert run(cache, both, [list(range(10))]) == 0  # w has no rows yet
    assert run(cache, both, [list(range(10))]) == 9
    assert run(cache, table, [list(range(10))]) == 9
    assert cache.stats().by_slot["k"].rows == 10  # stored once
    cache._check()


def test_a_bundle_is_split_while_calls_run() -> None:
    cache, table = make()
    run(cache, table, [list(range(6))])
    texts = [[*range(6), 10], [*range(6), 20], [*range(3), 30]]
    leases = [begin(cache, table, [text]) for text in texts]
    compute(leases[0], table, [texts[0]])
    small = cache.register([V])
    cache._check()
    assert run(cache, small, [[*range(6), 40]]) == 6
    for lease, text in zip(leases[1:], texts[1:], strict=True):
        compute(lease, table, [text])
        verify(lease, table, [text])
    leases[0].commit()
    cache._check()
    leases[1].abort()
    leases[2].commit()
    cache._check()
    for program in (table, small):
        assert [held(cache, program, text) for text in texts] == [7, 6, 4]


def test_a_cleared_call_survives_a_split() -> None:
    cache, table = make()
    run(cache, table, [list(range(6))])
    lease = begin(cache, table, [list(range(9))])
    cache.clear()
    cache.register([V])
    cache._check()
    lease.commit()
    cache._check()
    assert cache.stats().bytes_used == 0


def test_slots_of_dead_programs_go_when_they_hold_nothing() -> None:
    cache, table = make()
    run(cache, table, [[1, 2, 3]])
    del table
    gc.collect()
    cache.register([spec("new")])
    assert run(cache, cache.register([K, V]), [[1, 2, 3, 4]]) == 3  # rows outlive the program that made them
    cache.clear()
    gc.collect()
    cache.register([spec("newer")])
    assert K.identity not in cache._home


# --------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("pages", [12, 1000])
def test_threads(pages: int) -> None:
    cache, table = make(pages)
    errors: list[BaseException] = []
    gate = threading.Barrier(6, timeout=20)

    def work(number: int) -> None:
        gate.wait()
        for step in range(60):
            text = [step % 3, *range((step * (number + 1)) % 14), *[number] * (step % 4)]
            program = table if step % 2 else cache.register([K] if number % 2 else [V, spec(f"w{number}")])
            run(cache, program, [text], meanwhile=gate.wait if step == 30 else lambda: None)

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)
            gate.abort()
            raise

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    cache._check()
    assert cache.stats().pages_pinned == 0


# ------------------------------------------------------------------------------------------------- what a user sees


def test_stats() -> None:
    cache, table = make()
    assert cache.stats().hit_rate == 0.0
    run(cache, table, [[1, 2, 3, 4]])
    run(cache, table, [[1, 2, 3, 4, 5, 6]] * 2)
    stats = cache.stats()
    assert isinstance(stats, CacheStats)
    assert (stats.lookups, stats.rows_reused, stats.rows_computed, stats.hit_rate) == (2, 8, 8, 0.5)
    assert (stats.pages_used, stats.bytes_used, stats.pages_pinned) == (2, 2 * PAGE_BYTES, 0)
    assert (stats.by_slot["k"].rows, stats.by_slot["v"].bytes) == (6, 2 * PAGE * 16)
    assert "8 reused, 8 computed (50.0% reused)" in str(stats)
    assert "6 rows" in repr(cache)
    assert cache
    assert Cache(1)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2**31),
        ("512MB", 512 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        (" 7 kib", 7168),
        ("100", 100),
        (5, 5),
        ("9B", 9),
    ],
)
def test_capacity(text: str | int, size: int) -> None:
    assert parse_capacity(text) == size


def test_capacity_as_a_fraction_of_the_free_memory() -> None:
    assert 0.2 * free_memory() < parse_capacity(0.25) < 0.3 * free_memory()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (24746393, "23.6 MiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**51, "2048.0 TiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize("bad", [0, -1, 0.0, 1.5, -0.1, float("nan"), "", "GiB", "2 gigs", "-1GiB", "1e3", "0.1B"])
def test_malformed_capacity(bad: str | float) -> None:
    with pytest.raises(ValueError, match="capacity"):
        Cache(bad)


@pytest.mark.parametrize("bad", [True, None, b"1GiB", [1]])
def test_capacity_of_another_type(bad: object) -> None:
    with pytest.raises(TypeError, match="capacity must be"):
        Cache(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make_it", "error"),
    [
        (lambda: Cache(page_size=0), ValueError),
        (lambda: Cache(page_size=True), TypeError),
        (lambda: Cache(page_size=2.0), TypeError),
        (lambda: Cache(policy="lur"), ValueError),
        (lambda: Cache(policy=None), TypeError),
        (lambda: Cache(salt=3), TypeError),
    ],
)
def test_malformed_arguments(make_it: Callable[[], Cache], error: type[Exception]) -> None:
    with pytest.raises(error):
        make_it()


@pytest.mark.parametrize(
    ("keys", "width", "limit", "message"),
    [
        ([], 8, 0, "one length"),
        ([bytes(8), bytes(16)], 8, 0, "one length"),
        ([bytes(9)], 8, 0, "whole number of rows"),
        ([bytes(8)], 8, 1, "limit"),
        ([bytes(8)], 8, -1, "limit"),
        ([b""], 8, 0, "limit"),
        ([bytes(8)], 0, 0, "width"),
    ],
)
def test_malformed_calls_change_nothing(keys: list[bytes], width: int, limit: int, message: str) -> None:
    cache, table = make()
    with pytest.raises(ValueError, match=message):
        cache.begin(table, keys, width, b"", limit=limit)
    cache._check()
    assert cache.stats().lookups == 0


def test_no_memory_for_a_pool_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, table = make()

    def refuse(*_: object) -> None:
        raise MemoryError("no memory for 3 pages")

    with monkeypatch.context() as patch:
        patch.setattr("kvpass.cache.pools.Pool.grow", refuse)
        lease = begin(cache, table, [[1, 2, 3]])
        assert (lease.stored, lease.reason) == (False, "no memory for 3 pages")
        cache._check()
    lease.commit()
    assert run(cache, table, [[1, 2, 3]]) == 0
    assert held(cache, table, [1, 2, 3]) == 3


def test_an_error_in_begin_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, table = make()
    run(cache, table, [[1, 2, 3]])
    before = snapshot(cache)
    for place in ("kvpass.cache.bundles.Bundle._copy", "kvpass.cache.store.Lease", "kvpass.cache.store.plan_pages"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                begin(cache, table, [[1, 2, 3, 4], [1, 5, 6, 7]])
        assert snapshot(cache) == before


def test_a_copy_of_options_means_the_same_cache() -> None:
    """Frameworks that wrap `torch.compile` copy its options."""
    cache = Cache(capacity="1MiB")
    assert copy.deepcopy({"options": {"cache": cache}})["options"]["cache"] is cache
    assert copy.copy(cache) is cache
