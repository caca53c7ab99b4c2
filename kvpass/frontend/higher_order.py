"""Higher-order ops that Dynamo leaves whole: parts of a model that are compiled or recomputed as one are their ops, and
`flex_attention` is products, a softmax and two functions.

PyTorch maps the score and the mask function over all pairs with `vmap`. They are scalar functions, so the same comes of
calling them once, on indices that broadcast; that they are is looked at op by op. A block mask says which blocks a
kernel may skip, and its mask function says all that it does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._functorch import predispatch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kvpass.frontend.vmap import regions

aten = torch.ops.aten
_FLEX = torch.ops.higher_order.flex_attention
_COPIES = (aten._to_copy.default, aten.clone.default, aten.detach.default, aten.alias.default)
_INDICES = 4  # batch, head, query and key
_BODIES = (torch.ops.higher_order.invoke_subgraph, torch.ops.higher_order.tag_activation_checkpoint)


def inlined(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with the ops of `torch.compiler.nested_compile_region` and of `torch.utils.checkpoint` in place of
    calls of them; itself where there is none.
    """
    if not any(node.target in _BODIES for node in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    _copy(graph, gm, {}, "")
    result = fx.GraphModule(gm, graph)
    result.meta = gm.meta
    return result


def _copy(graph: fx.Graph, module: fx.GraphModule, made: dict[fx.Node, Any], path: str) -> Any:
    """Add the nodes of a module to a graph, and say what it returns; ``made`` knows the placeholders of a body."""
    for node in module.graph.nodes:
        if node.op == "output":
            returned = fx.map_arg(node.args[0], made.__getitem__)
            return graph.output(returned) if not path else returned
        if node in made or (node.op == "get_attr" and all(user.target in _BODIES for user in node.users)):
            continue
        if node.target in _BODIES:
            name = str(node.args[0].target)
            body = operator.attrgetter(name)(module)
            operands = node.args[2:] if node.target is _BODIES[0] else node.args[1:]
            places = body.graph.find_nodes(op="placeholder")
            given = (made[x] if isinstance(x, fx.Node) else x for x in operands)
            made[node] = _copy(graph, body, dict(zip(places, given, strict=True)), f"{path}{name}.")
        elif node.target is operator.getitem and not isinstance(of := made.get(node.args[0]), fx.Node | None):
            made[node] = of[node.args[1]]
        else:
            made[node] = copy = graph.node_copy(node, made.__getitem__)
            if node.op in ("get_attr", "call_module"):
                copy.target = path + str(node.target)
    raise AssertionError("a graph without an output")


def expanded(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every such op spelled out; itself where there is none."""
    if not any(node.target is _FLEX for node in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in list(graph.nodes):
        if node.target is _FLEX:
            _spell(gm, graph, node)
    _drop_unread(graph)
    return fx.GraphModule(gm, graph)


def _spell(gm: fx.GraphModule, graph: fx.Graph, node: fx.Node) -> None:
    names = ("query", "key", "value", "score_mod", "block_mask", "scale", "options", "score_reads", "mask_reads")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return  # the logarithms of the sums are read as well
    functions = []
    for name, first, buffers in ((given["score_mod"], 1, "score_reads"), (given["block_mask"][-1], 0, "mask_reads")):
        function = _broadcasting(getattr(gm, str(name.target)), first + _INDICES)
        if function is None:
            return
        functions.append((function, given.get(buffers, ())))
    with graph.inserting_before(node):
        operands = (given["query"], given["key"], given["value"], given["scale"])
        reads = tuple(reads for _, reads in functions)
        made = graph.call_function(_attention(*(function for function, _ in functions)), (*operands, *reads))
        made.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
    for user in list(node.users):
        user.replace_all_uses_with(made)
        graph.erase_node(user)
    graph.erase_node(node)


def _attention(score_of: Callable[..., Tensor], mask_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention ``[B, H, S, D]`` in the ops, and the precision, of PyTorch's own reference."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, scale: float, score_reads: Sequence[Any], mask_reads: Sequence[Any]
    ) -> Tensor:
        precise = torch.promote_types(query.dtype, torch.float32)
        group = query.shape[1] // key.shape[1]
        if group > 1:
            key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        scores = query.to(precise) @ key.to(precise).transpose(-2, -1) * scale
        shape = [[-1, 1, 1, 1], [-1, 1, 1], [-1, 1], [-1]]
        sizes = zip(scores.shape, shape, strict=True)
        indices = [torch.arange(size, device=query.device).view(axes) for size, axes in sizes]
        scores = score_of(scores, *indices, *score_reads)
        kept = mask_of(*indices, *mask_reads)
        if kept.dim():
            scores = scores.masked_fill(~kept, float("-inf"))
        return torch._safe_softmax(scores, -1).to(query.dtype) @ value.to(query.dtype)

    return attention


def _broadcasting(module: fx.GraphModule, scalars: int) -> Callable[..., Tensor] | None:
    """A function of that many scalars as one of tensors; None where broadcasting might change what it says."""
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode(), TransformGetItemToIndex():
        traced = make_fx(module)(*(_sample(node.meta["example_value"]) for node in places))
    varies: dict[fx.Node, bool] = {}
    for k, node in enumerate(traced.graph.nodes):
        if node.op == "placeholder":
            varies[node] = k < scalars
        elif node.op == "call_function":
            varies[node] = any(varies.get(x, False) for x in node.all_input_nodes) and not _only_shape(node)
            if varies[node] and not _pointwise(node, varies):
                return None
    return module


def _sample(value: Any) -> Any:
    """Something of the same shape and type, of known sizes."""
    if not isinstance(value, Tensor):
        return _known(value)
    return torch.empty([_known(size) for size in value.shape], dtype=value.dtype, device=value.device)


def _known(size: Any) -> Any:
    """A number; of a symbol the one in this call."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat)) else size


def _only_shape(node: fx.Node) -> bool:
    return node.target in (aten.new_ones.default, aten.new_zeros.default, aten.new_full.default)


def _pointwise(node: fx.Node, varies: dict[fx.Node, bool]) -> bool:
    """True where an op on scalars is one scalar, by each entry for itself."""
    if node.meta["val"].dim():
        return False
    if node.target is aten.index.Tensor:  # an entry of a table
        return not varies.get(node.args[0], False)  # type: ignore[arg-type]
    return node.target in _COPIES or torch.Tag.pointwise in getattr(node.target, "tags", ())


# -- what nobody reads ----------------------------------------------------------------------------------------------


def _drop_unread(graph: fx.Graph) -> None:
    """Remove what nobody reads, entering and leaving a `vmap` included where nothing inside is read outside."""
    before = -1
    while before != len(graph.nodes):
        before = len(graph.nodes)
        for region in regions(graph):
            held = set(region)
            if all(set(node.users) <= held and _harmless(node, held) for node in region):
                for node in reversed(region):
                    graph.erase_node(node)
        held = {node for region in regions(graph) for node in region}
        for node in reversed(graph.nodes):
            if not node.users and node not in held and _removable(node):
                graph.erase_node(node)


def _harmless(node: fx.Node, held: set[fx.Node]) -> bool:
    """False of what writes into a tensor that was not made among these nodes."""
    if node.target is operator.setitem:
        made = node.args[0]
        return isinstance(made, fx.Node) and made in held and str(made.target).startswith("new_")
    return _removable(node) or node.op == "get_attr" or getattr(node.target, "__module__", "") == predispatch.__name__


def _removable(node: fx.Node) -> bool:
    if node.op == "call_method":
        name = str(node.target)
        return not name.startswith("__i") and (name.endswith("__") or not name.endswith("_"))  # `add_` and `__iadd__`
    return node.op == "get_attr" or (node.op == "call_function" and not node.is_impure() and "out" not in node.kwargs)
