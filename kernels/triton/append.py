#: begin about
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
#: end about
"""New rows into the pages of a pool, on a GPU.

Letters: ``K`` heads, ``R`` rows of all sequences, ``SIZE`` entries of a row of one head.
"""

import torch
import triton
import triton.language as tl

# fmt: off
SIZE = tl.constexpr(128)  #= size
SIZE_PAD = tl.constexpr(128)  #= size_pad
PAGE = tl.constexpr(64)  #= page_size
PAGE_STRIDE = tl.constexpr(8192)  #= page
ROW_STRIDE = tl.constexpr(128)  #= row
HEAD: int | None = None  #= head
BLOCK = tl.constexpr(16)  #= block
# fmt: on


@triton.jit(do_not_specialize=["count"])
def scatter(pool, rows, place, count, pool_head, rows_head, rows_row):
    """`BLOCK` rows of one head.

    Args:
        rows: ``[K, R, SIZE]``, the last axis dense. place: int64 ``[R]``, page * PAGE + offset.
    """
    head = tl.program_id(1).to(tl.int64)
    r, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, SIZE_PAD)
    to = tl.load(place + r, mask=r < count, other=0)
    there = (r < count)[:, None] & (c < SIZE)[None, :]
    entries = tl.load(rows + head * rows_head + (r.to(tl.int64) * rows_row)[:, None] + c[None, :], mask=there)
    line = pool + head * pool_head + to // PAGE * PAGE_STRIDE + to % PAGE * ROW_STRIDE
    tl.store(line[:, None] + c[None, :], entries, mask=there)


def append(pool: torch.Tensor, rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Write rows into a pool, in place, and return the pool.

    Args:
        pool: as the constants above say.
        rows: ``[K, R, SIZE]`` in the pool's dtype; the last axis is dense.
        place: int64 ``[R]``, ``page * PAGE + offset`` of each row; where two rows have one place, either may stay.
    """
    heads, count, _ = rows.shape
    pool_head = pool.stride(0) if HEAD is None else HEAD
    scatter[(triton.cdiv(count, BLOCK.value), heads)](
        pool, rows, place, count, pool_head, *rows.stride()[:2], num_warps=2
    )
    return pool
