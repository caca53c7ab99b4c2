"""Rows appended by generated code, against `kvpass.kernels.ops.append`."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvpass.kernels import ops as plain
from kvpass.lowering import build, ops

PAGES, PAGE = 9, 8
ATEN = plain.append


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        pytest.fail("appended by ATen")

    monkeypatch.setattr(ops.ops, "append", refuse)


def pool_of(before: tuple[int, ...], after: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full((*before, PAGES, PAGE, *after), math.nan, dtype=dtype)


def check(pool: Tensor, rows: Tensor, before: int) -> None:
    place = torch.randperm(PAGES * PAGE)[: rows.shape[before]]
    want = ATEN(pool.clone(), rows, place, before)
    assert ops.append(pool, rows, place, before) is pool
    assert torch.equal(pool.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.usefixtures("threads", "no_fallback")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [16, 17, 70])
@pytest.mark.parametrize(
    ("before", "after"), [((), (3,)), ((2,), (400,)), ((2, 5), ()), ((), ()), ((1,), (1,)), ((3,), (2, 5))]
)
def test_rows_of_any_shape(before: tuple[int, ...], after: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    check(pool_of(before, after, dtype), torch.randn(*before, count, *after).to(dtype), len(before))


@pytest.mark.usefixtures("threads", "no_fallback")
def test_rows_as_a_projection_leaves_them() -> None:
    rows = torch.randn(1, 40, 4 * 6 + 5)[..., 5:].view(1, 40, 4, 6).transpose(1, 2)[0]
    check(pool_of((4,), (6,), torch.float32), rows, 1)
    of_three = torch.randn(40, 3, 4, 6).permute(2, 1, 0, 3)
    check(pool_of((4,), (6,), torch.float32), of_three[:, 1], 1)
    longer = torch.full((4, PAGES + 3, PAGE, 6), math.nan)[:, :PAGES]  # heads that are further apart than their pages
    check(longer, rows, 1)


@pytest.mark.usefixtures("threads")
def test_what_is_no_list_of_heads_is_left_to_aten() -> None:
    check(pool_of((4,), (6,), torch.float32), torch.randn(4, 6, 40).mT, 1)
    check(pool_of((2, 4), (6,), torch.float32), torch.randn(4, 2, 40, 6).transpose(0, 1), 2)
    check(torch.full((PAGE, PAGES, 6), math.nan).transpose(0, 1), torch.randn(40, 6), 0)
    check(pool_of((4,), (0,), torch.float32), torch.randn(4, 40, 0), 1)


def test_few_rows_are_left_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_copy", lambda size: pytest.fail("few rows"))
    check(pool_of((4,), (6,), torch.float32), torch.randn(4, 15, 6), 1)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str) -> None:
        raise build.NoCompiler("none here")

    monkeypatch.setattr(build, "load", refuse)
    ops._copy.cache_clear()
    check(pool_of((4,), (6,), torch.float32), torch.randn(4, 40, 6), 1)
    ops._copy.cache_clear()
