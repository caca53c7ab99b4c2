"""Generated C++ against the reference."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpass.ir import Layout
from kvpass.kernels.text import parse, text
from kvpass.lowering import cpp, cpu
from kvpass.lowering.cpu import Rows
from tests.lowering.cases import MASKS, POOL, SCORES, Inputs, Shape, assert_as_good_as_plain, attention

HEADS = {(4, 4): 1, (6, 2): 3, (10, 2): 5, (7, 1): 7, (16, 2): 8, (16, 1): 16}
SIZES = [16, 40, 64, 80, 96, 128, (192, 128), 256, 512, 20, 3]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def as_shipped() -> Iterator[None]:
    """The flags that users get; the rest of the tests compiles faster code more slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KVPASS_CXXFLAGS", raising=False)
        yield


def paged(inputs: Inputs) -> torch.Tensor:
    """The kernel on pages in random order."""
    keys = Rows.paged(POOL, *inputs.pages(inputs.key), -1)
    values = Rows.paged(POOL, *inputs.pages(inputs.value), -1)
    return call(inputs, keys, values)


def dense(inputs: Inputs) -> torch.Tensor:
    """The kernel on one table for each head, with nothing behind the last row."""
    return call(inputs, Rows.dense(inputs.key), Rows.dense(inputs.value))


def call(inputs: Inputs, keys: Rows, values: Rows) -> torch.Tensor:
    kernel = cpu.kernel(inputs.spec)
    return kernel(inputs.query, keys, values, inputs.shape.cached, inputs.shape.rows, inputs.reads)


def check(spec: Any, shape: Shape) -> None:
    inputs = Inputs(spec, shape)
    assert_as_good_as_plain(paged(inputs), inputs)
    assert_as_good_as_plain(dense(inputs), inputs)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *((size, torch.float32) for size in SIZES),
        *((size, torch.bfloat16) for size in (16, 40, 64, 128, (192, 128), 3)),
        *((size, torch.float16) for size in (20, 64, 256)),
    ],
    ids=str,
)
def test_head_sizes(size: Any, dtype: torch.dtype) -> None:
    head, value = size if isinstance(size, tuple) else (size, size)
    spec = attention(6, 2, head, value, dtype)
    for new, cached in ((1, 0), (1, 64), (2, 130), (17, 63)):
        check(spec, Shape(new=new, cached=cached))


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [*((heads, torch.float32) for heads in HEADS), ((6, 2), torch.bfloat16), ((16, 1), torch.bfloat16)],
    ids=str,
)
def test_groups(heads: tuple[int, int], dtype: torch.dtype) -> None:
    spec = attention(*heads, dtype=dtype)
    for new, cached in ((1, 200), (2, 65), (64, 1)):
        check(spec, Shape(new=new, cached=cached))


@pytest.mark.parametrize("new", [1, 2, 5, 17, 64, 257])
@pytest.mark.parametrize("cached", [0, 1, 63, 64, 65, 1000])
def test_rows(new: int, cached: int) -> None:
    check(attention(), Shape(new=new, cached=cached))


@pytest.mark.parametrize(
    ("mask", "empty_is_nan"), [*((mask, False) for mask in MASKS), ("padding", True), ("strict", True), ("none", True)]
)
@pytest.mark.parametrize("new", [1, 3, 70])
def test_masks(mask: str, new: int, empty_is_nan: bool) -> None:
    spec = attention(mask=mask, empty_is_nan=empty_is_nan)
    for cached in (0, 65, 200):
        check(spec, Shape(new=new, cached=cached))


@pytest.mark.parametrize(
    ("score", "mask", "dtype"),
    [
        *((score, mask, torch.float32) for score in SCORES for mask in ("causal", "padding")),
        *((score, "causal", dtype) for score in ("soft_cap", "alibi", "bias") for dtype in FLOATS[1:]),
    ],
)
def test_scores(score: str, mask: str, dtype: torch.dtype) -> None:
    spec = attention(dtype=dtype, score=score, mask=mask)
    for new in (1, 40):
        check(spec, Shape(new=new, cached=70))


