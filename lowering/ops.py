"""What the incremental graph calls on the pools (`kvpass.kernels.ops`), by generated code where that is faster."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpass.kernels import ops
from kvpass.kernels.ops import attention, experts, linear, read, visible
from kvpass.lowering import build
from kvpass.lowering.cpp import SOURCE
from kvpass.lowering.specialise import specialise

_WORTH = 16  # rows: from here on ATen takes longer, from 64 on several times as long
_SHARED = 1 << 16  # bytes that are worth a second thread
_pack = struct.Struct("@9q").pack


def append(pool: Tensor, rows: Tensor, place: Tensor, before: int) -> Tensor:
    """`kvpass.kernels.ops.append`, of many rows on a CPU by a copy for each row of a head.

    Its `index_copy_` takes a step of its own for each row and head. Where no compiler is, and for layouts that are no
    list of heads, it still does.
    """
    if _many(pool, rows, place) and _copied(pool, rows, place, before):
        return pool
    return ops.append(pool, rows, place, before)


def _many(pool: Tensor, rows: Tensor, place: Tensor) -> bool:
    return (
        place.shape[0] >= _WORTH
        and not torch.compiler.is_compiling()
        and type(pool) is type(rows) is Tensor
        and pool.device.type == "cpu"
    )


def _copied(pool: Tensor, rows: Tensor, place: Tensor, before: int) -> bool:
    """Copy by generated code; False, and nothing is done, for a layout or a machine that it is not for."""
    heads, count, size = math.prod(pool.shape[:before]), place.shape[0], math.prod(rows.shape[before + 1 :])
    if not size:
        return False
    try:
        to, of = (x.view(heads, -1, size) for x in (pool, rows))
    except RuntimeError:  # heads, or the entries of a row, that are not one axis
        return False
    dense = to.stride(1) == size and (size == 1 or to.stride(2) == of.stride(2) == 1)
    if not dense or rows.dtype != pool.dtype or not place.is_contiguous():
        return False
    item = pool.element_size()
    copy = _copy(size * item)
    if copy is None:
        return False
    threads = torch.get_num_threads() if heads * count * size * item >= _SHARED else 1
    steps = (item * step for step in (to.stride(0), *of.stride()[:2]))
    copy(_pack(to.data_ptr(), of.data_ptr(), place.data_ptr(), heads, count, *steps, threads))
    return True


@functools.lru_cache(maxsize=256)
def _copy(size: int) -> Callable[..., Any] | None:
    """The kernel for rows of so many bytes; None without a compiler."""
    try:
        library = build.load(
            specialise(SOURCE.with_name("append.cpp").read_text(), {"general": False, "bytes": size}, "//")
        )
    except build.NoCompiler:
        return None
    library.kvpass_append.restype = None
    return library.kvpass_append


__all__ = ["append", "attention", "experts", "linear", "read", "visible"]
