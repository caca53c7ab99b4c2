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
    context, step = fx.Graph(), fx.Graph()
    kept: dict[fx.Node, fx.Node] = {}
    moved: dict[fx.Node, fx.Node] = {}
    arguments = len(incremental.plan.analyzed.captured.inputs)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for k, node in enumerate(placeholders):
        kept[node] = step.node_copy(node)
        if k < arguments:
            moved[node] = context.node_copy(node)
    for node in needed:
        kept[node] = step.placeholder(f"hoisted_{node.name}")
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node in reads_context:
            moved[node] = context.node_copy(node, moved.__getitem__)
        if not reads_context.get(node):
            kept[node] = step.node_copy(node, kept.__getitem__)
    context.output(tuple(moved[node] for node in needed))
    for made in (context, step):
        made.eliminate_dead_code()
        made.lint()
    root = incremental.module
    return Hoisted(tuple(n.name for n in needed), fx.GraphModule(root, context), fx.GraphModule(root, step))


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