@pytest.mark.parametrize("page_size", [1, 3, 16, 24, 128])
def test_page_sizes(page_size: int) -> None:
    for new in (1, 33):
        check(attention(), Shape(new=new, cached=150, page_size=page_size))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 64])
def test_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for kv_heads, cached in ((1, 3000), (3, 700), (5, 65)):
        check(attention(2 * kv_heads, kv_heads), Shape(batch=1, cached=cached))
    check(attention(), Shape(new=200, cached=65))


@pytest.mark.parametrize("name", ["OMP_THREAD_LIMIT=1", "KVPASS_CXXFLAGS=-fno-openmp"])
def test_fewer_threads_than_were_asked_for(name: str) -> None:
    """The share of a thread that does not come is not lost."""
    program = (
        "import torch; torch.set_num_threads(4)\n"
        "from tests.lowering.test_cpp import Shape, attention, check\n"
        "check(attention(2, 1), Shape(batch=1, cached=3000))\n"
        "check(attention(), Shape(new=200, cached=65))\n"
        "print('right')"
    )
    environment = os.environ | dict([name.split("=")])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "right\n", done.stderr[-2000:]


def test_sink() -> None:
    spec = attention(score="plain")
    source = text(spec).replace("  score", "  read sink: float32[h]\n  score", 1)
    spec = replace(parse(source), sink="sink")
    for mask in ("causal", "none"):
        for new in (1, 40):
            inputs = Inputs(replace(spec, support=attention(mask=mask).support), Shape(new=new))
            found = paged(inputs)
            scores = inputs.query.double() @ inputs.key.double().repeat_interleave(2, 1).mT * spec.scale
            i = torch.arange(inputs.shape.cached, inputs.shape.rows).unsqueeze(1)
            keep = (torch.arange(inputs.shape.rows) <= i) & (mask == "causal")
            column = inputs.reads[0].double().view(1, -1, 1, 1).expand(2, -1, new, 1)
            weights = torch.cat([scores.masked_fill(~keep, float("-inf")), column], -1).softmax(-1)[..., :-1]
            exact = weights @ inputs.value.double().repeat_interleave(2, 1)
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_heads_inside_a_row() -> None:
    """Pools ``[pages, page_size, K, D]`` and ``[K, pages, page_size, D]`` at once."""
    inputs = Inputs(attention(), Shape(new=2, cached=130))
    pool, table = inputs.pages(inputs.key)
    keys = Rows.paged(Layout(0, False, 64), pool.permute(1, 2, 0, 3).contiguous(), table, -1)
    values = Rows.paged(POOL, *inputs.pages(inputs.value), -1)
    assert_as_good_as_plain(call(inputs, keys, values), inputs)


def test_pages_that_follow_each_other() -> None:
    inputs = Inputs(attention(), Shape(batch=1, new=2, cached=130))
    pool = torch.full((2, 9, 64, 64), float("nan"))
    pool.flatten(1, 2)[:, 256 : 256 + 132] = inputs.key[0]
    keys = Rows.paged(POOL, pool, torch.zeros(1, 3, dtype=torch.int32), 4)
    assert_as_good_as_plain(call(inputs, keys, Rows.dense(inputs.value)), inputs)


def test_queries_against_keys_of_something_else() -> None:
    """A cross-attention: the rows of the queries say nothing about the keys."""
    spec = attention(mask="all")
    inputs = Inputs(spec, Shape(new=5, cached=50))
    found = cpu.kernel(spec)(inputs.query, Rows.dense(inputs.key), Rows.dense(inputs.value), 7, 55)
    assert_as_good_as_plain(found, inputs)


