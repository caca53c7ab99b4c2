"""What the incremental graph calls on the pools (`kvpass.kernels.ops`), by generated code where that is faster."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpass import kernels
from kvpass.kernels import ops
from kvpass.kernels.ops import attention, linear, read, visible
from kvpass.lowering import build
from kvpass.lowering.specialise import specialise

_SOURCE = Path(next(iter(kernels.__path__))) / "cpu" / "append.cpp"
_WORTH = 16  # rows: from here on ATen takes longer, from 64 on several times as long
_SHARED = 1 << 16  # bytes that are worth a second thread
_pack = struct.Struct("@9q").pack


def append(pool: Tensor, rows: Tensor, place: Tensor, before: int) -> Tensor:
    """`kvpass.kernels.ops.append`, of many rows on a CPU by a copy for each row of a head.

    Its `index_copy_` takes a step of its own for each row and head. Where no compiler is, and for layouts that are no
    list of heads, it still does.
    """
    call = _call(pool, rows, place, before) if _many(pool, rows, place) else None
    if call is None:
        return ops.append(pool, rows, place, before)
    size, words = call
    copy = _copy(size)
    if copy is None:
        return ops.append(pool, rows, place, before)
    copy(_pack(*words))
    return pool


def _many(pool: Tensor, rows: Tensor, place: Tensor) -> bool:
    return (
        place.shape[0] >= _WORTH
        and not torch.compiler.is_compiling()
        and type(pool) is type(rows) is Tensor
        and pool.device.type == "cpu"
    )


def _call(pool: Tensor, rows: Tensor, place: Tensor, before: int) -> tuple[int, Sequence[int]] | None:
    """Bytes of a row of one head, and the fields of the kernel's ``Call``; None for a layout that it does not have."""
    size = math.prod(rows.shape[before + 1 :])
    pool_head, rows_head = _folded(pool, before), _folded(rows, before)
    inside = _dense(pool.shape[before + 1 :], pool.stride()[before + 1 :])
    if not inside or not _dense(rows.shape[before + 1 :], rows.stride()[before + 1 :]):
        return None
    if None in (pool_head, rows_head) or pool.stride(before) != pool.shape[before + 1] * size or not size:
        return None
    if rows.dtype != pool.dtype or not place.is_contiguous():
        return None
    item, heads, count = pool.element_size(), math.prod(pool.shape[:before]), place.numel()
    threads = torch.get_num_threads() if heads * count * size * item >= _SHARED else 1
    steps = (item * int(pool_head or 0), item * int(rows_head or 0), item * rows.stride(before))
    return size * item, (
        pool.data_ptr(), rows.data_ptr(), place.data_ptr(), heads, count, *steps, threads,
    )  # fmt: skip


def _folded(x: Tensor, before: int) -> int | None:
    """The stride of the first axes as one; None where they are not one."""
    sizes, strides = x.shape[:before], x.stride()[:before]
    if not sizes:
        return 0
    return strides[-1] if _dense(sizes, strides, strides[-1]) else None


def _dense(sizes: Sequence[int], strides: Sequence[int], step: int = 1) -> bool:
    """True where entries follow each other, ``step`` apart."""
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


@functools.lru_cache(maxsize=256)
def _copy(size: int) -> Callable[..., Any] | None:
    """The kernel for rows of so many bytes; None without a compiler."""
    try:
        library = build.load(specialise(_SOURCE.read_text(), {"general": False, "bytes": size}, "//"))
    except build.NoCompiler:
        return None
    library.kvpass_append.restype = None
    return library.kvpass_append


__all__ = ["append", "attention", "linear", "read", "visible"]
