"""How far two computations of one value may be apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

# Largest difference, relative to the largest entry: far above reordered sums, far below a key too many.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 6e-2,
    torch.float16: 1e-2,
}


def limits(graph: fx.Graph) -> list[float]:
    """For each output how far it may be off: as much as the coarsest type that it is computed in allows."""
    made: dict[Any, float] = {}
    for node in graph.nodes:
        own = _limit(node) if node.op == "call_function" else 0.0
        made[node] = max([own, *(made[x] for x in node.all_input_nodes)])
    outputs: Any = graph.output_node().args[0]
    return [max(made[x], _limit(x)) if isinstance(x, fx.Node) else 0.0 for x in outputs]


def _limit(node: fx.Node) -> float:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return 0.0
    return TOLERANCE.get(value.dtype, 1e-1)


def difference(found: Any, expected: Any, limit: float, meaningful: torch.Tensor | None = None) -> str:
    """What is wrong with an output, or an empty text.

    Args:
        limit: of `limits`.
        meaningful: the entries that are looked at; all of them by default.
    """
    if not isinstance(expected, torch.Tensor):
        return "" if found == expected else f"{found!r} instead of {expected!r}"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype}{tuple(found.shape)} instead of {expected.dtype}{tuple(expected.shape)}"
    if meaningful is not None:
        found, expected = found[meaningful], expected[meaningful]
    if not expected.numel():
        return ""
    if not expected.dtype.is_floating_point:
        wrong = int((found != expected).sum())
        return f"{wrong} of {expected.numel()} entries differ" if wrong else ""
    if not torch.equal(found.isnan(), expected.isnan()):
        return "NaN in other places"
    a, b = found.double().nan_to_num(), expected.double().nan_to_num()
    error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
    return f"relative error {error:.2e} (at most {limit:.0e} is expected)" if error > limit else ""
