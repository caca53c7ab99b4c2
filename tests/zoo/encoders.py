"""Is the encoder of a compiled model computed once per encoder input?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from kvpass.ir import Role
from kvpass.runtime.keys import tensor_bytes
from kvpass.runtime.program import Program
from kvpass.transforms.plan import HEAVY
from kvpass.transforms.rewrite import Incremental


def heard(calls: Sequence[Mapping[str, Any]], growing: str) -> int:
    """How many encoder inputs differ among calls: every tensor but the text and what grows with it, by contents."""
    tensors = [{k: v for k, v in call.items() if isinstance(v, torch.Tensor) and k != growing} for call in calls]
    shapes = {k: {v.shape[1:] for call in tensors for v in [call[k]]} for k in tensors[0]}
    kept = [k for k, seen in shapes.items() if len(seen) == 1]
    return len({tuple(tensor_bytes(call[k]) for k in kept) for call in tensors if kept})


def not_hoisted(programs: Sequence[Program], inputs: int) -> str:
    """Why the encoder is computed more often than once for each of its ``inputs``; empty where it is not.

    Args:
        inputs: how many encoder inputs there were; 0 where nothing was heard.
    """
    serving = [
        p for p in programs if p.incremental is not None and p.incremental.plan.analyzed.captured.of(Role.CONTEXT)
    ]
    if not inputs or not programs:
        return ""
    if not serving:
        return "no graph has an encoder input"
    for program in serving:
        left, runs = in_each_step(program), program.remembered.computed if program.remembered else 0
        if program.hoisted is None:
            return "there is no graph of the context alone"
        if left:
            return f"{len(left)} products of the encoder are computed in every call, the first is {left[0]}"
        if runs > inputs:
            return f"the encoder ran {runs} times for {inputs} inputs"
    return ""


def in_each_step(program: Program) -> list[str]:
    """Products that depend on the context and on no row, and that are computed in the graph of every call."""
    assert program.incremental is not None
    module = program.incremental.module if program.hoisted is None else program.hoisted.step
    origins = {program.incremental.origin.get(node.name, "") for node in module.graph.nodes}
    return [name for name in _of_context(program.incremental) if name in origins]


def _of_context(incremental: Incremental) -> list[str]:
    analyzed = incremental.plan.analyzed
    reads: set[fx.Node] = set()
    roles = {given.name: given.role for given in analyzed.captured.inputs}
    for node, step in analyzed.steps.items():
        if roles.get(node.name) is Role.CONTEXT or any(x in reads for x in step.operands):
            reads.add(node)
    return [n.name for n in analyzed.steps if n in reads and n.target in HEAVY and analyzed.fact(n).index_only()]
