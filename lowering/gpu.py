"""Attention on a GPU: generated Triton over the pages of a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpass.ir import Attention, Layout, Step
from kvpass.lowering import op, triton, tune
from kvpass.lowering.triton_config import Config

# With up to so many queries of a group the keys are streamed once.
MOST_DECODED = 64


def architecture(device: torch.device) -> str:
    """``sm_90`` or ``gfx942``."""
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.lru_cache(maxsize=1024)
def module(spec: Attention, arch: str, keys: triton.Strides, values: triton.Strides, how: Config | None = None) -> Any:
    """The loaded module of a shape."""
    return triton.load(triton.source(spec, arch, keys, values, how))


def _tuned(spec: Attention, arch: str, keys: triton.Strides, values: triton.Strides, given: tuple[Any, ...]) -> Config:
    """The fastest configuration for a call like this one."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def measure(how: Config) -> float | None:
        made = triton.load(triton.source(spec, arch, keys, values, how))
        try:
            return float(do_bench(lambda: made.attention(*given), return_mode="median"))
        except OutOfResources:
            return None

    name = torch.cuda.get_device_name(given[0].device)
    return tune.winner(spec, arch, name, triton.source(spec, arch, keys, values), measure)


@functools.lru_cache(maxsize=1024)
def _shown(spec: Attention, arch: str) -> str:
    return triton.source(spec, arch)


def lower(
    spec: Attention, key: Layout | None, value: Layout | None, arch: str, page_size: int = 64, autotune: bool = False
) -> Callable[..., Tensor]:
    """The kernel of one attention of a graph, as `kvpass.ir.Lowering` says.

    Args:
        page_size: for which the source is shown; a call takes it from its pools.
        autotune: the first call of a shape measures configurations (`kvpass.lowering.tune`).

    Raises:
        NotImplementedError: the shape has no words in Triton; keys or values are not in pages.
    """
    key, value = _in_pages(key), _in_pages(value)
    shown = _shown(replace(spec, page_size=page_size, step=Step.DECODE), arch)
    return op.traceable(spec, key, value, _direct(spec, key, value, arch, autotune), "Triton", shown)


def _in_pages(layout: Layout | None) -> Layout:
    if layout is None or layout.before not in (0, 1) or (layout.outside and layout.factor != 1):
        raise NotImplementedError("keys or values that are not in pages, head by head")
    return layout


def _direct(spec: Attention, key: Layout, value: Layout, arch: str, autotune: bool = False) -> Callable[..., Tensor]:
    loaded: dict[Any, Any] = {}  # beside `module`, whose key takes longer to hash than a call may take

    def attention(
        query: Tensor, keys: Sequence[Any], values: Sequence[Any], start: int, rows: int, reads: Sequence[Tensor]
    ) -> Tensor:
        (key_pool, key_table, _), (value_pool, value_table, _) = keys, values
        new = query.shape[2]
        start = rows - new  # other queries than those of the last rows see every key
        step = Step.DECODE if new * spec.group <= MOST_DECODED else Step.PREFILL
        query = query if query.stride(3) == 1 else query.contiguous()
        out = query.new_empty(query.shape[0], new, spec.heads, spec.value_size, dtype=spec.dtype).transpose(1, 2)
        dense = tuple(read if read.is_contiguous() else read.contiguous() for read in reads)
        given = (query, key_pool, value_pool, key_table, value_table, start, rows, dense, out)
        which = step, key_pool.shape[key.before + 1]
        if which not in loaded:
            sized = replace(spec, page_size=which[1], step=step)
            strides = _strides(key, key_pool), _strides(value, value_pool)
            how = _tuned(sized, arch, *strides, given) if autotune else None
            loaded[which] = module(sized, arch, *strides, how)
        result: Tensor = loaded[which].attention(*given)
        return result

    return attention


def _strides(layout: Layout, pool: Tensor) -> triton.Strides:
    strides = pool.stride()
    page, row = strides[layout.before], strides[layout.before + 1]
    return triton.Strides(None if layout.outside else layout.factor, page, row)


op.implement(
    "CUDA",
    lambda spec, key, value, device: _direct(spec, _in_pages(key), _in_pages(value), architecture(device)),
)
