"""Calls written into a captured graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def call(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A new call with its value, at the graph's insertion point, on the user's line of another node."""
    node = graph.call_function(target, args, kwargs)

    def value(a: fx.Node) -> Any:
        return a.meta["val"]

    node.meta = {**like.meta, "val": target(*fx.map_arg(args, value), **fx.map_arg(kwargs, value))}
    return node
