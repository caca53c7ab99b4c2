"""Control flow of SASS: instructions, who follows whom, natural loops.

Instructions come from ``cuobjdump -sass``; Triton's own ``asm["sass"]`` stops silently at 4,096 of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx

LINE = re.compile(r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<code>[A-Z][\w.]*)(?P<rest>[^;]*);")
TARGET = re.compile(r"^(?P<before>.*?)\b(?P<address>0x[0-9a-f]+)$")
BARRIER = re.compile(r"\bB\d+\b")
ALWAYS = ("", "PT", "UPT")

# Indices that open calls return to, and the index of an instruction: a subroutine is one copy for each way in.
Node = tuple[tuple[int, ...], int]
START: Node = ((), 0)


class UnreadableFlow(ValueError):
    """A branch whose target the text does not name."""

    def __init__(self, instruction: Instruction) -> None:
        super().__init__(f"no target can be read from {instruction.opcode} {instruction.operands}")


@dataclass(frozen=True)
class Instruction:
    """One line: where it stands, the predicate that guards it or ``""``, opcode with suffixes, operands."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.partition(".")[0]

    @property
    def guarded(self) -> bool:
        return self.guard not in ALWAYS

    @property
    def barrier(self) -> str:
        """The barrier that a BSSY arms or a BSYNC waits for, else ``""``."""
        found = BARRIER.search(self.operands) if self.name in ("BSSY", "BSYNC") else None
        return found[0] if found else ""


def parse(listing: str, function: str) -> list[Instruction]:
    """The instructions of one function of a listing by ``cuobjdump -sass``.

    Raises:
        ValueError: the listing has no such function.
    """
    parts = re.split(r"^\s+Function : (.+)$", listing, flags=re.MULTILINE)
    bodies = dict(zip(map(str.strip, parts[1::2]), parts[2::2], strict=True))
    if function not in bodies:
        raise ValueError(f"no function {function!r} in the listing; there are {sorted(bodies)}")
    found = map(LINE.match, bodies[function].splitlines())
    return [Instruction(int(m["at"], 16), m["guard"] or "", m["code"], m["rest"].strip()) for m in found if m]


