"""What a context brings for each row: frames of a sound that are added to the text, so many for each token.

Where a graph holds only for calls in which an axis that is computed of the context is as long as the text (Dynamo's
guard ``frames // 8 == S``), what stands on this axis belongs to the rows, whatever it was computed by. It is cut off: a
graph of its own makes it, and to the rest it is an input whose bytes are part of the key of its row, as embeddings are
that the caller passes. Nothing is assumed of how it was made. Where more frames leave what was made of the earlier ones
as it is, bit by bit, rows are found again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from kvpass.analysis.sweep import sym
from kvpass.ir import Captured, Input, Role
from kvpass.transforms.hoist import apart, fixed
from kvpass.transforms.normalise import is_identity
from kvpass.transforms.spell import call, named


def as_long_as(seq: sympy.Symbol, guards: Iterable[Any]) -> set[sympy.Expr]:
    """What is as long as the text in each call that the graph holds for.

    Args:
        guards: what tracing has found to hold of the sizes.
    """
    pairs = [set(guard.args) - {seq} for guard in guards if isinstance(guard, sympy.Eq) and seq in guard.args]
    return {other for (other,) in pairs if other.free_symbols and not other.has(seq)}


def with_rows_of_context(captured: Captured, lengths: set[sympy.Expr]) -> Captured | None:
    """The graph with such values as its last inputs, and `Captured.aligned`, which makes them; None without any.

    Args:
        lengths: what is as long as the text.
    """
    graph = captured.module.graph
    length = next((n for n in graph.find_nodes(op="placeholder") if _number(n) == captured.seq), None)
    if length is None:
        return None
    of_context = fixed(graph, captured)
    needed = [n for n, reads in of_context.items() if reads and any(user not in of_context for user in n.users)]
    axes = {n: axis for n in needed if (axis := _axis(captured, n, lengths)) is not None}
    if not axes:
        return None
    made, moved = apart(graph, of_context, len(captured.inputs))
    made.output(tuple(made.call_method("contiguous", (moved[node],)) for node in axes))
    made.eliminate_dead_code()
    if any(map(_is_random, made.nodes)):
        return None
    module, names = _given(captured.module, axes, lengths, length)
    first = len(captured.inputs)
    rows = [
        Input(name, first + k, Role.SEQUENCE, "", (axis,), 0 if _has_batch(captured, node) else None)
        for k, (name, (node, axis)) in enumerate(zip(names, axes.items(), strict=True))
    ]
    aligned = fx.GraphModule(captured.module, made)
    return replace(captured, module=module, inputs=(*captured.inputs, *rows), aligned=aligned)


def _is_random(node: fx.Node) -> bool:
    """True of an op that draws: what it made once is not what the model makes in another call."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()) or is_identity(node):
        return False
    return node.target is not torch.ops.aten.scaled_dot_product_attention.default or named(node)["dropout_p"] != 0


def _number(node: fx.Node) -> sympy.Expr | None:
    value = node.meta.get("val")
    return sym(value) if isinstance(value, (int, torch.SymInt)) else None


def _axis(captured: Captured, node: fx.Node, lengths: set[sympy.Expr]) -> int | None:
    """The one axis of a value that is as long as the text, where no other is made of the same sizes."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [sym(size) for size in value.shape]
    found = [k for k, size in enumerate(sizes) if size in lengths]
    symbols = {symbol for length in lengths for symbol in length.free_symbols}
    if len(found) != 1 or any(size.free_symbols & symbols for k, size in enumerate(sizes) if k not in found):
        return None
    batches = found[0] > 0 and (sizes[0] == 1 or _has_batch(captured, node))
    return found[0] if batches else None


def _has_batch(captured: Captured, node: fx.Node) -> bool:
    return bool(sym(node.meta["val"].shape[0]) == captured.batch)


def _given(
    module: fx.GraphModule, axes: dict[fx.Node, int], lengths: set[sympy.Expr], length: fx.Node
) -> tuple[fx.GraphModule, list[str]]:
    """The graph with these values as its last inputs, and their names; every size is traced anew."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node in places:
        copies[node] = graph.node_copy(node)
    for node, axis in axes.items():
        copies[node] = graph.placeholder(f"rows_of_{node.name}")
        copies[node].meta = {**node.meta, "val": _as_long(node.meta["val"], axis, length.meta["val"])}
    names = [copies[node].name for node in axes]
    with next(iter(axes)).meta["val"].fake_mode:  # sizes alone say which, where an op reads no tensor
        for node in module.graph.nodes:
            if node in copies:
                continue
            if node.op == "call_function" and _number(node) in lengths:
                copies[node] = copies[length]
            elif node.op == "call_function":
                args, kwargs = (fx.map_arg(given, copies.__getitem__) for given in (node.args, dict(node.kwargs)))
                copies[node] = call(graph, node, node.target, *args, **kwargs)
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph), names


def _as_long(value: torch.Tensor, axis: int, length: Any) -> torch.Tensor:
    shape = [length if k == axis else size for k, size in enumerate(value.shape)]
    with value.fake_mode, enable_python_dispatcher():  # type: ignore[attr-defined]
        return torch.empty(shape, dtype=value.dtype, device=value.device)
