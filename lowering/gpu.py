"""Attention on a GPU: generated Triton over the pages of a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpass.ir import Attention, Layout, Step
from kvpass.lowering import build, op, triton

# With up to so many queries of a group the keys are streamed once.
MOST_DECODED = 64


def architecture(device: torch.device) -> str:
    """``sm_90`` or ``gfx942``."""
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.lru_cache(maxsize=1024)
def module(spec: Attention, arch: str, keys: triton.Strides, values: triton.Strides) -> Any:
    """The loaded module of a shape."""
    return triton.load(triton.source(spec, arch, keys, values))


@functools.lru_cache(maxsize=1024)
def _shown(spec: Attention, arch: str) -> str:
    return triton.source(spec, arch)


def lower(
    spec: Attention, key: Layout | None, value: Layout | None, arch: str, page_size: int = 64
) -> Callable[..., Tensor]:
    """The kernel of one attention of a graph, as `kvpass.ir.Lowering` says.

    Args:
        page_size: for which the source is shown; a call takes it from its pools.

    Raises:
        NotImplementedError: the shape has no words in Triton; keys or values are not in pages.
    """
    if key is None or value is None or {key.before, value.before} - {0, 1} or (key.outside and key.factor != 1):
        raise NotImplementedError("keys or values that are not in pages, head by head")
    shown = _shown(replace(spec, page_size=page_size, step=Step.DECODE), arch)
    attention: Any = op.traceable(spec, key, value, _direct(spec, key, value, arch))
    attention.static = (spec,)
    attention.source = shown
    attention.lowering = f"Triton {build.name_of(shown)}"
    return attention  # type: ignore[no-any-return]


def _direct(spec: Attention, key: Layout, value: Layout, arch: str) -> Callable[..., Tensor]:
    loaded: dict[Any, Any] = {}  # beside `module`, whose key takes longer to hash than a call may take

    def attention(
        query: Tensor, keys: Sequence[Any], values: Sequence[Any], start: int, rows: int, reads: Sequence[Tensor]
    ) -> Tensor:
        (key_pool, key_table, _), (value_pool, value_table, _) = keys, values
        new = query.shape[2]
        start = rows - new  # other queries than those of the last rows see every key
        step = Step.DECODE if new * spec.group <= MOST_DECODED else Step.PREFILL
        which = step, key_pool.shape[key.before + 1]
        if which not in loaded:
            sized = replace(spec, page_size=which[1], step=step)
            loaded[which] = module(sized, arch, _strides(key, key_pool), _strides(value, value_pool))
        made = loaded[which]
        query = query if query.stride(3) == 1 else query.contiguous()
        out = query.new_empty(query.shape[0], new, spec.heads, spec.value_size, dtype=spec.dtype).transpose(1, 2)
        dense = tuple(read if read.is_contiguous() else read.contiguous() for read in reads)
        result: Tensor = made.attention(query, key_pool, value_pool, key_table, value_table, start, rows, dense, out)
        return result

    return attention


def _strides(layout: Layout, pool: Tensor) -> triton.Strides:
    strides = pool.stride()
    page, row = strides[layout.before], strides[layout.before + 1]
    return triton.Strides(None if layout.outside else layout.factor, page, row)


def _on(spec: Attention, key: Layout | None, value: Layout | None, device: torch.device) -> Callable[..., Tensor]:
    if key is None or value is None:
        raise NotImplementedError("keys or values that are not in pages")
    return _direct(spec, key, value, architecture(device))


op.implement("CUDA", _on)