class Flow:
    """Who follows whom in ``code``, and the loops in it.

    A subroutine counts where it is called.

    Raises:
        UnreadableFlow: a branch through a register, or into another function.
    """

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.code = code
        self.places = {instruction.address: index for index, instruction in enumerate(code)}
        self.joins: dict[int, set[int]] = {}
        self.subroutines: dict[int, bool] = {}
        self.join_barriers()
        self.graph = self.explore()

    def split(self, index: int) -> tuple[str, int]:
        """What stands before the target of the branch at ``index``, and the index of the target."""
        found = TARGET.match(self.code[index].operands)
        if not found or int(found["address"], 16) not in self.places:
            raise UnreadableFlow(self.code[index])
        return found["before"].strip(" ,"), self.places[int(found["address"], 16)]

    def followers(self, index: int) -> set[int]:
        """Indices that may come after ``index`` in the same function; a subroutine is stepped over."""
        instruction = self.code[index]
        after = {index + 1} if index + 1 < len(self.code) else set()
        passed = after if instruction.guarded else set()
        match instruction.name:
            case "EXIT" | "RET":
                return passed
            # Only a warp whose threads have parted takes BRA.DIV, to a slow copy of what follows.
            case "BRA" if ".DIV" in instruction.opcode:
                return after
            case "BRA" | "JMP":
                predicate, target = self.split(index)
                return {target} | (after if predicate else passed)
            # For sm_80 ptxas writes the exit of a loop as a call that never returns.
            case "CALL" if not self.is_subroutine(index):
                return {self.split(index)[1]} | passed
            case "BSYNC":
                return self.joins.get(index, after) | passed
            case "BRX" | "BRXU" | "JMX" | "JMXU":
                raise UnreadableFlow(instruction)
        return after

    def is_subroutine(self, call: int) -> bool:
        """Whether what ``call`` enters comes to a RET."""
        if call not in self.subroutines:
            self.subroutines[call] = False  # what it is to itself, where the walk comes back to it
            entered = self.walk(self.split(call)[1])
            self.subroutines[call] = any(self.code[index].name == "RET" for index in entered)
        return self.subroutines[call]

    def walk(self, start: int, barrier: str = "none") -> Iterator[int]:
        """Indices from ``start`` on, not beyond where ``barrier`` is armed or waited for."""
        seen, todo = {start}, [start]
        while todo:
            yield (index := todo.pop())
            if self.code[index].barrier != barrier:
                new = self.followers(index) - seen
                seen |= new
                todo += new

    def join_barriers(self) -> None:
        """Find where each BSYNC leads: to the target of every BSSY of its barrier that reaches it.

        One BSYNC may hide another from view, hence the repetition.
        """
        opened = [index for index, instruction in enumerate(self.code) if instruction.name == "BSSY"]
        before = -1
        while before != (before := sum(map(len, self.joins.values()))):
            self.subroutines.clear()
            for index in opened:
                barrier, (_, target) = self.code[index].barrier, self.split(index)
                for met in self.walk(index + 1, barrier):
                    if self.code[met].name == "BSYNC" and self.code[met].barrier == barrier:
                        self.joins.setdefault(met, set()).add(target)

    def explore(self) -> nx.DiGraph:
        graph = nx.DiGraph()
        todo = [START]
        graph.add_node(START)
        while todo:
            node = todo.pop()
            for following in self.successors(node):
                if following not in graph:
                    todo.append(following)
                graph.add_edge(node, following)
        return graph

    def successors(self, node: Node) -> set[Node]:
        returns, index = node
        instruction = self.code[index]
        plain = {(returns, following) for following in self.followers(index)}
        if instruction.name == "CALL" and self.is_subroutine(index):
            return {((*returns, index + 1), self.split(index)[1])} | (plain if instruction.guarded else set())
        if instruction.name == "RET" and returns:
            return plain | {(returns[:-1], returns[-1])}
        return plain

    def loops(self) -> dict[Node, set[Node]]:
        """The natural loops: by header, all nodes that come back to it without passing it."""
        above = nx.immediate_dominators(self.graph, START)
        found: dict[Node, set[Node]] = {}
        for latch, header in self.graph.edges:
            # Most edges are told by this: there is a way into a loop besides its own.
            if (header == START or self.graph.in_degree(header) > 1) and dominates(above, header, latch):
                body = found.setdefault(header, {header})
                todo = [latch]
                while todo:
                    node = todo.pop()
                    if node not in body:
                        body.add(node)
                        todo += self.graph.predecessors(node)
        return found


def dominates(above: dict[Node, Node | None], header: Node, node: Node) -> bool:
    """Whether every path from the start to ``node`` passes ``header``; ``above`` are the immediate dominators."""
    at: Node | None = node
    while at is not None and at != header:
        at = above.get(at) if above.get(at) != at else None
    return at is not None


def main_loop(code: Sequence[Instruction], weight: Callable[[Instruction], int]) -> list[Instruction]:
    """The loop that loads most: what it runs in one pass, in order of address; empty if no loop loads anything.

    ``weight`` says how much an instruction loads. A load belongs to the innermost loop around it. Of loops that load
    equally much it is the shortest: the others do the same and mask it. Both sides of a branch are counted, so this is
    at least the longest pass.
    """
    flow = Flow(code)
    loops = flow.loops()
    loads = dict.fromkeys(loops, 0)
    for node in flow.graph:
        around = [header for header, body in loops.items() if node in body]
        if around:
            loads[min(around, key=lambda header: len(loops[header]))] += weight(code[node[1]])
    most = max(loads, key=lambda header: (loads[header], -len(loops[header])), default=None)
    if most is None or not loads[most]:
        return []
    return [code[index] for _, index in sorted(loops[most], key=lambda node: (node[1], node[0]))]
