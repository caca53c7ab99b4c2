"""`torch.vmap` in a graph of Dynamo's: the same ops on whole tensors.

Dynamo writes entering and leaving a `vmap` as calls in its graph. ATen is traced before dispatch, where they have no
meaning yet, so what stands between them is traced here, through `vmap`, and takes its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch import predispatch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kvpass import errors
from kvpass.frontend.export import cut_out, value_of


def unmapped(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph without `vmap`; itself where there is none.

    Raises:
        CaptureFailed: what stands between entering and leaving cannot be traced.
    """
    mode = next((value.fake_mode for n in gm.graph.nodes if isinstance(value := value_of(n), FakeTensor)), None)
    if mode is None or not regions(gm.graph):
        return gm
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for region in regions(graph):
        _trace(gm, graph, region, mode)
    return fx.GraphModule(gm, graph)


def regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of each outermost `vmap`, entering and leaving it included."""
    found: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if node.target is predispatch._vmap_increment_nesting:
            found += [[]] if depth == 0 else []
            depth += 1
        if depth:
            found[-1].append(node)
        depth -= node.target is predispatch._vmap_decrement_nesting
    return found


def _trace(gm: fx.GraphModule, graph: fx.Graph, region: list[fx.Node], mode: FakeTensorMode) -> None:
    """Put what a region computes in its place; nothing, where it holds functions or constants of its own."""
    inside = {node for node in region if node.op != "get_attr"}
    given = list(dict.fromkeys(x for node in region if node in inside for x in node.all_input_nodes if x not in inside))
    read = [node for node in region if node in inside and any(user not in inside for user in node.users)]
    if not all(isinstance(value_of(node), (Tensor, torch.SymInt, int, float)) for node in given):
        return
    run = fx.Interpreter(cut_out(gm, [node for node in region if node in inside], given, read)).run
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        with mode, torch.no_grad():
            traced = make_fx(run)(*(value_of(node) for node in given))
    except Exception as error:
        # An error between entering and leaving leaves the `vmap` open.
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        raise errors.CaptureFailed(detail=f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    if any(node.op == "get_attr" for node in traced.graph.nodes):
        return
    places = traced.graph.find_nodes(op="placeholder")
    with graph.inserting_before(region[-1].next):
        made: Any = graph.graph_copy(traced.graph, copied := dict(zip(places, given, strict=True)))
    for node in copied.keys() - places:
        copied[node].meta["stack_trace"] = region[0].meta.get("stack_trace")
    for old, new in zip(read, made, strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
        new.meta["example_value"] = value_of(old)
    for node in reversed(region):
        if node in inside:
            graph.erase_node(node)
