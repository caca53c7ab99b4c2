"""The two graphs as lines that a person can read: sizes in letters, weights by their names, no bookkeeping.

Arithmetic on sizes is folded into the ops that use it, so that ``reshape(linear, [2, N, 4, 8])`` says what it means:
``S`` rows of which ``P`` are in the cache and ``N = S - P`` are new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from kvpass.analysis.sweep import source_of, sym
from kvpass.ir import Attention, Captured, Role
from kvpass.report.formula import Leaves, formula
from kvpass.report.names import SEQ, Sizes, display_names, leaves, short
from kvpass.report.reading import op_name
from kvpass.transforms.rewrite import Incremental

PAST, NEW = (sympy.Symbol(letter, integer=True, nonnegative=True) for letter in "PN")
_SILENT = {"pin_memory", "layout", "device"}  # one graph lives on one device, in one layout
_END = 2**63 - 1


@dataclass(frozen=True)
class Op:
    """One line of a graph.

    Attributes:
        name: the value's name. ``op``: what computes it, ``input`` for an argument, ``output`` for what is returned.
        args: its arguments as text. ``operands``: the names among them that are lines of the same graph.
        weights: the parameters and buffers it reads.
        settings: its arguments that are no values of the graph.
        shape, dtype: where they are known.
        origin: in the incremental graph, the captured value it came from.
    """

    name: str
    op: str
    args: str = ""
    operands: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    shape: str = ""
    dtype: str = ""
    source: str = ""
    origin: str = ""

    def __str__(self) -> str:
        if self.op == "input":
            return f"{self.name}: {self.dtype} {self.shape}".rstrip(": ")
        return f"return {self.args}" if self.op == "output" else f"{self.name} = {self.op}({self.args})"


@dataclass(frozen=True)
class Graph:
    """Lines in execution order. ``weights``: the parameters and buffers, by name, that the lines mention."""

    ops: tuple[Op, ...]
    weights: tuple[str, ...] = ()


def captured_view(captured: Captured) -> Graph:
    """The functional ATen graph as it was captured."""
    numbers = {
        node: sym(node.meta["val"])
        for node in captured.module.graph.nodes
        if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))
    }
    return _Viewer(captured, numbers).graph(captured.module.graph)


def incremental_view(incremental: Incremental) -> Graph:
    """The graph that computes new rows only."""
    captured = incremental.plan.analyzed.captured
    symbols = {node.name: sym(node.meta["val"]) for node in captured.module.graph.nodes if _is_symbol(node, captured)}
    symbols |= {"rows": captured.seq, "start": PAST}
    numbers: dict[fx.Node, Any] = {}
    for node in incremental.module.graph.nodes:
        value = symbols.get(node.name) if node.op == "placeholder" else _computed(node, numbers)
        if value is not None:
            numbers[node] = value
    viewer = _Viewer(captured, numbers, incremental.origin, leaves(incremental.plan.analyzed))
    return viewer.graph(incremental.module.graph)


def _is_symbol(node: fx.Node, captured: Captured) -> bool:
    return node.op == "placeholder" and any(i.name == node.name for i in captured.of(Role.SYMBOL))


def _computed(node: fx.Node, numbers: Mapping[fx.Node, Any]) -> Any:
    """Arithmetic on sizes, followed; None for everything that makes a tensor."""
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload) or not node.args:
        return None
    if not all(isinstance(arg, (int, float)) or arg in numbers for arg in node.args) or node.kwargs:
        return None
    args = [numbers[arg] if isinstance(arg, fx.Node) else sympy.sympify(arg) for arg in node.args]
    function = {max: sympy.Max, min: sympy.Min, int: sympy.floor, float: lambda x: x}.get(node.target, node.target)
    try:
        return sympy.sympify(function(*args))
    except (TypeError, sympy.SympifyError):
        return None


@dataclass
class _Viewer:
    captured: Captured
    numbers: Mapping[fx.Node, Any]
    origin: Mapping[str, str] = field(default_factory=dict)
    known: Leaves = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names, self.sizes = display_names(self.captured), Sizes(self.captured)
        self.roles = {given.name: given.role for given in self.captured.inputs}

    def graph(self, graph: fx.Graph) -> Graph:
        ops, weights = [], []
        for node in graph.nodes:
            if node in self.numbers:
                continue
            if self.is_weight(node):
                weights.append(self.name(node))
            elif node.op != "placeholder" or node.users or node.name in self.roles:
                ops.append(self.op(node))
        return Graph(tuple(ops), tuple(weights))

    def is_weight(self, node: fx.Node) -> bool:
        return node.op == "get_attr" or self.roles.get(node.name) is Role.CONSTANT

    def name(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "get_attr" else self.names.get(node.name, node.name)

    def op(self, node: fx.Node) -> Op:
        kind = {"placeholder": "input", "output": "output"}.get(node.op) or op_name(node)
        used = [n for n in node.all_input_nodes if n not in self.numbers]
        value = node.meta.get("val")
        shape = dtype = ""
        if isinstance(value, torch.Tensor):
            shape, dtype = self.sizes.shape(sym(size) for size in value.shape), short(value.dtype)
        origin = self.origin.get(node.name, "")
        settings = [(None, a) for a in _stated(node, self.known)] + [
            (k, a) for k, a in node.kwargs.items() if k not in _SILENT
        ]
        shown = [self.value(a) if k is None else f"{k}={self.value(a)}" for k, a in settings]
        return Op(
            name=self.name(node),
            op=kind,
            args=", ".join(shown) if node.op != "placeholder" else "",
            operands=tuple(self.name(n) for n in used if not self.is_weight(n)),
            weights=tuple(self.name(n) for n in used if self.is_weight(n)),
            settings=tuple(t for t, (_, a) in zip(shown, settings, strict=True) if not _mentions(a, self.numbers)),
            shape=shape,
            dtype=dtype,
            source=source_of(node),
            origin=self.names.get(origin, origin),
        )

    def value(self, arg: Any) -> str:
        """An argument as text."""
        if isinstance(arg, fx.Node):
            return self.number(self.numbers[arg]) if arg in self.numbers else self.name(arg)
        if isinstance(arg, (list, tuple)):
            left, right = "[]" if isinstance(arg, list) else "()"
            return f"{left}{', '.join(map(self.value, arg))}{right}"
        if isinstance(arg, torch.dtype):
            return short(arg)
        if isinstance(arg, float):
            return f"{arg:.6g}"
        return "end" if arg == _END and isinstance(arg, int) else str(arg)

    def number(self, value: Any) -> str:
        """A size, with ``N`` for ``S - P`` where that is shorter."""
        told = sympy.expand(sympy.sympify(value).xreplace(self.sizes.named))
        new = sympy.expand(told.xreplace({SEQ: PAST + NEW}))
        return str(new if PAST in told.free_symbols and PAST not in new.free_symbols else told)


def _stated(node: fx.Node, known: Leaves) -> list[Any]:
    """Positional arguments; a function with bound arguments says what these are, and leaves out what is empty."""
    static = getattr(node.target, "static", ())
    if not static:
        return list(node.args)
    said = [text for text in (_bound(value, known) for value in static) if text]
    return said + [arg for arg in node.args if not _only_names(arg)]


def _only_names(arg: Any) -> bool:
    """A tuple that is empty or holds nothing but the names of the loads beside it."""
    return isinstance(arg, tuple) and all(isinstance(entry, str) for entry in arg)


def _bound(value: Any, known: Leaves) -> str:
    if isinstance(value, Attention):
        return f"{value.heads} heads over {value.kv_heads}"
    return formula(value, known) if isinstance(value, sympy.Basic) else ""


def _mentions(arg: Any, numbers: Mapping[fx.Node, Any]) -> bool:
    """True where an argument is or holds a value of the graph."""
    if isinstance(arg, fx.Node):
        return arg not in numbers
    return any(_mentions(a, numbers) for a in arg) if isinstance(arg, (list, tuple)) else False
