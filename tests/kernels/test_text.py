"""The text form of an attention says everything and can be read back."""

from dataclasses import replace

import pytest
import sympy
import torch

from kvpass.ir import SCORE, Attention, B, H, I, J, Read, Step
from kvpass.kernels.text import expression, parse, parse_expression, text

SCORED = sympy.Function("bias", real=True)(B, H, I, J)
PADDING = sympy.Function("pad", integer=True)
CAUSAL = sympy.Le(J, I)
SPECS = [
    Attention(9, 3, 64, 64, torch.float32, 0.125, SCORE, CAUSAL),
    Attention(4, 4, 40, 24, torch.bfloat16, 0.1, 30 * sympy.tanh(SCORE / 30), sympy.And(CAUSAL, J > I - 8)),
    Attention(
        8,
        1,
        3,
        5,
        torch.float16,
        1 / 3,
        SCORE + SCORED * sympy.Float(0.1),
        sympy.And(CAUSAL, sympy.Ne(PADDING(B, J), 0)),
        reads=(Read("bias", torch.float32, "hij"), Read("pad", torch.int64)),
        softmax_dtype=torch.float32,
        empty_is_nan=True,
        batch=2,
        page_size=16,
        step=Step.DECODE,
    ),
    Attention(
        2,
        1,
        8,
        8,
        torch.float32,
        1.0,
        sympy.Piecewise((SCORE, I - J < 7), (SCORE - sympy.Rational(1, 3) * sympy.floor((I - J) / 8), True)),
        sympy.Or(J < 4, sympy.Eq(sympy.floor(I / 48), sympy.floor(J / 48)), sympy.Not(sympy.Eq(J, 3))),
        reads=(Read("sink", torch.float32, "h"),),
        sink="sink",
    ),
    Attention(2, 2, 8, 8, torch.float32, 1.0, SCORE - 2 ** (-H - 1) * sympy.Abs(I - J), sympy.true),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: str(s.dtype))
def test_round_trip(spec: Attention) -> None:
    assert parse(text(spec)) == spec


def test_every_field_is_said() -> None:
    said = text(SPECS[2])
    for word in ("heads=8", "kv_heads=1", "head_size=3", "value_size=5", "float16", "page_size=16", "step=decode"):
        assert word in said
    assert "read bias: float32[h, i, j]" in said
    assert text(replace(SPECS[2], empty_is_nan=False)) != said


@pytest.mark.parametrize("number", [0.1, 1e-30, 3.4028234663852886e38, 1 / 3])
def test_numbers_to_the_last_bit(number: float) -> None:
    assert parse_expression(expression(sympy.Float(number))) == sympy.Float(number)


@pytest.mark.parametrize(
    "line",
    [
        "score = import os",
        "score = score if i else j",
        "score = x",
        "read bias: float32[q]",
        "nonsense",
        "score = score;",
    ],
)
def test_what_is_not_understood_is_quoted(line: str) -> None:
    with pytest.raises(ValueError, match="not"):
        parse(f"attention heads=1 kv_heads=1 head_size=1 value_size=1 dtype=float32 scale=1.0\n{line}\nsupport = True")
