"""Calls in a captured graph: how they are written, and read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from kvpass.analysis.sweep import sym
from kvpass.ir import by_name

aten = torch.ops.aten
JOINS = (aten.cat.default, aten.concat.default)
PADS = (aten.constant_pad_nd.default, aten.pad.default)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def named(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, in the order of its schema; what it is not given is as it is by default."""
    return by_name(node.target, node.args, node.kwargs)


def filled(pad: fx.Node) -> Any:
    """The number that one of `PADS` puts around its operand; None where it repeats entries."""
    given = named(pad)
    return (given["value"] or 0) if given.get("mode", "constant") == "constant" else None


def size_of(given: Any) -> Any:
    """A size that a call is given, a number or a value of the graph, as sympy."""
    return sym(given.meta["val"] if isinstance(given, fx.Node) else given)


def call(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A new call with its value, at the graph's insertion point, on the user's line of another node."""
    node = graph.call_function(target, args, kwargs)

    def value(a: fx.Node) -> Any:
        return a.meta["val"]

    given, named = fx.map_arg(args, value), fx.map_arg(kwargs, value)
    fakes = (leaf.fake_mode for leaf in pytree.tree_leaves((given, named)) if isinstance(leaf, FakeTensor))
    # Some ops make tensors of their own on the way; in C++ some make numbers of symbolic sizes.
    with next(fakes, nullcontext()), enable_python_dispatcher():
        node.meta = {**like.meta, "val": target(*given, **named)}
    return node


def replace(node: fx.Node, made: fx.Node) -> None:
    """One node in place of another, which goes."""
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def sizes(make: Callable[..., fx.Node], x: fx.Node) -> list[Any]:
    """The sizes of a value as arguments of a call; ``make`` is `call` for the graph and the node it is like."""
    shape = enumerate(x.meta["val"].shape)
    return [size if isinstance(size, int) else make(aten.sym_size.int, x, axis) for axis, size in shape]


def same(a: Any, b: Any, depth: int = 8) -> bool:
    """True where two values are one, or the same ops on the same values."""
    if a is b or not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return a is b or (type(a) is type(b) and bool(a == b))
    if depth == 0 or a.op != "call_function" or b.op != a.op or a.target is not b.target or a.kwargs != b.kwargs:
        return False
    if torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()):
        return False
    return len(a.args) == len(b.args) and all(same(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))
