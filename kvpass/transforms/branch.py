"""Two ways to compute one value, of which a call takes the cheaper: the other one is not computed.

In an incremental graph both stand as ordinary values, and `either` takes one of them. `lazily` makes each way, with all
that nothing else needs, a graph of its own that runs only when it is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


def either(test: Callable[[int, int], bool], new: int, rows: int, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """``yes`` where the test of the number of new rows and of all rows holds, else ``no``."""
    return yes if test(new, rows) else no


def is_either(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "function", None) is either


def lazily(module: fx.GraphModule) -> fx.GraphModule:
    """The same function; only what a call takes is computed."""
    if not any(is_either(node) for node in module.graph.nodes):
        return module
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copied)
    graph.output(fx.map_arg(module.graph.output_node().args[0], copied.__getitem__))
    for node in list(graph.nodes):
        if is_either(node):
            _outline(module, graph, node)
    graph.lint()
    return fx.GraphModule(module, graph)


def _outline(root: torch.nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    new, rows, *ways = node.args
    own = [_exclusive(graph, node, way) for way in ways]  # type: ignore[arg-type]
    outer: dict[fx.Node, None] = {}
    for nodes in own:
        outer |= {a: None for n in nodes for a in n.all_input_nodes if a not in nodes}
    outer |= {way: None for way, nodes in zip(ways, own, strict=True) if way not in nodes}  # type: ignore[misc]
    parts = [_part(root, nodes, list(outer), way) for nodes, way in zip(own, ways, strict=True)]  # type: ignore[arg-type]
    (test,) = node.target.static  # type: ignore[union-attr]

    def taken(new: int, rows: int, *args: Any) -> Any:
        return parts[0 if test(new, rows) else 1](*args)

    taken.__name__ = taken.__qualname__ = "taken"
    taken.ways = parts  # type: ignore[attr-defined]
    with graph.inserting_before(node):
        made = graph.call_function(taken, (new, rows, *outer))
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    for nodes in own:
        for dead in reversed(nodes):
            graph.erase_node(dead)


def _exclusive(graph: fx.Graph, node: fx.Node, way: fx.Node) -> dict[fx.Node, None]:
    """What is computed for one way and nothing else, in order."""
    behind, todo = set[fx.Node](), [way]
    while todo:
        here = todo.pop()
        if here not in behind and here.op != "placeholder":
            behind.add(here)
            todo += here.all_input_nodes
    mine: dict[fx.Node, None] = {}
    for here in reversed(graph.nodes):
        if here in behind and all(user in mine or (user is node and here is way) for user in here.users):
            mine[here] = None
    return dict.fromkeys(reversed(mine))


def _part(root: torch.nn.Module, nodes: dict[fx.Node, None], outer: list[fx.Node], way: fx.Node) -> Callable[..., Any]:
    part = fx.Graph()
    inner = {a: part.placeholder(a.name) for a in outer}
    for node in nodes:
        inner[node] = part.node_copy(node, inner.__getitem__)
    part.output(inner[way])
    part.lint()
    return fx.GraphModule(root, part).forward
