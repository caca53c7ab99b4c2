"""The prefix tree: from the contents of a sequence to the pages that hold its rows.

A node is one page of rows. Whole pages are found by a chained digest; the page in which a sequence leaves what is known
is found among the pages with the same parent, which are kept in the order of their contents: the longest common prefix
is always with a neighbour. Finding a sequence of S rows costs S / page_size digests and one binary search.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NewType

from kvpass.cache.blocks import PageId, PageSpace

Digest = NewType("Digest", bytes)
"""256 bits; of different kinds (root, page, row) by blake2b's personalisation, so that kinds never collide."""

_DIGEST_BYTES = 32


def _digest(kind: bytes, *parts: bytes | memoryview) -> Digest:
    return Digest(blake2b(b"".join(parts), digest_size=_DIGEST_BYTES, person=kind).digest())


def root_digest(salt: bytes | None, context: bytes, width: int, page_size: int) -> Digest:
    """What the chain of a sequence starts from. Every field has a length, so none can run into the next."""
    sizes = b"%d,%d,%d,%d;" % (-1 if salt is None else len(salt), len(context), width, page_size)
    return _digest(b"kvpass.root", sizes, salt or b"", context)


class Chain:
    """The rows of one sequence, cut into pages, and the digests of its pages, made when they are first asked for."""

    __slots__ = ("_digests", "_rows", "length", "page_bytes", "width")

    def __init__(self, root: Digest, rows: bytes, width: int, page_size: int) -> None:
        """`rows`: `length * width` bytes."""
        self.length = len(rows) // width
        if width > _DIGEST_BYTES:  # an embedding, say: nodes keep their rows, so keep a digest of each instead
            view = memoryview(rows)
            rows = b"".join(_digest(b"kvpass.row", view[i : i + width]) for i in range(0, len(rows), width))
            width = _DIGEST_BYTES
        self._rows = rows
        self.width = width
        self.page_bytes = page_size * width
        self._digests = [root]

    def page(self, index: int) -> bytes:
        """The rows of page `index`; fewer than `page_size` of them in the last page."""
        return self._rows[index * self.page_bytes : (index + 1) * self.page_bytes]

    def before(self, index: int) -> Digest:
        """The digest of everything before page `index`."""
        digests = self._digests
        while len(digests) <= index:
            digests.append(_digest(b"kvpass.page", digests[-1], self.page(len(digests) - 1)))
        return digests[index]


@dataclass(slots=True, eq=False)
class Node:
    """One page of rows under its parent. A page that is not full has no children."""

    tree: Tree
    parent: Node | None
    before: Digest
    """The digest of everything before this page."""
    digest: Digest | None
    """The digest of everything up to the end of this page, if it is full."""
    rows: bytes
    filled: int
    page: PageId
    children: int = 0
    pins: int = 0
    last_use: int = 0
    uses: int = 0
    writer: object | None = None
    """Who may write the rows after `filled`."""
    dead: bool = False
    """Out of the tree; the page lives until the last pin goes."""


@dataclass(slots=True)
class Family:
    """The nodes with one parent, in the order of their rows."""

    rows: list[bytes] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class Match:
    """Where a sequence is held: whole pages, then the first `tail_rows` rows of the page of `tail`."""

    nodes: list[Node]
    tail: Node | None = None
    tail_rows: int = 0

    def length(self, page_size: int) -> int:
        """Rows that are held."""
        return len(self.nodes) * page_size + self.tail_rows


