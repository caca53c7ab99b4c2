"""Weights that wrap plain tensors, as quantised ones do: the graph takes what they wrap, and says how they use it.

Analysis, cache and kernels know plain tensors. A wrapper's own words for its parts (`__tensor_flatten__`) are all that
is asked of it; what its ops do with them is traced like everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import AttrSource
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvpass.frontend.capture import is_constant
from kvpass.frontend.export import value_of


@dataclass(frozen=True)
class _Wrapper:
    """How a tensor is made of others.

    Attributes:
        names: of its attributes that are tensors; ``inner`` how each is made, None for a plain one.
        context: what its class needs besides.
    """

    kind: Any
    names: tuple[str, ...]
    inner: tuple[_Wrapper | None, ...]
    context: Any
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Any) -> _Wrapper | None:
        if not is_traceable_wrapper_subclass(tensor):
            return None
        names, context = tensor.__tensor_flatten__()
        inner = tuple(_Wrapper.of(getattr(tensor, name)) for name in names)
        return _Wrapper(type(tensor), tuple(names), inner, context, tuple(tensor.shape), tuple(tensor.stride()))

    def paths(self, before: str = "") -> list[str]:
        """Where the plain tensors are."""
        found: list[str] = []
        for name, inner in zip(self.names, self.inner, strict=True):
            found += [before + name] if inner is None else inner.paths(f"{before}{name}.")
        return found

    def __call__(self, *plain: torch.Tensor) -> Any:
        """The tensor again, of its plain ones."""
        rest = iter(plain)
        return self._made(lambda: next(rest))

    def _made(self, take: Callable[[], torch.Tensor]) -> Any:
        parts = {n: take() if w is None else w._made(take) for n, w in zip(self.names, self.inner, strict=True)}
        return self.kind.__tensor_unflatten__(parts, self.context, self.size, self.stride)

    @property
    def __name__(self) -> str:
        return f"as_{self.kind.__name__}"

    __hash__ = object.__hash__  # a context need not have one; of equal wrappers a graph holds one


class Unwrapping:
    """The arguments of a graph of plain tensors.

    Attributes:
        idle: they are those of the graph that it was made of.
    """

    def __init__(self, paths: Sequence[Sequence[str]]) -> None:
        self.idle = not any(paths)
        self._take = [(k, attrgetter(path) if path else None) for k, held in enumerate(paths) for path in held or [""]]

    def __call__(self, args: Sequence[Any]) -> Sequence[Any]:
        return args if self.idle else [args[k] if take is None else take(args[k]) for k, take in self._take]


def unwrapped(gm: fx.GraphModule, real: Sequence[Any]) -> tuple[fx.GraphModule, Unwrapping]:
    """The same graph over plain tensors, and what to call it with.

    A wrapper is put together again in front of each op that reads it: nothing but plain tensors lives long. What the
    caller passes stays as it is.

    Args:
        gm: Dynamo's graph.
        real: its arguments.
    """
    places = gm.graph.find_nodes(op="placeholder")
    wrappers = [
        _Wrapper.of(value) if is_constant(place, given) and isinstance(value := value_of(place), torch.Tensor) else None
        for place, given in zip(places, real, strict=True)
    ]
    unwrapping = Unwrapping([[] if wrapper is None else wrapper.paths() for wrapper in wrappers])
    if unwrapping.idle:
        return gm, unwrapping
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    parts: dict[fx.Node, list[fx.Node]] = {}
    known: list[_Wrapper] = []  # of equal ones the first: ops that are alike have one target
    of = dict(zip(places, wrappers, strict=True))
    for node in gm.graph.nodes:
        wrapper = of.get(node)
        if wrapper is not None:
            parts[node] = [_part(graph, node, path) for path in wrapper.paths()]
            if wrapper not in known:
                known.append(wrapper)
            of[node] = known[known.index(wrapper)]
            continue
        for read in node.all_input_nodes:
            if read in parts:
                made[read] = graph.call_function(of[read], tuple(parts[read]))
                made[read].meta["example_value"] = value_of(read)
        made[node] = graph.node_copy(node, made.__getitem__)
    return fx.GraphModule(gm, graph), unwrapping


def _part(graph: fx.Graph, place: fx.Node, path: str) -> fx.Node:
    """A placeholder for a plain tensor inside of another one's."""
    node = graph.placeholder(f"{place.name}_{path.replace('.', '_')}")
    node.meta = dict(place.meta)
    node.meta["example_value"] = attrgetter(path)(value_of(place))
    given = place.meta.get("grapharg")
    if given is not None:
        source = given.source
        for name in path.split("."):
            source = AttrSource(source, name)
        node.meta["grapharg"] = replace(given, source=source)
    return node
