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
def _shown(spec: Attention, arch: str, keys_paged: bool, values_paged: bool) -> str:
    keys = None if keys_paged else triton.Strides.dense(spec.head_size)
    values = None if values_paged else triton.Strides.dense(spec.value_size)
    return triton.source(spec, arch, keys, values)


def lower(
    spec: Attention, key: Layout | None, value: Layout | None, arch: str, page_size: int = 64, autotune: bool = False
) -> Callable[..., Tensor]:
    """The kernel of one attention of a graph, as `kvpass.ir.Lowering` says.

    Args:
        page_size: for which the source is shown; a call takes it from its pools.
        autotune: the first call of a shape measures configurations (`kvpass.lowering.tune`).

    Raises:
        NotImplementedError: the shape has no words in Triton.
    """
    shown = replace(spec, page_size=page_size if key or value else None, step=Step.DECODE)
    made = _direct(spec, key, value, arch, autotune)
    return op.traceable(spec, key, value, made, "Triton", _shown(shown, arch, key is not None, value is not None))


def _direct(
    spec: Attention, key: Layout | None, value: Layout | None, arch: str, autotune: bool = False
) -> Callable[..., Tensor]:
    loaded: dict[Any, Any] = {}  # beside `module`, whose key takes longer to hash than a call may take

    def attention(
        query: Tensor, keys: Sequence[Any], values: Sequence[Any], start: int, rows: int, reads: Sequence[Tensor]
    ) -> Tensor:
        key_rows, key_table, *key_places = _rows(key, keys)
        value_rows, value_table, *value_places = _rows(value, values)
        new = query.shape[2]
        start = rows - new  # other queries than those of the last rows see every key
        step = Step.DECODE if new * spec.group <= MOST_DECODED else Step.PREFILL
        query = query if query.stride(3) == 1 else query.contiguous()
        out = query.new_empty(query.shape[0], new, spec.heads, spec.value_size, dtype=spec.dtype).transpose(1, 2)
        dense = tuple(read if read.is_contiguous() else read.contiguous() for read in reads)
        given = (query, key_rows, value_rows, key_table, value_table, start, rows, dense, out)
        which = step, *key_places, *value_places
        if which not in loaded:
            sized = replace(spec, page_size=key_places[0] or value_places[0], step=step)
            strides = triton.Strides(*key_places[1:]), triton.Strides(*value_places[1:])
            how = _tuned(sized, arch, *strides, given) if autotune else None
            loaded[which] = module(sized, arch, *strides, how)
        result: Tensor = loaded[which].attention(*given)
        return result

    return attention


def _rows(layout: Layout | None, given: Sequence[Any]) -> tuple[Any, ...]:
    """A tensor from whose entry 0 the rows are counted and its table, as the kernels take them; the page size or None;
    and the fields of `Strides`."""
    if layout is None:
        (x,) = given
        x = x if x.stride(3) == 1 else x.contiguous()
        return x, None, None, None, None, x.stride(2)
    pool, table, _ = given
    strides, before = pool.stride(), layout.before
    places = pool.shape[before + 1], None if layout.outside else layout.factor, strides[before], strides[before + 1]
    if layout.outside and (before, layout.factor) != (1, 1):  # the kernels take the first stride for that of the heads
        pool = pool.as_strided((1,), (layout.factor * strides[before - 1],))
    return pool, table, *places


op.implement(
    "CUDA",
    lambda spec, key, value, device: _direct(spec, key, value, architecture(device)),
)
