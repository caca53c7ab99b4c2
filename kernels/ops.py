"""What the incremental graph does to a slot's pool, in plain PyTorch.

A pool is ``[pages, *before, page_size, *after]``. Row ``r`` of a sequence stands in page ``table[r // page_size]`` at
offset ``r % page_size``. Page 0 is scratch: rows that need not be kept are written there and never read.
"""

from __future__ import annotations

from torch import Tensor

from kvpass.kernels.reference import attention, visible


def append(pool: Tensor, rows: Tensor, page: Tensor, offset: Tensor, before: int) -> Tensor:
    """Write rows into a pool, in place, and return the pool.

    Args:
        pool: ``[pages, *before, page_size, *after]``.
        rows: ``[B * N, *before, *after]``, in the pool's dtype.
        page, offset: ``[B * N]`` int64, where each row goes.
        before: how many axes of a row stand before the row axis.
    """
    pool.movedim(before + 1, 1)[page, offset] = rows
    return pool


def read(pool: Tensor, table: Tensor, length: int, before: int) -> Tensor:
    """All rows of a batch of sequences, dense: ``[B, *before, S, *after]``.

    Args:
        table: ``[B, ceil(S / page_size)]`` int32, the pages of each sequence in order.
        length: ``S``.
    """
    batch, pages = table.shape
    picked = pool.index_select(0, table.reshape(-1))  # [B * pages, *before, page_size, *after]
    picked = picked.reshape(batch, pages, *picked.shape[1:]).movedim(
        1, before + 1
    )  # [B, *before, pages, page_size, *after]
    return picked.flatten(before + 1, before + 2).narrow(before + 1, 0, length)


__all__ = ["append", "attention", "read", "visible"]
