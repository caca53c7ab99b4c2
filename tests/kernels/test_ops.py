"""Rows into a pool and out of it, and products with one row, against what they mean."""

import math

import pytest
import torch
import torch.nn.functional as F

from kvpass.kernels.ops import append, linear, read

PAGE = 4
ROW_SHAPES = [((), (3,)), ((2,), (3,)), ((2, 5), ()), ((), ()), ((1,), (1,))]


@pytest.mark.parametrize(("before", "after"), ROW_SHAPES)
@pytest.mark.parametrize("pages", [[[1, 2, 3]], [[3, 1, 2]], [[2, 4, 6], [5, 1, 3]]])
def test_what_was_appended_is_read(pages: list[list[int]], before: tuple[int, ...], after: tuple[int, ...]) -> None:
    length, batch = 10, len(pages)
    pool = torch.full((*before, 7, PAGE, *after), math.nan)
    rows = torch.randn(*before, batch, length, *after)
    table = torch.tensor(pages, dtype=torch.int32)
    place = table.long()[:, torch.arange(length) // PAGE] * PAGE + torch.arange(length) % PAGE
    k = len(before)
    assert append(pool, rows.flatten(k, k + 1), place.reshape(-1), k) is pool
    want = rows.movedim(k, 0)
    assert torch.equal(read(pool, table, -1, length, k), want)
    assert int(pool.isnan().sum()) == pool.numel() - rows.numel()
    if pages == [[1, 2, 3]]:
        in_place = read(pool, table, 1, length, k)
        assert torch.equal(in_place, want)
        assert in_place.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()


@pytest.fixture
def two_threads() -> object:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 300), (300,), (1, 300), (2, 300), (1, 7, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("out", [512, 511])
def test_linear(out: int, dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(out, 300, dtype=dtype)
    added = torch.randn(out, dtype=dtype) if bias else None
    got, want = linear(x, weight, added), F.linear(x, weight, added)
    assert got.shape == want.shape
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    error = float((got.double() - exact).abs().max())
    assert error <= 2 * float((want.double() - exact).abs().max()) + 1e-5


@pytest.mark.usefixtures("two_threads")
def test_linear_of_a_weight_that_is_not_contiguous() -> None:
    x, weight = torch.randn(1, 300), torch.randn(300, 512).T
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
