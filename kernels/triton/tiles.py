# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What all attention kernels share: tiles of keys and values in pages, scores and masks, and the online softmax.

`kvpass.lowering.triton` writes what follows the next line into the module of a shape.
"""

import torch
import triton
import triton.language as tl

# ---- the shape -------------------------------------------------------------------------------------------------------

# fmt: off
KV_HEADS = tl.constexpr(8)  #= kv_heads
GROUP = tl.constexpr(4)  #= group
D = tl.constexpr(128)  #= head_size
D_PAD = tl.constexpr(128)  #= head_pad
PART = tl.constexpr(128)  #= part
DV = tl.constexpr(128)  #= value_size
DV_PAD = tl.constexpr(128)  #= value_pad
KEY_PAGED = tl.constexpr(True)  #= key_paged
VALUE_PAGED = tl.constexpr(True)  #= value_paged
PAGE = tl.constexpr(64)  #= page_size
KEY_PAGE = tl.constexpr(8192)  #= key_page
KEY_ROW = tl.constexpr(128)  #= key_row
VALUE_PAGE = tl.constexpr(8192)  #= value_page
VALUE_ROW = tl.constexpr(128)  #= value_row
SCALE = tl.constexpr(0.08838834764)  #= scale
PLAIN_SCORE = tl.constexpr(True)  #= plain_score
EMPTY = tl.constexpr(0.0)  #= empty
RANGES = tl.constexpr(1)  #= ranges_count
LOG2E = tl.constexpr(1.4426950408889634)

BLOCK_N = tl.constexpr(64)  #= block_n
KEY_HEAD: int | None = None  #= key_head
VALUE_HEAD: int | None = None  #= value_head
# fmt: on
ONE_PAGE = tl.constexpr(PAGE.value % BLOCK_N.value == 0)
SOME_PAGES = tl.constexpr(BLOCK_N.value % PAGE.value == 0 and BLOCK_N.value <= 8 * PAGE.value)

# ---- scores and masks ------------------------------------------------------------------------------------------------
# b sequence, h [M, 1] query head, i [M, 1] row of the query, j [1, N] row of the key, start the first new row.
#: if uses_floor


@triton.jit
def floor_mod(a, n):
    rest = a % n
    return tl.where(rest < 0, rest + n, rest)


@triton.jit
def floor_div(a, n):
    return (a - floor_mod(a, n)) // n


#: endif
#: if uses_tanh


@triton.jit
def hyperbolic(x):
    """tanh: a polynomial below 0.625, where a rational function of the exponential would lose the small ones."""
    square = x * x
    p = -5.70498872745e-3
    p = p * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    small = x + x * square * p
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


#: endif


#: begin score
@triton.jit
def score(score, b, h, i, j, start, reads):
    """The score, from the scaled product of query and key."""
    return score


#: end score
#: begin visible
@triton.jit
def visible(b, h, i, j, start, reads):
    return j <= i


#: end visible
#: begin sink
@triton.jit
def sink(h, reads):
    """A score without a value that joins the normaliser of a row."""
    return float("-inf")


#: end sink
#: begin ranges
@triton.jit
def reach(RANGE: tl.constexpr, i0, i1, rows):
    """Rows ``i0 .. i1`` see no key outside the first two ends, and all of them see every key inside the other two."""
    return 0, i1 + 1, 0, i0 + 1


def spans(i0: int, i1: int, rows: int) -> tuple[tuple[int, int], ...]:
    """The first two ends of `reach`, on the host."""
    return ((0, i1 + 1),)


#: end ranges
# ---- keys and values -------------------------------------------------------------------------------------------------


@triton.jit
def places(pool, table, b, head, head_stride, sequence_stride, PAGED: tl.constexpr):
    """Where the rows of a sequence and a head begin, and the table of the sequence."""
    pool += head.to(tl.int64) * head_stride
    if PAGED:
        table += b.to(tl.int64) * sequence_stride
    else:
        pool += b.to(tl.int64) * sequence_stride
    return pool, table


@triton.jit
def pages_of(table, tile, rows, PAGED: tl.constexpr, MASKED: tl.constexpr):
    """The page of a tile, or that of each of its rows, int64; looked up once for each page.

    Rows that are not there have page 0 where the tile is `MASKED`. In one table a row is a page.
    """
    if not PAGED:
        page = tile * BLOCK_N
    elif ONE_PAGE:
        page = tl.load(table + tile * BLOCK_N // PAGE)
    elif SOME_PAGES:
        COUNT: tl.constexpr = BLOCK_N // PAGE
        r = tl.arange(0, BLOCK_N)
        page = tl.load(table + tile * COUNT)
        for k in tl.static_range(1, COUNT):
            if MASKED:
                next_page = tl.load(table + tile * COUNT + k, mask=tile * BLOCK_N + k * PAGE < rows, other=0)
            else:
                next_page = tl.load(table + tile * COUNT + k)
            page = tl.where(r < k * PAGE, page, next_page)
    else:
        j = tl.arange(0, BLOCK_N) + tile * BLOCK_N
        page = tl.load(table + tl.minimum(j, rows - 1) // PAGE)
    return page.to(tl.int64)


@triton.jit
def rows_of(
    pool,
    pages,
    tile,
    rows,
    PAGE_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    PAGED: tl.constexpr,
    MASKED: tl.constexpr,
    first=0,
):
    """A tile of keys or values, ``[BLOCK_N, SIZE_PAD]``, from column `first` on. What is not there is zero."""
    r = tl.arange(0, BLOCK_N)
    c = tl.arange(0, SIZE_PAD) + first
    base = pool + pages * PAGE_STRIDE
    if ONE_PAGE or not PAGED:
        if PAGED and PAGE != BLOCK_N:
            base += tile * BLOCK_N % PAGE * ROW_STRIDE
        place = base + (r[:, None] * ROW_STRIDE + c[None, :])
    elif SOME_PAGES:
        place = base[:, None] + ((r % PAGE)[:, None] * ROW_STRIDE + c[None, :])
    else:
        place = base[:, None] + (((r + tile * BLOCK_N) % PAGE)[:, None] * ROW_STRIDE + c[None, :])
    if MASKED:
        there = (r + tile * BLOCK_N < rows)[:, None]
        if SIZE % SIZE_PAD != 0:
            there = there & (c < SIZE)[None, :]
        return tl.load(place, mask=there, other=0.0)
    if SIZE % SIZE_PAD != 0:
        return tl.load(place, mask=(c < SIZE)[None, :], other=0.0)
    return tl.load(place)


def steps(pool: torch.Tensor, table: torch.Tensor | None, head: int | None) -> tuple[torch.Tensor, int, int]:
    """The table, and the strides from head to head and from sequence to sequence: the latter is one of the table, or,
    where all rows of a head are one table, of the keys or values themselves. Then no table is read."""
    if table is None:
        return pool, pool.stride(1), pool.stride(0)
    return table, pool.stride(0) if head is None else head, table.stride(0)


@triton.jit
def query_rows(places, c):
    """Columns `c` of queries whose rows begin at `places`. What is not there is zero."""
    return tl.load(places[:, None] + c[None, :], mask=(c < D)[None, :], other=0.0)


@triton.jit
def products(q, keys, pages, tile, rows, MASKED: tl.constexpr):
    """Of queries and a tile of keys, fp32 ``[M, BLOCK_N]``.

    A chain of additions in fp32 errs as it is long, and what errs is an exponent. There `q` is where the queries stand,
    and the sums over `PART` columns are added up, each with what the addition before it lost (Kahan 1965).
    """
    if PART == D_PAD:
        k = rows_of(keys, pages, tile, rows, KEY_PAGE, KEY_ROW, D, D_PAD, KEY_PAGED, MASKED)
        s = tl.dot(q, k.T, input_precision="ieee")
    else:
        s = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        lost = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        for first in range(0, D, PART):
            part = query_rows(q, tl.arange(0, PART) + first)
            k = rows_of(keys, pages, tile, rows, KEY_PAGE, KEY_ROW, D, PART, KEY_PAGED, MASKED, first)
            lost = tl.dot(part, k.T, lost, input_precision="ieee")
            before = s
            s = before + lost
            lost -= s - before
    return s


# ---- the online softmax (Milakov and Gimelshein 2018) ----------------------------------------------------------------
# most [M] the largest score so far, in units of ln 2; total [M] the sum of the exponentials; acc [M, DV_PAD] the
# weighted sum of the values; all fp32.


@triton.jit
def absorb(
    acc, most, total, q, keys, values, key_table, value_table, tile,
    b, h, i, start, rows, reads, SHARED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The state with one more tile of keys. `MASKED`: not every row sees all keys of it."""
    key_pages = pages_of(key_table, tile, rows, KEY_PAGED, MASKED)
    s = products(q, keys, key_pages, tile, rows, MASKED)
    j = (tl.arange(0, BLOCK_N) + tile * BLOCK_N)[None, :]
    # A read at a row that is not there would be out of bounds.
    inside = tl.minimum(j, rows - 1) if MASKED else j
    if PLAIN_SCORE:
        factor = SCALE * LOG2E
    else:
        s = score(s * SCALE, b, h, i, inside, start, reads)
        factor = LOG2E
    if MASKED:
        s = tl.where(visible(b, h, i, inside, start, reads) & (j < rows), s, float("-inf"))
    top = tl.maximum(most, tl.max(s, 1) * factor)
    shift = top if PLAIN_SCORE and not MASKED else tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(tl.fma(s, factor, -shift[:, None]))
    shrink = tl.exp2(most - shift)
    total = total * shrink + tl.sum(p, 1)
    value_pages = key_pages if SHARED else pages_of(value_table, tile, rows, VALUE_PAGED, MASKED)
    v = rows_of(values, value_pages, tile, rows, VALUE_PAGE, VALUE_ROW, DV, DV_PAD, VALUE_PAGED, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit
def normaliser(most, total, h, reads):
    """What the weighted sums are multiplied with. [M]"""
    s = sink(h, reads) * LOG2E
    top = tl.maximum(most, s)
    shift = tl.where(top == float("-inf"), 0.0, top)
    scale = tl.exp2(most - shift)
    full = total * scale + tl.exp2(s - shift)
    return tl.where(full == 0.0, EMPTY, scale / full)
