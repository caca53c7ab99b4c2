#: begin about
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
#: end about
"""Softmax attention of many new rows over cached and new keys, on a GPU.

A program has `BLOCK_M` queries of one key/value head, numbered row by row with the heads of a group side by side
(``m = n * GROUP + g``), and visits the tiles of `BLOCK_N` keys that `reach` says its rows can see.

Letters: ``B`` sequences, ``H = KV_HEADS * GROUP`` query heads, ``S`` rows, ``P`` cached rows, ``N = S - P`` new rows.
Keys and values stand in pages: row ``j`` of sequence ``b`` is in page ``table[b, j // PAGE]`` at offset ``j % PAGE``.
"""

import torch
import triton
import triton.language as tl

#: begin tiles
from kvpass.kernels.triton.tiles import (
    BLOCK_N,
    D_PAD,
    DV,
    DV_PAD,
    GROUP,
    KEY_HEAD,
    KEY_PAGED,
    KV_HEADS,
    PART,
    RANGES,
    VALUE_HEAD,
    VALUE_PAGED,
    absorb,
    normaliser,
    places,
    query_rows,
    reach,
    steps,
)

#: end tiles

# fmt: off
BLOCK_M = tl.constexpr(128)  #= block_m
# fmt: on
#: begin options
OPTIONS = {"num_warps": 8, "num_stages": 3}
#: end options


@triton.jit(do_not_specialize=["start", "rows"])
def prefill(
    query, keys, values, key_table, value_table, out, reads, start, rows,
    q_batch, q_head, q_row, k_head, v_head, key_row, value_row, o_batch, o_head, o_row, SHARED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one sequence and one key/value head.

    Args:
        query: ``[B, H, N, D]``. out: ``[B, H, N, DV]``. The last axis is dense.
        key_table, value_table: int32 ``[B, pages]``, rows of `key_row` and `value_row`; equal where `SHARED`. Not read
            where keys or values are not `PAGED`; then `key_row` and `value_row` lead from sequence to sequence.
        reads: of each tensor that scores and masks read the pointer and all strides but the last.
    """
    # The last blocks see the most keys: they come first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, b = tl.program_id(1), tl.program_id(2)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = m < (rows - start) * GROUP
    n = tl.minimum(m // GROUP, rows - start - 1)
    h, i = head * GROUP + m % GROUP, start + n
    dv = tl.arange(0, DV_PAD)
    i0 = start + block * BLOCK_M // GROUP
    i1 = tl.minimum(start + (block * BLOCK_M + BLOCK_M - 1) // GROUP, rows - 1)

    q = query + b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head + n.to(tl.int64) * q_row
    if PART == D_PAD:
        q = query_rows(q, tl.arange(0, D_PAD))
    keys, key_table = places(keys, key_table, b, head, k_head, key_row, KEY_PAGED)
    values, value_table = places(values, value_table, b, head, v_head, value_row, VALUE_PAGED)
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    done = 0
    for RANGE in tl.static_range(RANGES):
        low, high, clear_low, clear_high = reach(RANGE, i0, i1, rows)
        first = tl.maximum(low // BLOCK_N, done)
        last = tl.maximum(tl.cdiv(tl.minimum(high, rows), BLOCK_N), first)
        clear = tl.minimum(tl.maximum(tl.cdiv(clear_low, BLOCK_N), first), last)
        clear_end = tl.minimum(tl.maximum(tl.minimum(clear_high, rows) // BLOCK_N, clear), last)
        done = last
        for tile in range(clear, clear_end):
            acc, most, total = absorb(
                acc, most, total, q, keys, values, key_table, value_table, tile,
                b, h[:, None], i[:, None], start, rows, reads, SHARED, False,
            )  # fmt: skip
        # With a stage of its own (num_stages=1), ptxas 12.8 crashes on some masks for sm_90.
        for edge in range(clear - first + last - clear_end):
            tile = first + edge + tl.where(edge < clear - first, 0, clear_end - clear)
            acc, most, total = absorb(
                acc, most, total, q, keys, values, key_table, value_table, tile,
                b, h[:, None], i[:, None], start, rows, reads, SHARED, True,
            )  # fmt: skip

    acc = acc * normaliser(most, total, h, reads)[:, None]
    line = out + b.to(tl.int64) * o_batch + h.to(tl.int64) * o_head + n.to(tl.int64) * o_row
    there = here[:, None] & (dv < DV)[None, :]
    tl.store(line[:, None] + dv[None, :], acc.to(out.dtype.element_ty), mask=there)


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_table: torch.Tensor | None,
    value_table: torch.Tensor | None,
    start: int,
    rows: int,
    reads: tuple[torch.Tensor, ...] = (),
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of rows ``start .. rows - 1`` over all rows.

    Args:
        query: ``[B, H, N, D]``. keys, values: pools, as the constants above say; ``[B, K, S, D]`` without pages.
        key_table, value_table: int32 ``[B, pages]``; the same tensor where keys and values share their pages, None
            where there are none.
        reads: what scores and masks read, in the order of the attention's reads; the last axis is dense.
        out: ``[B, H, N, DV]``, made here if it is not given.
    """
    batch, heads, new, _ = query.shape
    if out is None:
        out = query.new_empty(batch, heads, new, DV.value)
    loads = tuple((read, *read.stride()[:-1]) for read in reads)
    shared = key_table is value_table
    key_table, k_head, key_row = steps(keys, key_table, KEY_HEAD)
    value_table, v_head, value_row = steps(values, value_table, VALUE_HEAD)
    prefill[(triton.cdiv(new * GROUP.value, BLOCK_M.value), KV_HEADS.value, batch)](
        query, keys, values, key_table, value_table, out, loads, start, rows, *query.stride()[:3],
        k_head, v_head, key_row, value_row, *out.stride()[:3],
        SHARED=shared, **OPTIONS,
    )  # fmt: skip
    return out
