"""Where the graph reads other rows than its own, and the proof that none of them is later."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from kvpass.analysis.facts import Fact, Fill, Kind, index
from kvpass.analysis.sweep import Analyzed, Step, source_of
from kvpass.analysis.table import support_of
from kvpass.ir import I, J
from kvpass.report.formula import Leaves, causality, formula
from kvpass.report.names import growing, leaves, letters
from kvpass.report.parts import ReadingReport, UnrecognisedReport

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


def op_name(node: fx.Node) -> str:
    """``softmax`` of ``aten.softmax.int``; a function's own name else."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet or node.target, "__name__", node.target))


def readings(analyzed: Analyzed, found: Container[fx.Node], missed: Container[fx.Node]) -> tuple[ReadingReport, ...]:
    """Every op outside recognised attention that combines rows, with the support that bounds them."""
    out, known = [], leaves(analyzed)
    for node, step in analyzed.steps.items():
        inside = node in found or (node.target in _SOFTMAX and node not in missed)
        if inside or node in missed or not any(True for _ in _combined(analyzed, step)):
            continue
        mask, proof = bound(analyzed, node, known)
        if not mask and not proof:
            proof = f"by the rule of {op_name(node)}: its row i depends on no later row"
        out.append(ReadingReport(op_name(node), mask, proof, node.name, source_of(node)))
    return tuple(out)


def unrecognised(analyzed: Analyzed, missed: Mapping[fx.Node, str]) -> tuple[UnrecognisedReport, ...]:
    """The attentions that stay as they were written."""
    known = leaves(analyzed)
    return tuple(
        UnrecognisedReport(node.name, reason, *bound(analyzed, node, known), source_of(node))
        for node, reason in missed.items()
    )


def _combined(analyzed: Analyzed, step: Step) -> Iterator[tuple[Fact, int]]:
    """``(operand, atom)`` of each row axis that the op reads whole, where its entries depend on the inputs."""
    for k, operand in enumerate(step.operands):
        fact = analyzed.fact(operand)
        for atom in growing(fact):
            if step.links[k][atom] is None and fact.deps:
                yield fact, atom


def bound(analyzed: Analyzed, node: fx.Node, known: Leaves) -> tuple[str, str]:
    """``(mask, proof)`` of the rows that an op combines, from the operand that knows most; empty where none does."""
    for fact, key in _combined(analyzed, analyzed.steps[node]):
        support = _support(fact)
        rows = [k for k, atom in enumerate(fact.atoms) if atom.kind is Kind.SEQ and k != key]
        if support is None or not rows:
            continue
        names = letters(fact) | {index(key): J, index(rows[0]): I}
        told = sympy.sympify(support).xreplace(names)
        proof = causality(told, known)
        if proof:
            return formula(told, known), proof
    return "", ""


def _support(fact: Fact) -> Boolean | None:
    if fact.fill in (Fill.ZERO, Fill.NEG_INF, Fill.NEG):
        return fact.support
    found = support_of(fact.expr) if fact.expr is not None else None
    return None if found is None else found[0]
