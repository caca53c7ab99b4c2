"""The sizes of every value of an incremental graph, over the numbers that change from call to call.

The graph runs on tensors of the device ``meta``, which have sizes and no contents. No dispatch mode is entered, as
PyTorch's own tracers do: their state belongs to the whole process, and a tape is made beside a model that runs.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from sympy import Expr
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from kvpass.forked import in_child
from kvpass.lowering import ops


@dataclass(frozen=True)
class Operand:
    """One argument of the graph.

    Attributes:
        number: for a number, what it is, over the symbols; None for a tensor.
        sizes: of a dense tensor.
        fixed: a weight or a pool, whose memory stays where it is as long as the tape lives.
    """

    number: Expr | None = None
    sizes: tuple[Expr, ...] = ()
    dtype: torch.dtype = torch.float32
    fixed: torch.Tensor | None = None


class Untraceable(RuntimeError):
    """A size or a number is not known before the call."""


@dataclass(frozen=True)
class Traced:
    """Attributes:
    values: by node, tensors without contents and numbers.
    symbols: those of the operands, in the graph's own symbols.
    guards: what must hold of a call.
    """

    values: Mapping[fx.Node, Any]
    symbols: Mapping[sympy.Symbol, sympy.Symbol]
    guards: tuple[sympy.Basic, ...]


# For one thread at a time: PyTorch's mode of tracing before dispatch is one for the whole process, and takes sizes that
# another thread computes with for those of its trace.
tracing = threading.Lock()


def _forked() -> None:
    global tracing
    tracing = threading.Lock()


in_child(_forked)


def trace(module: fx.GraphModule, operands: Sequence[Operand], hints: Mapping[sympy.Symbol, int]) -> Traced:
    """Run a graph on tensors without contents.

    Args:
        hints: a value of each symbol; no size that is one of them is taken to be it for ever.

    Raises:
        Untraceable: an op needs to know contents.
    """
    env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
    numbers, own = {}, {}
    for name, hint in hints.items():
        source = ConstantSource(f"__tape_{name}")
        symbol = env.create_symbol(
            hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, positive=name.is_positive or None,
            do_not_specialize_zero_one=True,
        )  # fmt: skip
        numbers[name] = env.create_symintnode(symbol, hint=hint, source=source)
        own[name] = symbol

    def number(expr: Expr) -> Any:
        if expr.is_Integer:
            return int(expr)
        return sympy_interp(PythonReferenceAnalysis, numbers, expr)

    def fake(operand: Operand) -> Any:
        if operand.number is not None:
            return number(operand.number)
        if operand.fixed is not None:
            return _static(operand.fixed)
        return torch.empty([number(size) for size in operand.sizes], dtype=operand.dtype, device="meta")

    values: dict[fx.Node, Any] = {}
    repeats = _Repeats()
    given = iter(operands)
    with torch.no_grad(), torch.inference_mode(False), enable_python_dispatcher():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = fake(next(given))
            elif node.op == "get_attr":
                values[node] = _static(operator.attrgetter(str(node.target))(module))
            elif node.op == "call_function":
                known: Any = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                args, kwargs = pytree.tree_map(_without_contents, known)
                try:
                    values[node] = repeats.value(node.target, args, kwargs)
                except Exception as error:
                    raise Untraceable(f"{node.name}: {type(error).__name__}: {error}") from error
            elif node.op != "output":
                raise Untraceable(f"{node.name} is a call of {node.op}")
    return Traced(values, own, tuple(guard.expr for guard in env.guards))


def _without_contents(argument: Any) -> Any:
    return torch.device("meta") if isinstance(argument, torch.device) else argument


def _static(tensor: torch.Tensor) -> Any:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise Untraceable(f"a {type(tensor).__name__}")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@dataclass(frozen=True)
class _Made:
    """What an op made: a tensor of these sizes, in the memory of operand ``of`` or its own; or that operand itself."""

    tensor: torch.Tensor
    of: int | None
    itself: bool

    def again(self, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.of is None:
            x = self.tensor
            return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
        given = operands[self.of]
        if self.itself:
            return given
        return torch.as_strided(given, self.tensor.size(), self.tensor.stride(), self.tensor.storage_offset())


class _Repeats:
    """An op on operands of sizes, strides and types that it had before makes what it made before: layers repeat."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[list[_Made], pytree.TreeSpec] | None] = {}

    def value(self, target: Any, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        operands = [leaf for leaf in leaves if is_tensor(leaf)]
        places: dict[int, int] = {}
        key = target, spec, *(_seen(leaf, places) for leaf in leaves)
        known = self._known.get(key)
        if known is not None:
            return pytree.tree_unflatten([made.again(operands) for made in known[0]], known[1])
        made = _value(target, args, kwargs)
        if key not in self._known:
            self._known[key] = self._kept(made, operands)
        return made

    def _kept(self, made: Any, operands: list[torch.Tensor]) -> tuple[list[_Made], pytree.TreeSpec] | None:
        """None of what cannot be made again by its sizes."""
        results, spec = pytree.tree_flatten(made)
        kept, own = list[_Made](), set[int]()
        for result in results:
            if not is_tensor(result):
                return None
            of = next((k for k, x in enumerate(operands) if memory(x) == memory(result)), None)
            if (of is None and memory(result) in own) or (of is not None and operands[of].dtype is not result.dtype):
                return None
            own.add(memory(result))
            kept.append(_Made(result, of, of is not None and operands[of] is result))
        return kept, spec


def _seen(leaf: Any, places: dict[int, int]) -> Any:
    """All of an argument that what an op makes can depend on; memory by the place where it was first seen."""
    if is_tensor(leaf):
        at = places.setdefault(memory(leaf), len(places))
        return leaf.dim(), leaf.dtype, at, *map(_seen_number, (*leaf.size(), *leaf.stride(), leaf.storage_offset()))
    return type(leaf), _seen_number(leaf)


def _seen_number(value: Any) -> Any:
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def _value(target: Any, args: Any, kwargs: Any) -> Any:
    if target is ops.append:
        return args[0]
    if target is ops.read:
        pool, table, _, length, before = args
        return torch.empty(
            [table.shape[0], *pool.shape[:before], length, *pool.shape[before + 2 :]], dtype=pool.dtype, device="meta"
        )
    if target is ops.linear:
        return F.linear(*args, **kwargs)
    if target is ops.experts:
        x, weight, _ = args
        return torch.empty([*x.shape[:2], weight.shape[2]], dtype=x.dtype, device="meta")
    if hasattr(target, "ways"):  # of two that make the same value
        return target.ways[0](*args[2:])
    if getattr(target, "function", None) is ops.attention:
        (spec,), query = target.static, args[0]
        return torch.empty([*query.shape[:3], spec.value_size], dtype=args[2].dtype, device="meta")
    if hasattr(target, "lowering"):
        (spec,), query = target.static, args[0]
        batch, heads, new, _ = query.shape
        return torch.empty([batch, new, heads, spec.value_size], dtype=spec.dtype, device="meta").transpose(1, 2)
    return target(*args, **kwargs)


def expr_of(value: Any) -> Expr:
    """A size as sympy, over the graph's own symbols."""
    if isinstance(value, torch.SymInt):
        if free_unbacked_symbols(value):
            raise Untraceable("a size that depends on contents")
        expr: Expr = value.node.expr
        return expr
    return sympy.Integer(int(value))


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def memory(value: torch.Tensor) -> int:
    """The same for two values that share memory."""
    place: int = value.untyped_storage()._cdata
    return place
