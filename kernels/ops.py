"""What the incremental graph calls, in plain PyTorch: the rows of a slot's pool, attention, and products.

A pool is ``[*before, pages, page_size, *after]``. Row ``r`` of a sequence stands in page ``table[r // page_size]`` at
offset ``r % page_size``. Page 0 is scratch: rows that need not be kept are written there and never read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.kernels.reference import attention, visible


def append(pool: Tensor, rows: Tensor, place: Tensor, before: int) -> Tensor:
    """Write rows into a pool, in place, and return the pool.

    Args:
        pool: ``[*before, pages, page_size, *after]``.
        rows: ``[*before, B * N, *after]``, in the pool's dtype.
        place: ``[B * N]`` int64, ``page * page_size + offset`` of each row.
        before: how many axes of a row stand before the row axis.
    """
    _words(pool).flatten(before, before + 1).index_copy_(before, place, _words(rows))
    return pool


def _words(x: Tensor) -> Tensor:
    """The same memory in a type that ops of indices know: PyTorch has none of them for eight-bit floats and uint16."""
    if x.dtype is torch.uint16:
        return x.view(torch.int16)
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.dtype.itemsize == 1 else x


def read(pool: Tensor, table: Tensor, run: int, length: int, before: int) -> Tensor:
    """All rows of a batch of sequences: ``[B, *before, S, *after]``, a view of the pool where their memory allows it.

    Args:
        table: ``[B, ceil(S / page_size)]`` int32, the pages of each sequence in order.
        run: the first page of a single sequence whose pages follow each other, or -1.
        length: ``S``.
    """
    if run >= 0:
        flat = pool.flatten(before, before + 1)
        return flat.narrow(before, run * pool.shape[before + 1], length).unsqueeze(0)
    picked = _words(pool).index_select(before, table.reshape(-1))  # [*before, B * pages, page_size, *after]
    rows = picked.view(pool.dtype).view(*pool.shape[:before], table.shape[0], -1, *pool.shape[before + 2 :])
    return rows.narrow(before + 1, 0, length).movedim(before, 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; one row is multiplied on all threads.

    MKL streams the weight of a single row through one thread. As a batch of ``threads`` products, each with its share
    of the output features, it is read at the speed of the machine.

    Args:
        x: ``[.., I]``. weight: ``[O, I]``. bias: ``[O]``.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)  # a compiler has products of its own
    threads = torch.get_num_threads()
    out, width = weight.shape
    if (
        threads == 1
        or x.numel() != width
        or out % threads
        or weight.numel() < _WORTH_SPLITTING
        or weight.dtype is not torch.float32
        or weight.device.type != "cpu"
        or type(weight) not in (Tensor, torch.nn.Parameter)
        or not weight.is_contiguous()
    ):
        return F.linear(x, weight, bias)
    shares = torch.bmm(x.reshape(1, 1, width).expand(threads, 1, width), weight.view(threads, -1, width).mT)
    y = shares.view(*x.shape[:-1], out)
    return y if bias is None else y + bias


def experts(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """``x[t] @ weight[ids[t]]``, each matrix read once for all the rows that it multiplies.

    Args:
        x: ``[T, M, I]``. weight: ``[E, I, O]``. ids: ``[T]`` integers.

    Returns:
        ``[T, M, O]``.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return torch.bmm(x, weight[ids])  # which experts are there is not known without waiting for the device
    out = x.new_empty(*x.shape[:2], weight.shape[2])
    order = ids.argsort()
    used, counts = torch.unique(ids, return_counts=True)
    for expert, rows in zip(used.tolist(), torch.split(order, counts.tolist()), strict=True):
        out[rows] = linear(x[rows], weight[expert].mT)
    return out


_WORTH_SPLITTING = 1 << 16  # entries: below that a weight is in the cache of one core


__all__ = ["append", "attention", "experts", "linear", "read", "visible"]
