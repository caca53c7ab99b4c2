"""Functions of PyTorch's modules by which Dynamo would split a graph, and what it traces in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import transformer


@torch.compiler.substitute_in_graph(transformer._detect_is_causal_mask)
def _detect_is_causal_mask(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether layers may go by a hint in place of the mask: only if the caller gave it.

    PyTorch's own looks into the mask, for which a graph has to end. The layers get the mask as well.
    """
    return is_causal is True
