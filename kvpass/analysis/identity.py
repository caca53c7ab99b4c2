"""Merkle identity of values: a hash of the sub-graph that computes a row, down to the weights.

Two compilations, or two models, that compute the same rows from the same inputs with the same weights get the same
identity and share what is stored. The size of the batch and the names of symbols do not enter: a row is proved to be a
function of its own sequence.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from kvpass.analysis.facts import Atom, Fact, Kind, index, leaf_name
from kvpass.analysis.sweep import Analyzed, attribute, sym
from kvpass.ir import Input, Role, address

aten = torch.ops.aten

# Their size arguments repeat what the fact of the result says.
_SIZED = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.zeros.default,
    aten.ones.default,
}


def identities(analyzed: Analyzed, weights: Mapping[str, bytes]) -> dict[fx.Node, bytes]:
    """The 256-bit identity of every value.

    Args:
        weights: by placeholder name, the content digest of each constant.
    """
    hasher = _Hasher(analyzed, weights)
    for node in analyzed.steps:
        hasher.visit(node)
    return hasher.found


class _Hasher:
    def __init__(self, analyzed: Analyzed, weights: Mapping[str, bytes]) -> None:
        self.analyzed, self.weights = analyzed, weights
        captured = analyzed.captured
        self.rename = {captured.seq: sympy.Symbol("s"), captured.batch: sympy.Symbol("B")}
        if not captured.batch.free_symbols:
            del self.rename[captured.batch]
        self.inputs = {i.name: i for i in captured.inputs}
        self.ordinal = {i.name: k for k, i in enumerate(captured.of(Role.SEQUENCE))}
        self.ordinal |= {i.name: k for k, i in enumerate(captured.of(Role.CONTEXT))}
        self.found: dict[fx.Node, bytes] = {}
        self.batches = {} if captured.batch == 1 or captured.batch.free_symbols else _batches(analyzed)
        self.leaves = analyzed.leaves

    def visit(self, node: fx.Node) -> None:
        fact = self.analyzed.fact(node)
        expr = fact.expr
        if node.op == "placeholder":
            parts = self.input(self.inputs[node.name])
        elif node.op == "get_attr":
            parts = ["constant", digest_of(attribute(self.analyzed.captured.module, str(node.target)))]
        elif expr is not None and not fact.rounded and not self._is_leaf(node, expr):
            parts = ["index", sympy.srepr(self.form(node, fact, expr))]
        else:
            skip = node.target in _SIZED
            parts = [str(node.target), self.argument(node.args, skip), self.argument(node.kwargs, skip)]
        signature = "|".join(self.axis(node, fact, d) for d in range(len(fact.dims)))
        text = repr((*parts, signature, str(fact.dtype)))
        self.found[node] = hashlib.sha256(text.encode()).digest()

    def _is_leaf(self, node: fx.Node, expr: sympy.Basic) -> bool:
        return any(leaf.func.__name__ == leaf_name(node.name) for leaf in expr.atoms(AppliedUndef))

    def is_batch(self, node: fx.Node, k: int, atom: Atom) -> bool:
        return atom.kind is Kind.BATCH or k in self.batches.get(node, ())

    def axis(self, node: fx.Node, fact: Fact, d: int) -> str:
        atoms = [(k, fact.atoms[k]) for k in fact.flat(d)]
        kept = [a for k, a in atoms if a.size != 1 and not self.is_batch(node, k, a)]
        return ".".join(f"{a.kind.value}:{a.size.xreplace(self.rename)}:{a.start.xreplace(self.rename)}" for a in kept)

    def form(self, node: fx.Node, fact: Fact, expr: sympy.Basic) -> sympy.Basic:
        """A closed form in which leaf functions go by the identity of their node.

        The place in the batch does not enter: in one sequence it is 0, in several it is the row's own.
        """
        free = [k for k, atom in enumerate(fact.atoms) if atom.size != 1 and not self.is_batch(node, k, atom)]
        names = {index(k): sympy.Symbol(f"a{n}") for n, k in enumerate(free)} | self.rename

        def named(leaf: AppliedUndef) -> sympy.Basic:
            node = self.leaves[leaf.func.__name__]
            atoms = self.analyzed.fact(node).atoms
            kept = [
                arg.xreplace(names)
                for k, (arg, atom) in enumerate(zip(leaf.args, atoms, strict=True))
                if not self.is_batch(node, k, atom)
            ]
            return sympy.Function(self.found[node].hex())(*kept)

        return expr.replace(lambda e: isinstance(e, AppliedUndef), named).xreplace(names)

    def input(self, given: Input) -> list[Any]:
        if given.role is Role.CONSTANT:
            return ["weight", self.weights[given.name]]
        if given.role is Role.FORM:
            return ["index", sympy.srepr(given.form)]
        return [given.role.value, self.ordinal[given.name]]

    def argument(self, value: Any, skip_numbers: bool) -> Any:
        if isinstance(value, fx.Node):
            if value in self.found:
                return self.found[value]
            return None if skip_numbers else str(sym(value.meta["val"]).xreplace(self.rename))
        if isinstance(value, (list, tuple)):
            return [self.argument(v, skip_numbers) for v in value]
        if isinstance(value, dict):
            return [(k, self.argument(v, skip_numbers)) for k, v in sorted(value.items())]
        return None if skip_numbers and isinstance(value, int) else repr(value)


def _batches(analyzed: Analyzed) -> dict[fx.Node, frozenset[int]]:
    """Where the size of the batch is a number: the atoms of that size that are the batch, though nothing but their use
    says so.

    Such an atom repeats one entry, and all that reads it carries it on until it meets the batch. One that something
    reduces, returns or merges is another axis, whose size is part of the value.
    """
    found: dict[fx.Node, frozenset[int]] = {}
    batch = analyzed.captured.batch
    for node in reversed(list(analyzed.steps)):
        fact = analyzed.fact(node)
        few = {k for k, atom in enumerate(fact.atoms) if atom.kind is Kind.FREE and atom.size == batch and atom.bcast}
        if fact.expr is not None:
            few = {k for k in few if not fact.expr.has(index(k))}
        kept = frozenset(k for k in few if k < fact.real and _meets_batch(analyzed, node, k, found))
        if kept:
            found[node] = kept
    return found


def _meets_batch(analyzed: Analyzed, node: fx.Node, k: int, found: Mapping[fx.Node, frozenset[int]]) -> bool:
    for user in node.users:
        step = analyzed.steps.get(user)
        if step is None or len(step.facts) != 1 or node not in step.operands:
            return False
        for operand, links in zip(step.operands, step.links, strict=True):
            if operand is not node:
                continue
            to = links[k]
            if to is None or to in step.full:
                return False
            atom = step.fact.atoms[to]
            if atom.size != analyzed.captured.batch or not (atom.kind is Kind.BATCH or to in found.get(user, ())):
                return False
    return bool(node.users)


def digest_of(tensor: torch.Tensor) -> bytes:
    """SHA-256 of a tensor's dtype, shape and contents. (``numpy()`` would ask for a writable pointer.)"""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    head = f"{plain.dtype}{tuple(plain.shape)}".encode()
    data = (ctypes.c_char * plain.nbytes).from_address(address(plain)) if plain.nbytes else b""
    return hashlib.sha256(head + hashlib.sha256(data).digest()).digest()