@dataclass(slots=True, eq=False)
class Tree:
    """All nodes of one bundle; their pages are from `space`."""

    page_size: int
    space: PageSpace
    full: dict[Digest, Node] = field(default_factory=dict)
    families: dict[Digest, Family] = field(default_factory=dict)
    rows: int = 0

    def __iter__(self) -> Iterator[Node]:
        for family in self.families.values():
            yield from family.nodes

    def match(self, chain: Chain) -> Match:
        """The longest prefix of a sequence that is held."""
        nodes: list[Node] = []
        for index in range(chain.length // self.page_size):
            node = self.full.get(chain.before(index + 1))
            if node is None:
                break
            nodes.append(node)
        wanted = chain.page(len(nodes))
        family = self.families.get(chain.before(len(nodes))) if wanted else None
        if family is None:
            return Match(nodes)
        place = bisect_left(family.rows, wanted)
        near = family.rows[max(place - 1, 0) : place + 1]
        held = max(_common_rows(rows, wanted, chain.width) for rows in near)
        if held == 0:
            return Match(nodes)
        # Of all nodes that begin with these rows the first is the shortest: it can perhaps be extended in place.
        first = bisect_left(family.rows, wanted[: held * chain.width])
        return Match(nodes, family.nodes[first], held)

    def find(self, before: Digest, rows: bytes) -> Node | None:
        """A node that begins with these rows."""
        family = self.families.get(before)
        if family is None:
            return None
        place = bisect_left(family.rows, rows)
        found = place < len(family.rows) and family.rows[place].startswith(rows)
        return family.nodes[place] if found else None

    def insert(self, before: Digest, digest: Digest | None, rows: bytes, filled: int, page: PageId) -> Node:
        """Add a node; its parent, if it has one, is in the tree."""
        node = Node(self, self.full.get(before), before, digest, rows, filled, page)
        if node.parent is not None:
            node.parent.children += 1
        self._enter(node)
        return node

    def extend(self, node: Node, digest: Digest | None, rows: bytes, filled: int) -> None:
        """Let a node hold more rows: `rows` begins with those it holds."""
        self._leave(node)
        node.rows, node.filled, node.digest = rows, filled, digest
        self._enter(node)

    def remove(self, node: Node) -> None:
        """Take out a node without children."""
        self._leave(node)
        node.dead = True
        if node.parent is not None:
            node.parent.children -= 1

    def clear(self) -> list[Node]:
        """Take out every node and return them."""
        nodes = list(self)
        for node in nodes:
            node.dead = True
        self.full.clear()
        self.families.clear()
        self.rows = 0
        return nodes

    def clone(self, space: PageSpace, twins: dict[Node, Node]) -> Tree:
        """An equal tree with its own nodes; `twins` learns which node became which."""
        tree = Tree(self.page_size, space)
        for node in self:
            twin(node, tree, twins)
        for before, family in self.families.items():
            tree.families[before] = Family(list(family.rows), [twins[node] for node in family.nodes])
        tree.full = {digest: twins[node] for digest, node in self.full.items()}
        tree.rows = self.rows
        return tree

    def _enter(self, node: Node) -> None:
        family = self.families.get(node.before)
        if family is None:
            family = self.families[node.before] = Family()
        place = bisect_left(family.rows, node.rows)
        family.rows.insert(place, node.rows)
        family.nodes.insert(place, node)
        if node.digest is not None:
            self.full[node.digest] = node
        self.rows += node.filled

    def _leave(self, node: Node) -> None:
        family = self.families[node.before]
        place = bisect_left(family.rows, node.rows)
        del family.rows[place], family.nodes[place]
        if not family.rows:
            del self.families[node.before]
        if node.digest is not None:
            del self.full[node.digest]
        self.rows -= node.filled


def twin(node: Node, tree: Tree, twins: dict[Node, Node]) -> Node:
    """The copy of a node, and of its ancestors, in another tree."""
    path: list[Node] = []
    at: Node | None = node
    while at is not None and at not in twins:
        path.append(at)
        at = at.parent
    parent = None if at is None else twins[at]
    for old in reversed(path):  # a loop: a long text is deeper than Python's recursion
        parent = twins[old] = replace(old, tree=tree, parent=parent)
    return twins[node]


def _common_rows(left: bytes, right: bytes, width: int) -> int:
    """How many rows two pages have in common from their beginning."""
    low, high = 0, min(len(left), len(right)) // width
    while low < high:
        middle = (low + high + 1) // 2
        if left[: middle * width] == right[: middle * width]:
            low = middle
        else:
            high = middle - 1
    return low
