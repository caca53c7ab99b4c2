"""The stages of the compiler for programs: plain dictionaries, as `kvpass dump --format json` writes them.

    {"schema": 1, "stage": STAGE, "graphs": [GRAPH, ..]}

with one ``GRAPH`` per graph that Dynamo made. Each has ``proven`` (bool), ``refusals`` (`RefusalReport`), and by stage:

- ``captured``: ``nodes``, in order of execution, of ``name op args operands weights settings shape dtype source``
  and ``origin`` (`kvpass.report.view.Op`; sizes in letters: ``S`` rows, ``B`` sequences); ``weights``: their names.
- ``facts``: the same, and in each node ``fact`` or null: ``axes dtype depends`` (none, row, pair, whole) ``form fill
  support valid`` (text or null) and ``causes``, of what was lost: ``{property: {node, why}}``. ``stopped``: why the
  sweep went no further, or empty.
- ``plan``: ``slots`` (`SlotReport`), ``tail``, ``bytes_per_row``, ``output_bytes_per_row``, ``free`` (names of the
  values that are rebuilt), ``attention`` (`AttentionReport`), ``unrecognised``, ``readings``.
- ``incremental``: ``before`` and ``after`` (each ``nodes`` and ``weights``), ``rows`` of ``change`` (same, changed,
  removed, added) with the names ``before`` and ``after`` (or null), ``slots``, ``attention``.

A stage that a refused graph did not reach has ``refusals`` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kvpass.analysis.facts import Fact
from kvpass.analysis.sweep import Analyzed
from kvpass.ir import Captured
from kvpass.report.compare import compare
from kvpass.report.formula import Leaves, formula
from kvpass.report.gather import graph_report
from kvpass.report.names import Sizes, display_names, leaves, letters, short
from kvpass.report.parts import Record
from kvpass.report.report import Report, plain
from kvpass.report.view import Graph, captured_view
from kvpass.transforms.plan import Plan
from kvpass.transforms.rewrite import Incremental

SCHEMA = 1


def captured_data(captured: Captured) -> dict[str, Any]:
    return _graph(captured_view(captured))


def facts_data(analyzed: Analyzed, stopped: str) -> dict[str, Any]:
    names, known, sizes = display_names(analyzed.captured), leaves(analyzed), Sizes(analyzed.captured)
    facts = {names.get(n.name, n.name): _fact(s.fact, sizes, known) for n, s in analyzed.steps.items()}
    graph = captured_data(analyzed.captured)
    nodes = [node | {"fact": facts.get(node["name"])} for node in graph["nodes"]]
    return {"nodes": nodes, "weights": graph["weights"], "stopped": stopped}


def plan_data(plan: Plan, record: Record) -> dict[str, Any]:
    part = graph_report(record)
    told = Report((part,)).to_dict()
    kept = ("slots", "bytes_per_row", "output_bytes_per_row", "attention", "unrecognised", "readings")
    free = [node.name for node in plan.analyzed.steps if node in plan.free and node.op != "placeholder"]
    return {"tail": part.tail, "free": free} | {name: told[name] for name in kept}


def incremental_data(incremental: Incremental, record: Record) -> dict[str, Any]:
    both, report = compare(incremental), graph_report(record)
    rows = [
        {
            "change": row.change.name.lower(),
            "before": row.before.name if row.before else None,
            "after": row.after.name if row.after else None,
        }
        for row in both.rows
    ]
    return {
        "before": _graph(both.before),
        "after": _graph(both.after),
        "rows": rows,
        "slots": plain(report.slots),
        "attention": plain(report.attention),
    }


def _graph(graph: Graph) -> dict[str, Any]:
    return {"nodes": [_listed(asdict(op)) for op in graph.ops], "weights": list(graph.weights)}


def _listed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _fact(fact: Fact, sizes: Sizes, known: Leaves) -> dict[str, Any]:
    names = letters(fact)
    depends = "whole" if fact.whole else {0: "none", 1: "row"}.get(len(fact.deps), "pair")
    return {
        "axes": sizes.axes(fact),
        "dtype": short(fact.dtype),
        "depends": depends,
        "form": None if fact.expr is None else formula(fact.expr.xreplace(names), known),
        "fill": None if fact.fill is None else fact.fill.value,
        "support": None if fact.fill is None else formula(fact.support.xreplace(names), known),
        "valid": formula(fact.valid.xreplace(names), known),
        "causes": {name: {"node": cause.node, "why": cause.why} for name, cause in fact.tainted()},
    }
