"""`kvpass.kernels.reference`, the meaning of `ir.Attention`, against one softmax at a time."""

import math
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from kvpass.ir import SCORE, Attention, B, H, I, J
from kvpass.kernels.reference import attention, evaluate, visible

CPU = torch.device("cpu")
CAUSAL = sympy.Le(J, I)
CHUNKS = sympy.And(CAUSAL, sympy.Eq(sympy.floor(I / 4), sympy.floor(J / 4)))
WINDOW = sympy.And(CAUSAL, sympy.Gt(J, I - 3))
PADDING = sympy.Function("v_mask", integer=True)


def spec(**given: Any) -> Attention:
    base = {"heads": 6, "kv_heads": 2, "head_size": 5, "value_size": 4, "dtype": torch.float64, "scale": 0.3}
    return Attention(**{**base, "score": SCORE, "support": CAUSAL, **given})


def written_out(
    s: Attention, q: Tensor, k: Tensor, v: Tensor, start: int, keep: Any, score: Any = lambda x, b, h, i, j: x
) -> Tensor:
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(s.heads):
            for n in range(q.shape[2]):
                i = start + n
                seen = [j for j in range(k.shape[2]) if keep(b, h, i, j)]
                if not seen:
                    out[b, h, n] = torch.nan if s.empty_is_nan else 0.0
                    continue
                row = torch.stack(
                    [score(s.scale * (q[b, h, n] @ k[b, h // s.group, j]), b, h, i, j) for j in seen]
                ).softmax(-1)
                out[b, h, n] = row @ v[b, h // s.group, seen]
    return out


def run(s: Attention, start: int, rows: int, batch: int = 2, **loads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(start)
    q = torch.randn(batch, s.heads, rows - start, s.head_size, dtype=torch.float64)
    k = torch.randn(batch, s.kv_heads, rows, s.head_size, dtype=torch.float64)
    v = torch.randn(batch, s.kv_heads, rows, s.value_size, dtype=torch.float64)
    inside = {name: load for name, load in loads.items() if name in str(s.score)}
    leaves = {name: load for name, load in loads.items() if name not in inside}
    mask = visible(s.support, CPU, s.heads, start, rows, tuple(leaves), tuple(leaves.values()))
    return attention(s, q, k, v, mask, start, tuple(inside), tuple(inside.values())), q, k, v


@pytest.mark.parametrize("start", [0, 4, 8])
@pytest.mark.parametrize(
    ("support", "keep"),
    [
        (CAUSAL, lambda b, h, i, j: j <= i),
        (WINDOW, lambda b, h, i, j: i - 3 < j <= i),
        (sympy.true, lambda b, h, i, j: True),
        (CHUNKS, lambda b, h, i, j: j <= i and i // 4 == j // 4),
        (sympy.And(CAUSAL, sympy.Ge(J, I - H)), lambda b, h, i, j: i - h <= j <= i),
    ],
    ids=["causal", "window", "all", "chunks", "by head"],
)
@pytest.mark.parametrize("score", [SCORE, 2 * sympy.tanh(SCORE / 2)], ids=["plain", "soft cap"])
def test_masks_and_scores(score: Any, support: Any, keep: Any, start: int) -> None:
    s = spec(support=support, score=score)
    got, q, k, v = run(s, start, 9)
    cap = (lambda x, *_: x) if score == SCORE else (lambda x, *_: 2 * torch.tanh(x / 2))
    torch.testing.assert_close(got, written_out(s, q, k, v, start, keep, cap))


@pytest.mark.parametrize("empty_is_nan", [False, True])
def test_padding_and_rows_that_see_nothing(empty_is_nan: bool) -> None:
    pad = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    s = spec(support=sympy.And(CAUSAL, sympy.Ne(PADDING(B, J), 0)), empty_is_nan=empty_is_nan)
    got, q, k, v = run(s, 1, 7, v_mask=pad)
    want = written_out(s, q, k, v, 1, lambda b, h, i, j: j <= i and bool(pad[b, j]))
    torch.testing.assert_close(got, want, equal_nan=True)


def test_bias_that_is_loaded() -> None:
    bias = torch.randn(1, 6, 3, 8, dtype=torch.float64)
    s = spec(score=SCORE + sympy.Function("load_bias", real=True)(B, H, I, J))
    got, q, k, v = run(s, 5, 8, load_bias=bias)
    want = written_out(s, q, k, v, 5, lambda b, h, i, j: j <= i, lambda x, b, h, i, j: x + bias[0, h, i - 5, j])
    torch.testing.assert_close(got, want)


def test_softmax_in_another_dtype_is_nearer_than_in_the_operands_own() -> None:
    s = spec(dtype=torch.bfloat16, softmax_dtype=torch.float32, empty_is_nan=True)
    q, k, v = (torch.randn(1, n, 64, d) for n, d in ((6, 5), (2, 5), (2, 4)))
    mask = visible(s.support, CPU, s.heads, 0, 64, (), ())
    exact = attention(spec(), q.double(), k.double(), v.double(), mask, 0, (), ())
    low = attention(s, q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, 0, (), ())
    assert low.dtype is torch.bfloat16
    assert float((low.double() - exact).abs().max()) < 0.05


@pytest.mark.parametrize("size", [3, 7, 41, 47, 49, 55, 61])
def test_division_is_exact(size: int) -> None:
    place = torch.arange(100 * size)
    assert torch.equal(evaluate(sympy.floor(I / size), {I: place}, {}), place // size)
    assert torch.equal(evaluate(sympy.Ge(I / size, J), {I: place, J: place // size}, {}), torch.ones_like(place).bool())


def test_expressions_are_evaluated_as_sympy_says() -> None:
    x, y = sympy.symbols("x y", integer=True, nonnegative=True)
    grid = {x: torch.arange(6).view(-1, 1), y: torch.arange(6).view(1, -1)}
    leaf = sympy.Function("v_t", integer=True)
    table = torch.tensor([3, 1, 4, 1, 5, 9])
    for expr in (
        x + 2 * y - 3,
        sympy.floor(x / 2),
        sympy.Max(x, y - 1),
        sympy.Min(x, 3),
        sympy.Piecewise((x, sympy.Lt(x, y)), (7, sympy.Eq(y, 2)), (0, True)),
        sympy.Or(sympy.Le(x, y), sympy.Eq(leaf(x), leaf(y))),
        sympy.Not(sympy.Ge(x * y, 4)),
        leaf(y) - sympy.Abs(x - 3),
        sympy.floor((2 * x - y) / 3),
        sympy.Lt(x / 3, y - 1),
    ):
        got = torch.as_tensor(evaluate(expr, grid, {"v_t": table})).expand(6, 6)
        for a in range(6):
            for b in range(6):
                here = expr.replace(leaf, lambda k, a=a, b=b: table[int(k.subs({x: a, y: b}))].item())
                assert got[a, b].item() == here.subs({x: a, y: b}), (expr, a, b)


def test_a_function_of_indices_is_as_exact_as_the_rest() -> None:
    score = SCORE + sympy.exp(-sympy.Abs(I - J) / 5) - 2 ** (-H - 1) * (I - J) / 3
    found, q, k, v = run(spec(score=score), 4, 9)
    expected = written_out(
        spec(),
        q,
        k,
        v,
        4,
        lambda b, h, i, j: j <= i,
        lambda x, b, h, i, j: x + _decay(i - j) - 2 ** (-h - 1) * (i - j) / 3,
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _decay(distance: int) -> float:
    return math.exp(-abs(distance) / 5)


def test_powers_of_whole_numbers() -> None:
    heads = torch.arange(4)
    assert evaluate(2 ** (-H), {H: heads}, {}).tolist() == [1, 0.5, 0.25, 0.125]
    assert evaluate(3**H, {H: heads}, {}).tolist() == [1, 3, 9, 27]
