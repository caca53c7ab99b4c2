"""What a softmax forgets: the claim that the length adds one number to all entries along an axis, tried."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from kvpass.analysis.facts import Fact
from tests.analysis.tools import BATCH, ROWS, analysis_of

Program = Callable[[Tensor], Tensor]
INF = float("inf")


def slopes() -> Tensor:
    return (torch.arange(2) + 0.5).cos()[:, None, None]


def table() -> Tensor:
    return torch.arange(1 - 20, 1)


def back(x: Tensor) -> Tensor:
    return torch.arange(1 - x.shape[1], 1)


def place(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def later(x: Tensor) -> Tensor:
    return place(x) > place(x)[:, None]


def total(x: Tensor) -> Tensor:
    return place(x).float().sum() / 8


def scores(x: Tensor) -> Tensor:
    return (x @ x.mT)[:, None]


LEVEL: dict[str, Program] = {
    "distance": lambda x: back(x).float(),
    "by_head": lambda x: back(x) * slopes(),
    "twice": lambda x: back(x) * slopes() + 2 * back(x) - place(x),
    "by_row": lambda x: place(x)[:, None].float().cos() * back(x),
    "added_to_scores": lambda x: scores(x) + back(x) * slopes(),
    "taken_from_scores": lambda x: scores(x) - back(x).view(1, 1, 1, -1) * slopes(),
    "masked": lambda x: (scores(x) + back(x) * slopes()).masked_fill(later(x), -INF),
    "masked_by_where": lambda x: torch.where(later(x), torch.finfo(x.dtype).min, scores(x) + back(x) * slopes()),
    "one_number": lambda x: scores(x) + place(x).float().sum(),
    "end_of_a_table": lambda x: (table() * slopes())[:, :, 20 - x.shape[1] :].expand(2, x.shape[1], x.shape[1]),
    "end_counted_back": lambda x: scores(x) + (table() * slopes())[:, :, -x.shape[1] :],
}
NOT_LEVEL: dict[str, Program] = {
    "by_key": lambda x: back(x) * place(x).float().cos(),
    "as_factor": lambda x: scores(x) * back(x),
    "saturated": lambda x: (back(x).clamp(min=-3) * slopes()).expand(2, x.shape[1], x.shape[1]),
    "scaled_by_the_length": lambda x: (place(x) * slopes()).expand(2, x.shape[1], x.shape[1]) * x.shape[1],
    "alpha_of_the_length": lambda x: torch.add(scores(x), place(x), alpha=x.shape[1]),
    "square": lambda x: back(x).float() * back(x),
    "end_of_a_curve": lambda x: table().float().exp()[20 - x.shape[1] :],
    "end_of_a_mask": lambda x: (table() * slopes()).masked_fill(table() % 3 == 0, -INF)[:, :, 20 - x.shape[1] :],
    "part_of_a_triangle": lambda x: scores(x) + total(x).expand(x.shape[1], x.shape[1]).tril(-2),
    "running_sum": lambda x: scores(x) + total(x).expand(x.shape[1]).cumsum(0),
    "triangle": lambda x: (scores(x) + back(x)).tril(),
    "mask_that_moves": lambda x: (scores(x) + back(x)).masked_fill(back(x) < -3, -INF),
    "masked_and_back": lambda x: (scores(x) + back(x)).masked_fill(later(x), -1e4) + 1e4,
    "padded": lambda x: torch.nn.functional.pad((back(x) * slopes())[..., 1:], (1, 0)),
}


def draw(rows: int) -> Tensor:
    return torch.randn(BATCH, ROWS, 4, generator=torch.Generator().manual_seed(0))[:, :rows]


@cache
def facts() -> dict[str, Fact]:
    """Of all programs, in one graph: tracing is what costs."""
    programs = LEVEL | NOT_LEVEL
    analyzed = analysis_of(lambda x: [program(x) for program in programs.values()], draw(ROWS))
    return {name: analyzed.fact(node) for name, node in zip(programs, analyzed.outputs, strict=True)}


def claimed(name: str) -> bool:
    fact = facts()[name]
    last = len(fact.dims) - 1
    return fact.length is not None and set(fact.flat(last)) <= fact.shift.level


def holds(program: Program) -> bool:
    """Another length adds one number to the entries of a row that are not masked."""
    long, short = program(draw(ROWS)), program(draw(ROWS - 2))
    long = long[..., : ROWS - 2] if long.dim() == 1 or long.shape[-2] != ROWS else long[..., : ROWS - 2, : ROWS - 2]
    kept = torch.isfinite(short) & (short.abs() < 1e30)
    if not torch.equal(kept, torch.isfinite(long) & (long.abs() < 1e30)):
        return False
    difference = (long.double() - short.double()).masked_fill(~kept, 0.0)
    mean = difference.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    return bool(((difference - mean).abs() < 1e-4)[kept].all())


@pytest.mark.parametrize("name", LEVEL)
def test_level_is_seen_and_true(name: str) -> None:
    assert holds(LEVEL[name])
    assert claimed(name)


@pytest.mark.parametrize("name", NOT_LEVEL)
def test_nothing_else_is_claimed(name: str) -> None:
    assert not claimed(name)
    assert not holds(NOT_LEVEL[name])
