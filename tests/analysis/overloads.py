"""Every pointwise overload on every kind of operand, called directly: most are reached by no spelling of Python's."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import fx

from kvpass.analysis.sweep import analyze
from kvpass.analysis.table import RULES
from kvpass.ir import Captured
from tests.analysis.claims import Problem, check
from tests.analysis.programs import Env, draw
from tests.analysis.tools import captured_of, outputs_of

aten = torch.ops.aten
SCALARS: dict[str, tuple[Any, ...]] = {
    "Scalar": (2, -0.5), "number": (2, -0.5), "float": (0.5,), "int": (1,), "bool": (False,), "str": ("none",),
    "Optional[number]": (1, -0.5), "Optional[float]": (0.25,), "Optional[str]": (None,), "Optional[int]": (None,),
}  # fmt: skip
ROUNDING = {"rounding_mode": ("floor", "trunc", None)}


def is_about_numbers(target: Any) -> bool:
    """Overloads on plain numbers, strings or lists: TorchScript's, no value of a graph is made by them."""
    schema = target._schema
    tensors = [a for a in schema.arguments if "Tensor" in str(a.type)]
    return not tensors or any("List" in str(a.type) or "Dict" in str(a.type) for a in schema.arguments + schema.returns)


def pointwise() -> list[Any]:
    """The overloads whose rules stand in the module of pointwise ops."""
    mine = [t for t, r in RULES.items() if r.__module__.endswith("pointwise") and not is_about_numbers(t)]
    return [t for t in mine if t not in BY_HAND]


BY_HAND: dict[Any, str] = {
    aten.to.device: "moves between devices", aten.to.other: "the same as aten.to.dtype by another tensor",
    aten.to.prim_Device: "TorchScript's", aten.to.prim_dtype: "TorchScript's", aten.to.prim_other: "TorchScript's",
    aten._to_copy.default: "in the programs",
    aten.xlogy.OutTensor: "writes into an argument", aten.xlogy.OutScalar_Self: "writes into an argument",
    aten.xlogy.OutScalar_Other: "writes into an argument",
}  # fmt: skip


def operands(count: int) -> Iterator[tuple[str, ...]]:
    """Names of the operands of the shared graph that an op with ``count`` tensors is called with."""
    known = ("zero", "finite", "masked", "negative")
    if count == 1:
        yield from ((k,) for k in ("pair", "positive", "flag", "index", "complex", *known))
    elif count == 2:
        yield from (("pair", "positive"), ("positive", "positive"), ("index", "index_t"), ("flag", "flag_t"))
        yield from (names for k in known for names in ((k, "pair"), ("pair", k), (k, k)))
    else:
        yield from (
            ("pair",) * count,
            ("flag", *("pair",) * (count - 1)),
            ("flag", "zero", "pair"),
            ("flag", "pair", "zero"),
        )


def _source(e: Env) -> dict[str, torch.Tensor]:
    i = e.i + 1
    return {
        "pair": e.scores, "positive": e.scores.abs() + 0.5, "zero": e.weights, "finite": e.finite, "masked": e.masked,
        "negative": -e.weights, "index": i.expand(e.S, -1) + 0, "index_t": i[:, None].expand(-1, e.S) + 0,
        "flag": e.allowed, "flag_t": e.allowed.mT & e.keep[:, None, :], "complex": torch.complex(e.scores, e.scores),
    }  # fmt: skip


@cache
def graph() -> tuple[Captured, dict[Any, list[fx.Node]]]:
    """All overloads in one graph, and the nodes that each made."""
    names = list(_source(Env(*draw())))
    captured = captured_of(lambda *inputs: list(_source(Env(*inputs)).values()), *draw())
    nodes = dict(zip(names, outputs_of(captured), strict=True))
    values = {nodes[name]: value for name, value in _source(Env(*draw())).items()}
    made: dict[Any, list[fx.Node]] = {}
    with captured.module.graph.inserting_before(captured.module.graph.output_node()):
        for target in pointwise():
            made[target] = [
                n for args, kwargs in _calls(target, nodes) if (n := _add(captured, values, target, args, kwargs))
            ]
    captured.module.recompile()
    return captured, made


def _add(
    captured: Captured, values: dict[fx.Node, torch.Tensor], target: Any, args: Any, kwargs: Any
) -> fx.Node | None:
    """One more node, whose shape is that of its widest operand; None where the op does not take such operands."""
    try:
        value = target(*fx.map_arg(args, values.__getitem__), **kwargs)
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    wide = max((a for a in args if isinstance(a, fx.Node)), key=lambda a: values[a].numel() + values[a].dim())
    if not isinstance(value, torch.Tensor) or value.shape != values[wide].shape:
        return None
    node = captured.module.graph.call_function(target, tuple(args), kwargs)
    node.meta["val"] = _as(wide.meta["val"], value.dtype)
    return node


@cache
def _as(fake: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return fake.to(dtype)


def _calls(target: Any, values: dict[str, fx.Node]) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    arguments = target._schema.arguments
    tensors = [a for a in arguments if str(a.type) in ("Tensor", "Optional[Tensor]")]
    for names in operands(len(tensors)):
        for choice in range(2):
            picked, args, kwargs = iter(names), [], {}
            for a in arguments:
                if a in tensors:
                    args.append(values[next(picked)])
                    continue
                options = ROUNDING.get(a.name) or SCALARS.get(str(a.type), (None,))
                if not a.has_default_value() or a.name in ("rounding_mode", "alpha"):
                    (kwargs.__setitem__(a.name, options[choice % len(options)])) if a.kwarg_only else args.append(
                        options[choice % len(options)]
                    )
            if choice == 0 or any(str(a.type) in ("Scalar", "number") or a.name in ROUNDING for a in arguments):
                yield args, kwargs


@cache
def problems() -> tuple[Problem, ...]:
    return tuple(check(analyze(graph()[0]), draw()))
