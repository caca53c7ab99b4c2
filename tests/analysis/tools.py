"""From Python functions to facts.

A function gets the graph that Dynamo would hand over, with one symbol for the rows (every axis of `ROWS` entries) and
one for the batch (a leading axis of `BATCH` entries), and goes through the real capture, normalisation and sweep.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from kvpass.analysis.facts import Fact
from kvpass.analysis.sweep import Analyzed, analyze
from kvpass.frontend.capture import capture
from kvpass.ir import Captured
from kvpass.transforms.normalise import normalise

BATCH, ROWS = 3, 7
"""Sizes at capture. No other axis of a test may have these sizes."""


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    def kind(axis: int, size: int) -> DimDynamic:
        moves = size == ROWS or (size == BATCH and axis == 0)
        return DimDynamic.DUCK if moves and not isinstance(tensor, torch.nn.Parameter) else DimDynamic.STATIC

    sizes = [kind(axis, size) for axis, size in enumerate(tensor.shape)]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def captured_of(function: Callable[..., Any], *inputs: Tensor) -> Captured:
    """The normalised graph of ``function(*inputs)``; its first placeholders are the symbols of the sizes.

    Raises:
        Refusal: as `capture` does.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(should_record_events=False))
    mode.cache_enabled = False  # costs more than it saves where every op is new
    fakes = [_fake(mode, x) for x in inputs]
    sizes: dict[str, tuple[Any, int]] = {}
    for fake, real in zip(fakes, inputs, strict=True):
        sizes |= {
            str(d): (d, int(n)) for d, n in zip(fake.shape, real.shape, strict=True) if isinstance(d, torch.SymInt)
        }
    graph = fx.Graph()
    places = [_place(graph, f"n{k}", size) for k, (size, _) in enumerate(sizes.values())]
    arguments = tuple(_place(graph, f"a{k}", fake) for k, fake in enumerate(fakes))
    graph.output(graph.call_function(lambda *args: _pack(function(*args)), arguments))
    assert len(places) == len(sizes)
    captured = capture(fx.GraphModule(torch.nn.Module(), graph), [*(n for _, n in sizes.values()), *inputs])
    normalise(captured)
    return captured


def _place(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["example_value"] = value
    return node


def _pack(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def analysis_of(function: Callable[..., Any], *inputs: Tensor) -> Analyzed:
    return analyze(captured_of(function, *inputs))


def fact_of(function: Callable[..., Any], *inputs: Tensor) -> Fact:
    """The fact of a function's first output."""
    analyzed = analysis_of(function, *inputs)
    return analyzed.fact(analyzed.outputs[0])


def pruned(captured: Captured, *outputs: fx.Node) -> Captured:
    """The same graph with these values as its outputs, and nothing that they do not need."""
    needed, todo = set(outputs), list(outputs)
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in needed]
        needed.update(new)
        todo += new
    graph, copies = fx.Graph(), {}
    for node in captured.module.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[n] for n in outputs))
    return replace(captured, module=fx.GraphModule(captured.module, graph))


def outputs_of(captured: Captured) -> Sequence[Any]:
    return captured.module.graph.output_node().args[0]  # type: ignore[return-value]
