"""Attention on a CPU: one shape, one loaded library, one call."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpass.ir import Attention, Layout
from kvpass.lowering import build, cpp, op

# With up to so many queries of a group the keys are streamed once; with more, blocks of queries share packed blocks of
# keys.
MOST_DECODED = 16


class Rows(NamedTuple):
    """Where keys or values are; strides count elements, and the last axis is dense.

    ``table``: int32 ``[B, pages]`` of a pool; None where the rows of a sequence are one table of stride ``row``.
    """

    tensor: Tensor
    table: Tensor | None
    batch: int
    head: int
    page: int
    row: int
    page_size: int
    first: int = 0
    """Bytes from the beginning of ``tensor`` to row 0."""

    def words(self) -> tuple[int, ...]:
        """As the kernel's ``Pool`` has them."""
        table, pages = (0, 0) if self.table is None else (self.table.data_ptr(), self.table.stride(0))
        pointer = self.tensor.data_ptr() + self.first
        return pointer, table, self.batch, self.head, self.page, self.row, pages, self.page_size

    @classmethod
    def dense(cls, x: Tensor) -> Rows:
        """``[B, K, S, D]``."""
        batch, head, row, _ = x.stride()
        return cls(x, None, batch, head, 0, row, 0)

    @classmethod
    def paged(cls, layout: Layout, pool: Tensor, table: Tensor, run: int) -> Rows:
        """``table`` int32 ``[B, pages]``; ``run`` the first page of a sequence whose pages follow each other, or -1."""
        strides, size = pool.stride(), pool.shape[layout.before + 1]
        page, row = strides[layout.before], strides[layout.before + 1]
        head = layout.factor * strides[layout.before - 1] if layout.outside else layout.factor
        if run < 0:
            return cls(pool, table, 0, head, page, row, size)
        return cls(pool, None, 0, head, page, row, size, run * page * pool.element_size())


class Kernel:
    """The generated kernel of a shape.

    Raises:
        NotImplementedError: the shape has no words in C++.
        NoCompiler: the source cannot be compiled here.
    """

    def __init__(self, spec: Attention) -> None:
        self.spec, self.source = spec, cpp.source(spec)
        library = build.load(self.source)
        self._decode, self._prefill = library.kvpass_decode, library.kvpass_prefill
        self.decode_address, self.prefill_address = (
            ctypes.cast(call, ctypes.c_void_p).value or 0 for call in (self._decode, self._prefill)
        )
        self._pack = struct.Struct(f"@{14 + 2 * 8 + 5 * max(1, len(spec.reads))}q").pack

    def __call__(
        self, query: Tensor, key: Rows, value: Rows, start: int, rows: int, reads: Sequence[Tensor] = ()
    ) -> Tensor:
        """Attention of the new rows.

        Args:
            query: ``[B, H, N, D]``; its first row is row ``start``.
            rows: how many keys there are; those behind them are not read.
            reads: the tensors of ``spec.reads``, with the axes that are named there.

        Returns:
            ``[B, H, N, Dv]``; row by row in memory, the heads of a row side by side.

        Raises:
            MemoryError: no memory for scratch.
            ValueError: queries of another shape: the kernel would write behind its result.
        """
        spec = self.spec
        batch, heads, new, width = query.shape
        if (heads, width) != (spec.heads, spec.head_size):
            raise ValueError(f"queries {tuple(query.shape)} of a kernel for {spec.heads} heads of {spec.head_size}")
        if query.stride(3) != 1:
            query = query.contiguous()
        size = spec.value_size
        out = torch.empty_strided(
            (batch, heads, new, size), (new * heads * size, size, heads * size, 1), dtype=spec.dtype
        )
        tensors = [read if read.is_contiguous() else read.contiguous() for read in reads]
        words = [word for read in tensors for word in _words(read)] or _NOTHING
        rows_of_tile = tile(math.gcd(key.page_size, value.page_size))
        block = self._pack(
            query.data_ptr(), out.data_ptr(), batch, new, start, rows, torch.get_num_threads(), rows_of_tile,
            *query.stride()[:3], *out.stride()[:3], *key.words(), *value.words(), *words,
        )  # fmt: skip
        call = self._decode if new * spec.group <= MOST_DECODED else self._prefill
        if call(block):
            raise MemoryError("no memory for the scratch of an attention")
        return out


@functools.cache
def tile(page: int) -> int:
    """Rows of a tile: the largest divisor of a page that is no longer than the longest tile."""
    return max(size for size in range(1, cpp.TILE + 1) if page % size == 0)


_NOTHING = [0, 0, 0, 0, 0]


def _words(read: Tensor) -> list[int]:
    strides = list(read.stride())
    return [read.data_ptr(), *strides, *[0] * (4 - len(strides))]


@functools.lru_cache(maxsize=1024)
def kernel(spec: Attention) -> Kernel:
    """The kernel of a shape, built at the first call in this process."""
    return Kernel(spec)


def lower(spec: Attention, key: Layout | None, value: Layout | None) -> Callable[..., Tensor]:
    """The kernel of one attention of a graph, as `kvpass.ir.Lowering` says.

    Raises:
        NotImplementedError: the shape has no words in C++.
        NoCompiler: the source cannot be compiled here.
    """
    return op.traceable(spec, key, value, _direct(spec, key, value), "C++", kernel(spec).source)


def _direct(spec: Attention, key: Layout | None, value: Layout | None) -> Callable[..., Tensor]:
    made = kernel(spec)

    def attention(
        query: Tensor,
        key_rows: Sequence[Any],
        value_rows: Sequence[Any],
        start: int,
        rows: int,
        reads: Sequence[Tensor],
    ) -> Tensor:
        return made(query, _rows(key, key_rows), _rows(value, value_rows), start, rows, reads)

    return attention


def _rows(layout: Layout | None, given: Sequence[Any]) -> Rows:
    if layout is not None:
        return Rows.paged(layout, *given)
    (x,) = given
    return Rows.dense(x if x.stride(3) == 1 else x.contiguous())


op.implement("CPU", lambda spec, key, value, _: _direct(spec, key, value))
