"""Autocast, written out: a graph in which every op is told the precision that it runs in.

What autocast does is done below the ops of a graph, and by lists that are PyTorch's own. So each op is run once under
autocast, on values without contents, and what reaches the dispatcher is noted: conversions of its operands, then the
op itself. Where the same is heard of the op when it is given converted operands and autocast is off, that stands in the
graph; else the ops that reached the dispatcher do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kvpass import errors
from kvpass.analysis.sweep import source_of
from kvpass.frontend import export
from kvpass.frontend.export import type_of, value_of

_CONVERT = torch.ops.aten._to_copy.default
State = tuple[tuple[str, torch.dtype], ...]  # the kinds of devices for which autocast is on, and to what


@dataclass(frozen=True)
class Around:
    """Autocast around a call.

    Attributes:
        devices: kinds of devices that the call's tensors are on.
        state: what is on.
    """

    devices: tuple[str, ...]
    state: State

    @classmethod
    def of(cls, args: Sequence[Any]) -> Around:
        """What is around a call with these arguments now."""
        devices = tuple(sorted({x.device.type for x in args if isinstance(x, Tensor)} & {"cpu", "cuda"}))
        state = tuple((d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d))
        return cls(devices, state)

    @contextmanager
    def entered(self, state: State) -> Iterator[None]:
        """Another state, whatever is on now."""
        on = dict(state)
        with ExitStack() as stack:
            for device in self.devices:
                dtype = on.get(device)
                stack.enter_context(torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False))
            yield

    def off(self) -> AbstractContextManager[None]:
        """Autocast is off where it was on."""
        return self.entered(()) if self.state else nullcontext()

    def on(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs under what is around now."""
        return self._under(self.state, function)

    def without(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs with autocast off."""
        return self._under((), function)

    def _under(self, state: State, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.state:
            return function

        def call(*args: Any) -> Any:
            with self.entered(state):
                return function(*args)

        return call


def written(gm: fx.GraphModule, around: Around) -> fx.GraphModule:
    """The same graph for a call in which autocast is off, every conversion spelled out; itself where it is never on.

    Args:
        gm: Dynamo's graph, which was made under what is around the call.

    Raises:
        Autocast: an op cannot be run alone.
    """
    states = dict(_states(gm.graph, around))
    if not any(states.values()):
        return gm
    writer = _Writer(around)
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.target in (_enter_autocast, _exit_autocast):
            continue
        told = writer.told(node, states[node]) if states.get(node) else {}
        if isinstance(told, fx.GraphModule):
            places = zip(told.graph.find_nodes(op="placeholder"), _operands(node), strict=True)
            made[node] = cast(fx.Node, graph.graph_copy(told.graph, {place: made[x] for place, x in places}))
            continue
        converted: dict[fx.Node, fx.Node] = {}
        for operand, dtype in told.items():
            converted[operand] = copy = graph.call_method("to", (made[operand], dtype))
            copy.meta = _place(node)
            with around.entered(()):
                copy.meta["example_value"] = value_of(operand).to(dtype)
        made[node] = graph.node_copy(node, lambda x: converted.get(x) or made[x])  # noqa: B023
    result = fx.GraphModule(gm, graph)
    result.meta = gm.meta
    return result


def _states(graph: fx.Graph, around: Around) -> Iterator[tuple[fx.Node, State]]:
    """For each op, what is on."""
    stack = [around.state]
    for node in graph.nodes:
        if node.target is _enter_autocast:
            device, dtype, enabled, *_ = node.args
            others = tuple((d, t) for d, t in stack[-1] if d != device)
            on = enabled and device in around.devices
            stack.append((*others, (device, dtype or torch.get_autocast_dtype(device))) if on else others)
        elif node.target is _exit_autocast:
            stack.pop()
        elif node.op in ("call_function", "call_method", "call_module"):
            yield node, stack[-1]


def _operands(node: fx.Node) -> list[fx.Node]:
    return list(dict.fromkeys(node.all_input_nodes))


def _place(node: fx.Node) -> dict[str, Any]:
    """Where an op was written."""
    return {name: value for name, value in node.meta.items() if name in ("stack_trace", "nn_module_stack")}


@dataclass
class _Writer:
    around: Around
    known: dict[Hashable, tuple[tuple[int, torch.dtype], ...] | None] = field(default_factory=dict)

    def told(self, node: fx.Node, state: State) -> dict[fx.Node, torch.dtype] | fx.GraphModule:
        """The operands that an op converts, and to what; or all that it is, where it does more.

        Raises:
            Autocast: the op cannot be run alone.
        """
        try:
            return self._told(node, _operands(node), state)
        except Exception as error:
            detail = f"what autocast makes of {_name(node)} cannot be seen: {type(error).__name__}: {error}"
            raise errors.Autocast(detail=detail.splitlines()[0], source=source_of(node)) from error

    def _told(
        self, node: fx.Node, operands: Sequence[fx.Node], state: State
    ) -> dict[fx.Node, torch.dtype] | fx.GraphModule:
        place = {x: k for k, x in enumerate(operands)}
        key = (state, export.call(node, place.__getitem__), tuple(type_of(value_of(x)) for x in operands))
        values = [x.detach() if isinstance(x := value_of(operand), Tensor) else x for operand in operands]
        if key not in self.known:
            casts = self._casts(node, operands, values, state)
            self.known[key] = None if casts is None else tuple(casts.items())
        found = self.known[key]
        return self._traced(node, operands, values, state) if found is None else {operands[k]: t for k, t in found}

    def _casts(
        self, node: fx.Node, operands: Sequence[fx.Node], values: Sequence[Any], state: State
    ) -> dict[int, torch.dtype] | None:
        """The conversions by the number of the operand; None where they are not all."""
        at = [k for k, value in enumerate(values) if isinstance(value, Tensor)]
        if not any(values[k].is_floating_point() for k in at):
            return {}
        heard = self._heard(values, partial(_run, node, operands), state)
        casts: dict[int, torch.dtype] = {}
        for op, args, kwargs, _ in heard.ops:
            if op is not _CONVERT or set(kwargs) != {"dtype"} or args[0].at >= len(at):
                break
            casts[at[args[0].at]] = kwargs["dtype"]
        if len(casts) < sum(op is _CONVERT for op, *_ in heard.ops) or (casts and heard.writes):
            return None

        def converted(given: Sequence[Any]) -> None:
            new = {k: given[k].to(dtype) for k, dtype in casts.items()}
            _run(node, operands, [new.get(k, value) for k, value in enumerate(given)])

        again = self._heard(values, converted, ())
        return casts if heard.ops == again.ops else None

    def _traced(
        self, node: fx.Node, operands: Sequence[fx.Node], values: Sequence[Any], state: State
    ) -> fx.GraphModule:
        """The ops that reach the dispatcher."""
        with self._alone(values, state):
            module: fx.GraphModule = make_fx(lambda *given: _run(node, operands, given))(*values)
        for made in module.graph.nodes:
            made.meta = {"example_value": made.meta.get("val")} | _place(node)
        return module

    @contextmanager
    def _alone(self, values: Sequence[Any], state: State) -> Iterator[None]:
        mode = next((x.fake_mode for x in values if isinstance(x, FakeTensor)), None)
        with torch.no_grad(), nullcontext() if mode is None else mode, self.around.entered(state):
            yield

    def _heard(self, values: Sequence[Any], run: Callable[[Sequence[Any]], Any], state: State) -> _Listener:
        """What reaches the dispatcher when an op is run."""
        listener = _Listener([x for x in values if isinstance(x, Tensor)])
        with self._alone(values, state), listener:
            run(values)
        return listener


def _run(node: fx.Node, operands: Sequence[fx.Node], values: Sequence[Any]) -> Any:
    known = dict(zip(operands, values, strict=True))
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


@dataclass(frozen=True)
class _Number:
    """A tensor, by the order in which it was met."""

    at: int


class _Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the ops that reach the dispatcher.

    Attributes:
        ops: each with its arguments, tensors by number, and the types of its results.
        writes: whether one of them writes into a tensor.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.writes = False
        self._count = itertools.count()
        self._numbers: dict[int, _Number] = {}
        self._held: list[Tensor] = []  # alive, so that no other tensor has its address
        self._converted: dict[Any, _Number] = {}
        for tensor in given:
            self._named(tensor)

    def _named(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return type_of(value)
        if id(value) not in self._numbers:
            self._held.append(value)
            self._numbers[id(value)] = _Number(next(self._count))
        return self._numbers[id(value)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question
            return func(*args, **kwargs)
        heard = func, pytree.tree_map(self._named, args), pytree.tree_map(self._named, kwargs)
        result = func(*args, **kwargs)
        if func is _CONVERT:  # what is converted twice is one value
            heard = func, heard[1], dict(kwargs)
            key = heard[1], tuple(kwargs.items())
            if key in self._converted:
                self._numbers[id(result)] = self._converted[key]
                self._held.append(result)
                return result
            self._converted[key] = self._named(result)
        self.writes |= func._schema.is_mutable
        self.ops.append((*heard, pytree.tree_map(lambda x: (self._named(x), type_of(x)), result)))
        return result
