"""Facts of a graph that was refused: of all values, or of those before the one that has no rule."""

from __future__ import annotations

import dataclasses

from torch import fx

from kvpass import errors
from kvpass.analysis.sweep import Analyzed, analyze
from kvpass.ir import Captured
from kvpass.report.parts import Record, incremental_of


def facts_of(record: Record) -> tuple[Analyzed | None, str]:
    """The facts that the analysis reached, and why it reached no further (empty where it saw everything)."""
    incremental = incremental_of(record)
    if incremental is not None:
        return incremental.plan.analyzed, ""
    if record.captured is None:
        return None, ""
    try:
        return analyze(record.captured), ""
    except errors.Refusal as refusal:
        stopped = f"{refusal.code}: {refusal.message} (node {refusal.node})"
        return analyze(_before(record.captured, refusal.node)), stopped


def _before(captured: Captured, stop: str) -> Captured:
    """The graph up to a node; it returns nothing."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in captured.module.graph.nodes:
        if node.name == stop or node.op == "output":
            break
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(())
    return dataclasses.replace(captured, module=fx.GraphModule(captured.module, graph))
