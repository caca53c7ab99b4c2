"""What the user calls things: inputs and parameters by their source, index variables by letters."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import sympy
import torch

from kvpass.analysis.facts import Atom, Fact, Kind, index, leaf_name
from kvpass.analysis.sweep import Analyzed
from kvpass.ir import B, Captured, H, I, J
from kvpass.report.formula import Leaf

_STEP = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.([A-Za-z_]\w*)(?:\(\))?")
_HOLDERS = {"_modules", "_parameters", "_buffers", "__dict__"}
SEQ, BATCH = sympy.Symbol("S", integer=True, positive=True), sympy.Symbol("B", integer=True, positive=True)


def spoken(source: str, fallback: str) -> str:
    """Dynamo's name of a value as the user would write it.

    ``L['attention_mask'] -> attention_mask``; ``L['self']._modules['h']._modules['0']._parameters['w'] -> h.0.w``.
    """
    steps = [name or number or attribute for name, number, attribute in _STEP.findall(source)]
    if not steps:
        return fallback
    in_module = any(holder in source for holder in ("._modules[", "._parameters[", "._buffers["))
    steps = [step for step in (steps[1:] if in_module else steps) if step not in _HOLDERS]
    if steps[0] == "kwargs" and len(steps) > 1:
        steps = steps[1:]
    path = "".join(f"[{step}]" if step.isdigit() and not in_module else f".{step}" for step in steps)
    return path.removeprefix(".") or fallback


def display_names(captured: Captured) -> dict[str, str]:
    """By placeholder name, what to call it; a name that would stand for two things is left as it was traced."""
    names = {given.name: spoken(given.source, given.name) for given in captured.inputs}
    taken = [node.name for node in captured.module.graph.nodes if node.op != "placeholder"]
    counts: dict[str, int] = {}
    for name in (*names.values(), *taken):
        counts[name] = counts.get(name, 0) + 1
    return {name: shown if counts[shown] == 1 else name for name, shown in names.items()}


def leaves(analyzed: Analyzed) -> dict[str, Leaf]:
    """What the leaf functions of closed forms stand for."""
    names = display_names(analyzed.captured)
    return {
        leaf_name(node.name): Leaf(names.get(node.name, node.name), step.fact.dtype is torch.bool)
        for node, step in analyzed.steps.items()
    }


def letters(fact: Fact) -> dict[sympy.Basic, sympy.Basic]:
    """Index variables of a fact as letters: ``b`` for the batch, ``i`` and ``j`` for rows, ``h`` and others else.

    A table of the model's own has no rows of the sequence; its first two axes are then ``i`` and ``j``.
    """
    rows = iter((I, J, *_symbols("klmn")))
    free = iter((H, *_symbols("uvwxyz")))
    if all(atom.kind is Kind.FREE for atom in fact.atoms):
        free = rows
    out: dict[sympy.Basic, sympy.Basic] = {}
    for k, atom in enumerate(fact.atoms):
        if atom.kind is Kind.BATCH:
            out[index(k)] = B
        else:
            out[index(k)] = next(rows if atom.kind is Kind.SEQ else free, index(k))
    return out


def growing(fact: Fact) -> list[int]:
    """The atoms in axes whose number of entries grows with the sequence."""
    atoms = enumerate(fact.atoms[: fact.real])
    return [k for k, atom in atoms if atom.kind is Kind.SEQ and sympy.sympify(atom.size).free_symbols]


def _symbols(characters: str) -> list[sympy.Symbol]:
    return [sympy.Symbol(c, integer=True, nonnegative=True) for c in characters]


def place(source: str) -> str:
    """``file:line`` of a source line."""
    return source.split(" ", 1)[0]


def line(source: str, width: int = 110) -> str:
    """A source line: below the current folder or the installed packages, and no longer than a person wants to read."""
    for root in (f"{os.getcwd()}/", "site-packages/"):
        source = source.rpartition(root)[2] if root in source.split(":", 1)[0] else source
    return source if len(source) <= width else source[: width - 2] + ".."


def short(value: object) -> str:
    """A dtype or device without its prefix."""
    return str(value).removeprefix("torch.")


class Sizes:
    """Sizes in the letters of `kvpass.ir`: ``S`` for the sequence and ``B`` for the batch."""

    def __init__(self, captured: Captured) -> None:
        self.named: dict[sympy.Basic, sympy.Basic] = {captured.seq: SEQ}
        if captured.batch.free_symbols and captured.batch != captured.seq:
            self.named[captured.batch] = BATCH

    def text(self, size: object) -> str:
        return str(sympy.sympify(size).xreplace(self.named)).replace("**", "^")

    def shape(self, sizes: Iterable[object]) -> str:
        return f"[{', '.join(self.text(size) for size in sizes)}]"

    def axes(self, fact: Fact) -> str:
        """Axes as products of atoms: ``[B, S, 4·~2, 16]``; ``~`` marks repetition."""
        return f"[{', '.join('·'.join(self._atom(a) for a in dim) or '1' for dim in fact.dims)}]"

    def _atom(self, atom: Atom) -> str:
        text = self.text(atom.size)
        if atom.kind is Kind.SEQ and atom.start != 0:
            return f"{text}@({self.text(atom.start)})"
        return f"~{text}" if atom.bcast else text
