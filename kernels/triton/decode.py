#: begin about
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
#: end about
"""Softmax attention of a few new rows over cached and new keys, on a GPU.

Keys and values stream through once for all query heads that share them: queries are numbered row by row, the heads of
a group side by side (``m = n * GROUP + g``), and a block of them stands against tiles of `BLOCK_N` keys. The tiles that
`reach` says can matter are split over programs; each leaves a part of the softmax, and `combine` joins the parts.

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
    spans,
    steps,
)

#: end tiles

# fmt: off
LARGEST_BLOCK_M = 32  #= block_m
PROGRAMS = 528  #= programs
LEAST_TILES = 4  #= least_tiles
MOST_SPLITS = 128  #= most_splits
# fmt: on
#: begin options
OPTIONS = {"num_warps": 4, "num_stages": 3}
#: end options

# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["start", "rows", "tiles", "splits"])
def decode(
    query, keys, values, key_table, value_table, out, parts, mosts, totals, reads,
    start, rows, tiles, splits,
    q_batch, q_head, q_row, k_head, v_head, key_row, value_row, o_batch, o_head, o_row,
    BLOCK_M: tl.constexpr, SHARED: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """One share of the keys of one sequence and one key/value head: `tiles` tiles, from tile ``split * tiles``.

    Args:
        query: ``[B, H, N, D]``. out: ``[B, H, N, DV]``. The last axis is dense.
        key_table, value_table: int32 ``[B, pages]``, rows of `key_row` and `value_row`; equal where `SHARED`. Not read
            where keys or values are not `PAGED`; then `key_row` and `value_row` lead from sequence to sequence.
        parts, mosts, totals: fp32 ``[B, KV_HEADS, N * GROUP, splits, DV]`` and without the last axis; not used where
            there is one split (`DIRECT`).
        reads: of each tensor that scores and masks read the pointer and all strides but the last.
    """
    split, b = tl.program_id(0), tl.program_id(2)
    head, block = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS
    queries = (rows - start) * GROUP
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = m < queries
    n = tl.minimum(m // GROUP, rows - start - 1)
    h, i = head * GROUP + m % GROUP, start + n
    dv = tl.arange(0, DV_PAD)

    q = query + b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head + n * q_row
    if PART == D_PAD:
        q = query_rows(q, tl.arange(0, D_PAD))
    keys, key_table = places(keys, key_table, b, head, k_head, key_row, KEY_PAGED)
    values, value_table = places(values, value_table, b, head, v_head, value_row, VALUE_PAGED)
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    before, done = 0, 0  # tiles of the ranges before, of all splits
    for RANGE in tl.static_range(RANGES):
        low, high, clear_low, clear_high = reach(RANGE, start, rows - 1, rows)
        first = tl.maximum(low // BLOCK_N, done)
        last = tl.maximum(tl.cdiv(tl.minimum(high, rows), BLOCK_N), first)
        mine = tl.minimum(tl.maximum(first + split * tiles - before, first), last)
        end = tl.minimum(tl.maximum(first + (split + 1) * tiles - before, first), last)
        before, done = before + last - first, last
        clear = tl.minimum(tl.maximum(tl.cdiv(clear_low, BLOCK_N), mine), end)
        clear_end = tl.minimum(tl.maximum(tl.minimum(clear_high, rows) // BLOCK_N, clear), end)
        for tile in range(clear, clear_end):
            acc, most, total = absorb(
                acc, most, total, q, keys, values, key_table, value_table, tile,
                b, h[:, None], i[:, None], start, rows, reads, SHARED, False,
            )  # fmt: skip
        # With a stage of its own (num_stages=1), ptxas 12.8 crashes on some masks for sm_90.
        for edge in range(clear - mine + end - clear_end):
            tile = mine + edge + tl.where(edge < clear - mine, 0, clear_end - clear)
            acc, most, total = absorb(
                acc, most, total, q, keys, values, key_table, value_table, tile,
                b, h[:, None], i[:, None], start, rows, reads, SHARED, True,
            )  # fmt: skip

    if DIRECT:
        line = out + b.to(tl.int64) * o_batch + h.to(tl.int64) * o_head + n * o_row
        acc = acc * normaliser(most, total, h, reads)[:, None]
        tl.store(line[:, None] + dv[None, :], acc.to(out.dtype.element_ty), mask=here[:, None] & (dv < DV)[None, :])
    else:
        place = ((b * KV_HEADS + head).to(tl.int64) * queries + m) * splits + split
        tl.store(mosts + place, most, mask=here)
        tl.store(totals + place, total, mask=here)
        tl.store(parts + place[:, None] * DV + dv[None, :], acc, mask=here[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["new", "splits"])
def combine(
    parts, mosts, totals, out, reads, new, splits, o_batch, o_head, o_row, SPLITS: tl.constexpr, CHUNK: tl.constexpr
):
    """The parts of one query joined. `SPLITS` is a power of two from `splits` up."""
    m, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = head * GROUP + m % GROUP
    first = ((b * KV_HEADS + head).to(tl.int64) * new * GROUP + m) * splits
    s, dv = tl.arange(0, SPLITS), tl.arange(0, DV_PAD)
    most = tl.load(mosts + first + s, mask=s < splits, other=float("-inf"))
    top = tl.max(most, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.load(totals + first + s, mask=s < splits, other=0.0) * tl.exp2(most - shift), 0)
    acc = tl.zeros([DV_PAD], tl.float32)
    for at in range(0, splits, CHUNK):
        r = tl.arange(0, CHUNK) + at
        weight = tl.exp2(tl.load(mosts + first + r, mask=r < splits, other=float("-inf")) - shift)
        there = (r < splits)[:, None] & (dv < DV)[None, :]
        part = tl.load(parts + (first + r)[:, None] * DV + dv[None, :], mask=there, other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
    acc = acc * normaliser(top, total, h, reads)
    line = out + b.to(tl.int64) * o_batch + h.to(tl.int64) * o_head + (m // GROUP) * o_row
    tl.store(line + dv, acc.to(out.dtype.element_ty), mask=dv < DV)


# ---- launch ----------------------------------------------------------------------------------------------------------


def shares(programs: int, start: int, rows: int) -> tuple[int, int]:
    """How many tiles a program takes, and how many programs share the keys of one head."""
    tiles = done = 0
    for low, high in spans(start, rows - 1, rows):
        first = max(low // BLOCK_N.value, done)
        done = max(-(-min(high, rows) // BLOCK_N.value), first)
        tiles += done - first
    wanted = min(MOST_SPLITS, max(1, PROGRAMS // programs))
    each = max(LEAST_TILES, -(-tiles // wanted))
    return each, max(1, -(-tiles // each))


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
    queries = new * GROUP.value
    block_m = min(LARGEST_BLOCK_M, max(16, triton.next_power_of_2(queries)))
    blocks = triton.cdiv(queries, block_m)
    each, splits = shares(batch * KV_HEADS.value * blocks, start, rows)
    # What a kernel does not use may be any tensor.
    parts = mosts = totals = out
    if splits > 1:
        mosts, totals = query.new_empty(2, batch, KV_HEADS.value, queries, splits, dtype=torch.float32)
        parts = query.new_empty(batch, KV_HEADS.value, queries, splits, DV.value, dtype=torch.float32)
    loads = tuple((read, *read.stride()[:-1]) for read in reads)
    shared = key_table is value_table
    key_table, k_head, key_row = steps(keys, key_table, KEY_HEAD)
    value_table, v_head, value_row = steps(values, value_table, VALUE_HEAD)
    decode[(splits, KV_HEADS.value * blocks, batch)](
        query, keys, values, key_table, value_table, out, parts, mosts, totals, loads, start, rows, each, splits,
        *query.stride()[:3],
        k_head, v_head, key_row, value_row, *out.stride()[:3],
        BLOCK_M=block_m, SHARED=shared, DIRECT=splits == 1, **OPTIONS,
    )  # fmt: skip
    if splits > 1:
        combine[(queries, KV_HEADS.value, batch)](
            parts, mosts, totals, out, loads, new, splits, *out.stride()[:3],
            SPLITS=triton.next_power_of_2(splits), CHUNK=16, num_warps=4,
        )  # fmt: skip
    return out
