"""Hoisting: what depends on the context alone is computed once per context.

An encoder, and the keys and values of a cross-attention, are the same in every step of a text. They are cut off the
incremental graph as a graph of their own, whose results the runtime remembers under the contents of the context.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from kvpass.analysis.sweep import sym
from kvpass.ir import Captured, Role
from kvpass.transforms.plan import HEAVY
from kvpass.transforms.rewrite import Incremental


@dataclass(frozen=True)
class Hoisted:
    """An incremental graph in two.

    Attributes:
        names: of the values that are remembered, in order.
        context: from the captured graph's arguments to those values.
        step: the incremental graph, with those values as its last arguments.
    """

    names: tuple[str, ...]
    context: fx.GraphModule
    step: fx.GraphModule


def hoist(incremental: Incremental) -> Hoisted | None:
    """Cut off what depends on context and weights alone; None where no product is among it."""
    graph = incremental.module.graph
    reads_context = fixed(graph, incremental.plan.analyzed.captured)
    alone = [n for n, reads in reads_context.items() if reads and n.op == "call_function"]
    heavy = {n.name for n in incremental.plan.analyzed.steps if n.target in HEAVY}
    if not any(incremental.origin.get(node.name) in heavy for node in alone):
        return None
    needed = [node for node in alone if any(not reads_context.get(user) for user in node.users)]
    context, moved = apart(graph, reads_context, len(incremental.plan.analyzed.captured.inputs))
    step = fx.Graph()
    kept = {node: step.node_copy(node) for node in graph.find_nodes(op="placeholder")}
    kept |= {node: step.placeholder(f"hoisted_{node.name}") for node in needed}
    for node in graph.nodes:
        if node.op != "placeholder" and not reads_context.get(node):
            kept[node] = step.node_copy(node, kept.__getitem__)
    context.output(tuple(moved[node] for node in needed))
    for made in (context, step):
        made.eliminate_dead_code()
        made.lint()
    root = incremental.module
    return Hoisted(tuple(n.name for n in needed), fx.GraphModule(root, context), fx.GraphModule(root, step))


def apart(
    graph: fx.Graph, reads_context: dict[fx.Node, bool], arguments: int
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A graph of its own of what `fixed` found, which has no output yet; and what each value is in it.

    Args:
        arguments: how many of the inputs it takes.
    """
    made = fx.Graph()
    moved = {node: made.node_copy(node) for node in list(graph.find_nodes(op="placeholder"))[:arguments]}
    for node in reads_context:
        if node.op != "placeholder":
            moved[node] = made.node_copy(node, moved.__getitem__)
    return made, moved


def fixed(graph: fx.Graph, captured: Captured) -> dict[fx.Node, bool]:
    """The values that read nothing but context, weights and sizes other than the text's: do they read the context?

    Args:
        graph: the captured one, or one with the same inputs.
    """
    lengths = {n.name for n in captured.module.graph.nodes if n.op == "placeholder" and _is_length(n, captured.seq)}
    roles = {i.name: i.role for i in captured.of(Role.CONTEXT, Role.CONSTANT, Role.SYMBOL) if i.name not in lengths}
    reads_context: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in roles:
                reads_context[node] = roles[node.name] is Role.CONTEXT
        elif node.op == "get_attr":
            reads_context[node] = False
        elif node.op == "call_function" and all(n in reads_context for n in node.all_input_nodes):
            reads_context[node] = any(reads_context[n] for n in node.all_input_nodes)
    return reads_context


def _is_length(node: fx.Node, seq: sympy.Symbol) -> bool:
    value = node.meta["val"]
    return not isinstance(value, torch.Tensor) and sym(value).has(seq)
