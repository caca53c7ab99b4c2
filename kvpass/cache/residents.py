"""Nodes that hold pages: pinned by calls in flight, idle, evicted."""

from __future__ import annotations

from kvpass.cache.blocks import Budget
from kvpass.cache.eviction import Policy
from kvpass.cache.prefix import Node


class Residents:
    """Keeps the budget's idle bytes and the policy's set right.

    The policy's set is the nodes that are in a tree, that no call uses and that have no children. A call pins every
    node on its path, so below an unpinned node all are unpinned: whatever is idle can be evicted, leaf by leaf.
    """

    def __init__(self, budget: Budget, policy: Policy[Node]) -> None:
        self.budget = budget
        self.policy = policy
        self.evictions = 0
        self.clock = 0

    def pin(self, node: Node) -> None:
        """Keep a node for a call, and count the use."""
        if node.pins == 0:
            self.budget.idle -= node.tree.space.page_bytes
            self.policy.discard(node)
        node.pins += 1
        node.uses += 1
        node.last_use = self.clock

    def unpin(self, node: Node) -> None:
        """End one `pin`. A dead node that nobody uses any more gives its page back."""
        node.pins -= 1
        if node.pins == 0 and node.dead:
            node.tree.space.give(node.page)
        elif node.pins == 0:
            self.budget.idle += node.tree.space.page_bytes
            self.offer(node)

    def adopt(self, node: Node) -> None:
        """Count a node that has just come into its tree. `offer` it when its children are there too."""
        self.budget.idle += node.tree.space.page_bytes
        node.uses = 1
        node.last_use = self.clock
        if node.parent is not None:
            self.policy.discard(node.parent)

    def offer(self, node: Node) -> None:
        """Let a node be evicted, if it may be."""
        if node.pins == 0 and node.children == 0 and not node.dead:
            self.policy.add(node)

    def make_room(self, size: int) -> None:
        """Evict until `size` more bytes fit; `budget.fits(size)` holds."""
        while self.budget.used + size > self.budget.capacity:
            node = self.policy.pop()
            node.tree.remove(node)
            self._drop(node)
            self.evictions += 1
            if node.parent is not None:
                self.offer(node.parent)

    def bury(self, node: Node) -> None:
        """Account for a node that `Tree.clear` took out."""
        self.policy.discard(node)
        if node.pins == 0:
            self._drop(node)

    def _drop(self, node: Node) -> None:
        self.budget.idle -= node.tree.space.page_bytes
        node.tree.space.give(node.page)
