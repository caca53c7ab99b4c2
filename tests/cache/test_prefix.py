"""The bookkeeping by itself: no torch."""

from __future__ import annotations

import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvpass.cache.blocks import Budget, PageSpace
from kvpass.cache.prefix import Chain, Tree, root_digest

ROOT = root_digest(None, b"", 1, 4)


def chain(rows: bytes, width: int = 1) -> Chain:
    return Chain(ROOT, rows, width, 4)


def store(tree: Tree, rows: bytes) -> None:
    """Put all pages of a sequence into the tree, where they are not there yet."""
    links = chain(rows)
    for index in range(-(-links.length // 4)):
        page = links.page(index)
        if tree.find(links.before(index), page) is None:
            digest = links.before(index + 1) if len(page) == 4 else None
            tree.insert(links.before(index), digest, page, len(page), tree.space.take())


def new_tree() -> Tree:
    return Tree(4, PageSpace(Budget(10**6), 1))


@given(st.lists(st.binary(max_size=11).map(lambda rows: bytes(byte % 3 for byte in rows)), max_size=12), st.data())
def test_match_is_the_longest_common_prefix(sequences: list[bytes], data: st.DataObject) -> None:
    tree = new_tree()
    for rows in sequences:
        store(tree, rows)
    wanted = bytes(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=13)))
    longest = max((next((i for i in range(99) if rows[i : i + 1] != wanted[i : i + 1] or i == len(wanted)), 0)
                   for rows in sequences), default=0)  # fmt: skip
    match = tree.match(chain(wanted))
    assert match.length(4) == longest
    got = b"".join(node.rows for node in match.nodes) + (match.tail.rows[: match.tail_rows] if match.tail else b"")
    assert got == wanted[:longest]


def test_match_prefers_the_page_that_ends_there() -> None:
    tree = new_tree()
    for rows in (b"ac", b"abz", b"ab", b"aba"):
        store(tree, rows)
    tail = tree.match(chain(b"abxx")).tail
    assert tail is not None
    assert tail.rows == b"aba"  # "ab" was there when it came, so it has no page of its own
    tree = new_tree()
    for rows in (b"ab", b"abz"):
        store(tree, rows)
    tail = tree.match(chain(b"abxx")).tail
    assert tail is not None
    assert tail.rows == b"ab"


def test_extending_keeps_the_order() -> None:
    tree = new_tree()
    for rows in (b"a", b"ab", b"b"):
        store(tree, rows)
    node = tree.match(chain(b"a")).tail
    assert node is not None
    tree.extend(node, None, b"ac", 2)
    assert [node.rows for node in tree] == [b"ab", b"ac", b"b"]


def test_digests_depend_on_everything() -> None:
    roots = {
        root_digest(salt, context, width, size)
        for salt in (None, b"", b"a", b"ab")
        for context in (b"", b"b", b"bc", b"c")
        for width in (1, 11)
        for size in (1, 11)
    }
    assert len(roots) == 64
    assert {len(root) for root in roots} == {32}
    pages = {Chain(root, rows, 1, 4).before(1) for root in list(roots)[:3] for rows in (b"abcd", b"abce")}
    assert len(pages) == 6


def test_kinds_of_digests_do_not_collide() -> None:
    wide = Chain(ROOT, bytes(40), 40, 1)
    assert len({wide.page(0), wide.before(0), wide.before(1)}) == 3


def test_wide_rows_are_kept_as_digests() -> None:
    links = Chain(ROOT, bytes(100) + b"x" * 100, 100, 4)
    assert (links.length, len(links.page(0)), links.width) == (2, 64, 32)
    assert links.page(0)[:32] == Chain(ROOT, bytes(100), 100, 4).page(0)


def test_clone_of_a_deep_tree() -> None:
    tree = new_tree()
    store(tree, b"abcd" * 3000)
    other = tree.clone(tree.space, twins := {})
    assert len(twins) == 3000
    assert other.match(chain(b"abcd" * 3000)).length(4) == 12000
    assert {node.tree for node in other} == {other}


def test_pages_come_back_and_the_scratch_page_is_never_handed_out() -> None:
    space = PageSpace(Budget(30), 10)
    pages = [space.take() for _ in range(3)]
    assert sorted(pages) == [1, 2, 3]
    with pytest.raises(MemoryError):
        space.take()
    space.give(pages[1])
    assert space.take_dirty() == [pages[1]]
    assert (space.take(), space.used, space.budget.used) == (pages[1], 3, 30)


def test_the_page_that_follows_is_handed_out_if_it_is_free() -> None:
    space = PageSpace(Budget(100), 10)
    pages = [space.take() for _ in range(5)]
    for page in (4, 2, 3):
        space.give(pages[page - 1])
    assert [space.take(pages[0]), space.take(pages[0]), space.take(pages[3]), space.take(pages[4])] == [2, 3, 4, 6]
    for _ in range(100):  # what is given back and taken by wish leaves nothing behind
        space.give(pages[1])
        assert space.take(pages[0]) == 2
    assert len(space.order) < 20


def test_bookkeeping_imports_no_torch() -> None:
    code = "import sys, kvpass.cache.blocks, kvpass.cache.prefix, kvpass.cache.eviction; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
