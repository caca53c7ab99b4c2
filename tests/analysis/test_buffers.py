"""Closed forms of what buffers hold: the formula is the content, or there is none."""

import pytest
import sympy
import torch
from torch import Tensor

from kvpass.analysis.buffers import closed_form
from kvpass.analysis.facts import index
from kvpass.kernels.reference import evaluate

TAPS = torch.tensor([1.0, 1, 1, 0, 0])
MIXED = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])

HELD = {
    "taps": TAPS,
    "taps of all channels": TAPS.expand(6, 4, 5),
    "taps for a depthwise convolution": TAPS[None, None],
    "taps ahead": 1 - TAPS,
    "the tap in the middle": torch.tensor([0, 1, 0]),
    "bool": TAPS.bool().expand(3, 5),
    "half": TAPS.half(),
    "a triangle": torch.ones(5, 5).tril(),
    "a ramp": torch.arange(2, 9, 2),
}
NOT = {
    "all are kept": torch.ones(5),
    "none are kept": torch.zeros(4, 2, 5),
    "other numbers": TAPS * 0.5,
    "other taps for other channels": MIXED,
    "every second": torch.arange(12) % 2,
    "eight bits": TAPS.to(torch.float8_e4m3fn),
    "eight bits, two axes": torch.ones(4, 4).tril().to(torch.float8_e5m2),
}


def leaf() -> sympy.Basic:
    return sympy.nan


@pytest.mark.parametrize("name", HELD)
def test_the_formula_is_the_content(name: str) -> None:
    tensor: Tensor = HELD[name]
    form = closed_form(tensor, leaf)
    assert form is not None
    axes = [k for k, size in enumerate(tensor.shape) if size != 1]
    shape = [tensor.shape[k] for k in axes]
    places = {
        index(k): torch.arange(size).view([-1 if k == other else 1 for other in range(len(shape))])
        for k, size in enumerate(shape)
    }
    found = torch.as_tensor(evaluate(form, places, {})).expand(shape).reshape(tensor.shape)
    assert torch.equal(found.to(tensor.dtype), tensor)


@pytest.mark.parametrize("name", NOT)
def test_what_has_no_formula(name: str) -> None:
    assert closed_form(NOT[name], leaf) is None
