"""Memory of slots: dtypes, growth, giving back."""

from __future__ import annotations

import mmap

import pytest
import torch

from kvpass.cache.blocks import PageId
from kvpass.cache.pools import Pool, SlotSpec, poison_byte
from tests.cache.support import CPU, spec

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]  # fmt: skip


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, reserve: bool) -> None:
    pool = Pool(spec("x", (2,), (3,), dtype), 4, reserve=reserve)
    pool.grow(2, 5)
    assert pool.tensor.shape == (2, 5 if reserve else 2, 4, 3)
    assert pool.tensor.dtype == dtype
    pool.raw[:, 1] = poison_byte(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        assert pool.tensor[:, 1].to(torch.complex64 if dtype.is_complex else torch.float32).isnan().all()
    else:
        assert (pool.tensor[:, 1] != 0).all()


@pytest.mark.parametrize("reserve", [True, False])
def test_a_pool_made_in_inference_mode_can_be_written_outside(reserve: bool) -> None:
    with torch.inference_mode():
        pool = Pool(spec("x"), 4, reserve=reserve)
        pool.grow(2, 5)
        pool.tensor[1, 0, 0] = 1.0
    assert not pool.tensor.is_inference()
    pool.tensor[1] = 2.0
    with torch.inference_mode():
        pool.tensor[1, 1, 1].fill_(3.0)
    pool.tensor.sum()


def test_growing_keeps_rows() -> None:
    pool = Pool(spec("x"), 4, reserve=False)
    pool.grow(2, 100)
    pool.tensor[:, 1] = 7.0
    pool.grow(3, 100)
    assert pool.pages == 4
    assert (pool.tensor[:, 1] == 7.0).all()
    pool.grow(90, 100)
    assert pool.pages == 90
    pool.grow(91, 100)
    assert pool.pages == 100


def test_freed_pages_lose_their_memory_and_others_do_not() -> None:
    pool = Pool(spec("x", (2,), (100,)), 64)  # 25,600 bytes a page and head: not a whole number of the system's pages
    pool.grow(1, 12)
    pool.tensor.fill_(5.0)
    pool.release([PageId(2), PageId(3), PageId(7)])
    for head in pool.tensor:
        assert {i for i in range(12) if (head[i] == 5.0).all()} == {0, 1, 4, 5, 6, 8, 9, 10, 11}
        assert (head[2:4] == 0).float().mean() > 0.9  # only the edges are left
        assert (head[7] == 0).float().mean() > 0.6


def test_reserved_memory_is_not_taken_before_it_is_used() -> None:
    before = resident()
    pool = Pool(spec("x", (1,), (256,)), 64)
    pool.grow(1, 2**40 // pool.page_bytes)  # one tebibyte
    pool.tensor[:, 1].fill_(1.0)
    assert resident() - before < 64 * 2**20


def test_huge_pages_take_at_most_half_as_much_again() -> None:
    heads = 8
    pool = Pool(spec("x", (heads,), (256,)), 64)
    pool.grow(1, 2**32 // pool.page_bytes)
    before = resident()
    for pages in (1, 10, 64, 65, 100, 200):
        pool.tensor[:, :pages].fill_(1.0)
        used = pages * pool.page_bytes
        assert resident() - before < 1.5 * used + heads * 2 * mmap.PAGESIZE + 2**20
    with open("/proc/self/smaps") as file:
        assert sum(line.startswith("VmFlags") and " hg" in line for line in file) >= heads


def test_no_memory_is_a_memory_error() -> None:
    pool = Pool(spec("x"), 64)
    with pytest.raises(MemoryError, match=r"slot 'x'"):
        pool.grow(1, 2**60)
    assert (pool.pages, pool.raw) == (0, None)


@pytest.mark.parametrize(("identity", "after"), [(b"short", (1,)), (bytes(32), (0,)), (bytes(32), (2, -1))])
def test_malformed_slots_are_refused(identity: bytes, after: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="slot 'x'"):
        SlotSpec(identity, (), after, torch.float32, CPU, "x")


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