def test_a_value_that_is_nan_or_infinite_is_not_hidden() -> None:
    inputs = Inputs(attention(mask="window"), Shape(batch=1, new=1, cached=100))
    inputs.key[0, 0, 80, 3] = float("nan")
    inputs.value[0, 1, 90, 5] = float("inf")
    inputs.key[0, :, 10] = float("nan")  # outside of the window
    found = dense(inputs)
    assert found[0, :2].isnan().all()
    assert found[0, 2:, :, 5].isinf().all()
    assert found[0, 2:, :, :5].isfinite().all()


def test_a_row_whose_only_key_is_nan() -> None:
    inputs = Inputs(attention(), Shape(new=1, cached=0))
    inputs.key[1, 0] = float("nan")
    found = dense(inputs)
    assert found[1, :2].isnan().all()
    assert found[0].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("new", [1, 20])
def test_what_fills_up_a_row_does_not_count(dtype: torch.dtype, new: int) -> None:
    """A head size between two vectors; a score that is no sum shows what is added to all products alike."""
    check(attention(head_size=20, value_size=21, dtype=dtype, score="soft_cap"), Shape(new=new, cached=70))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize(("new", "cached"), [(1, 1), (32, 0)])
def test_results_are_rounded_to_nearest(dtype: torch.dtype, new: int, cached: int) -> None:
    """The mean over a power of two is exact in float32."""
    inputs = Inputs(attention(dtype=dtype, mask="all"), Shape(new=new, cached=cached))
    inputs.query.zero_()
    inputs.value[:, :, 2:] = 0
    expected = (inputs.value.float().sum(2) / (new + cached)).to(dtype)
    assert torch.equal(dense(inputs)[:, ::2, -1], expected)


def test_only_pages_that_matter_are_visited() -> None:
    """Pages outside of a window hold NaN in every row: one that is read would show."""
    spec = attention(mask="window")
    inputs = Inputs(spec, Shape(new=3, cached=1000))
    first = (1000 - 40 + 1) // 64 * 64
    inputs.key[:, :, :first] = float("nan")
    inputs.value[:, :, :first] = float("nan")
    assert paged(inputs).isfinite().all()
    inputs.key[:, :, first] = float("nan")  # the check can fail: a tile that is visited is multiplied
    inputs.value[:, :, first] = float("nan")
    assert not paged(inputs).isfinite().all()


def test_queries_of_another_shape_are_refused() -> None:
    inputs = Inputs(attention(heads=4, kv_heads=2), Shape(new=2, cached=5))
    keys, values = Rows.dense(inputs.key), Rows.dense(inputs.value)
    for query in (inputs.query[:, :2], inputs.query[..., :-1]):
        with pytest.raises(ValueError, match="of a kernel for 4 heads"):
            cpu.kernel(inputs.spec)(query, keys, values, inputs.shape.cached, inputs.shape.rows, inputs.reads)


def test_shapes_that_are_refused() -> None:
    for spec in (attention(dtype=torch.float64), replace(attention(), softmax_dtype=torch.float64)):
        with pytest.raises(NotImplementedError):
            cpp.source(spec)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    heads=st.sampled_from(list(HEADS)),
    size=st.integers(1, 140),
    value_size=st.integers(1, 140),
    mask=st.sampled_from(list(MASKS)),
    score=st.sampled_from(list(SCORES)),
    dtype=st.sampled_from(FLOATS),
    shapes=st.lists(
        st.builds(
            Shape,
            batch=st.integers(1, 3),
            new=st.integers(1, 80),
            cached=st.integers(0, 300),
            page_size=st.sampled_from([1, 5, 16, 64]),
        ),
        min_size=3,
        max_size=3,
    ),
)
def test_anything(
    heads: tuple[int, int],
    size: int,
    value_size: int,
    mask: str,
    score: str,
    dtype: torch.dtype,
    shapes: list[Shape],
) -> None:
    spec = attention(*heads, size, value_size, dtype, mask, score)
    for shape in shapes:
        check(spec, shape)
