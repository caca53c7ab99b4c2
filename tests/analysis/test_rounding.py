"""What is decided by numbers that are rounded is not told from their closed form."""

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor

import kvpass
from kvpass.analysis.rounding import bound_of, is_exact
from kvpass.frontend.api import recording
from tests.adversarial.base import Model
from tests.analysis.tools import BATCH, ROWS, analysis_of

ROW, KEY = sympy.symbols("x0 x1", integer=True, nonnegative=True)
LEAF = sympy.Function("leaf")(ROW)


@pytest.mark.parametrize(
    ("expr", "dtype", "exact"),
    [
        (ROW - KEY, torch.float32, True),
        (ROW / 4 + sympy.Rational(1, 2), torch.float32, True),
        (ROW * sympy.Float(0.03), torch.float32, False),
        (ROW * sympy.Float(0.03), torch.float64, False),
        (ROW / 49, torch.float64, False),
        (ROW + 1_700_000_000, torch.float32, False),
        (ROW + 1_700_000_000, torch.float64, True),
        (ROW * KEY, torch.float32, False),
        (ROW * KEY, torch.int64, True),
        (ROW * (1 << 28), torch.int32, False),
        (ROW * (1 << 28), torch.int64, True),
        (sympy.floor(ROW / 3) * 2, torch.float32, True),
        (sympy.Mod(ROW, 7) - LEAF, torch.float32, True),
        (sympy.sin(ROW), torch.float32, False),
        (sympy.Piecewise((-sympy.oo, ROW < KEY), (sympy.Float(0.3), True)), torch.float32, True),
    ],
)
def test_a_dtype_holds_a_form(expr: sympy.Expr, dtype: torch.dtype, exact: bool) -> None:
    assert is_exact(expr, dtype, {"leaf": 1000}) is exact


def test_a_float_does_not_hold_every_integer() -> None:
    assert not is_exact(LEAF, torch.float32, {"leaf": bound_of(torch.int64)})
    assert not is_exact(LEAF, torch.int32, {"leaf": bound_of(torch.int64)})
    assert is_exact(LEAF - 1, torch.int32, {"leaf": bound_of(torch.int32)})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("most", [1, 2])
def test_flags_of_any_integers_are_a_mask(dtype: torch.dtype, most: int) -> None:
    """Of other integers ``1 - keep`` may be of any size, and what is hidden comes back."""

    def weights(x: Tensor, keep: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return ((x @ x.mT).masked_fill(later, -1e9) + (1 - keep[:, None]) * -1e9).softmax(-1)

    keep = most * (torch.arange(ROWS) >= torch.arange(BATCH)[:, None])
    found = analysis_of(weights, torch.ones(BATCH, ROWS, 4), keep.to(dtype))
    assert (found.fact(found.outputs[0]).whole is None) == (most == 1)
    assert len(found.taken) == (most == 1)


def seconds(i: Tensor, j: Tensor) -> Tensor:
    """In float32 row 134 sees row 135."""
    return j * 0.03 < i * 0.03 + 0.03


def window(i: Tensor, j: Tensor) -> Tensor:
    """Four rows, or three: 0.4 is not four times 0.1."""
    return (j <= i) & (i * 0.1 - j * 0.1 < 0.4)


def blocks(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & ((j * 0.1) // 0.8 == (i * 0.1) // 0.8)


def hidden(i: Tensor, j: Tensor) -> Tensor:
    """Exact again on paper alone."""
    return j / 49 * 49 < i + 1


def halves(i: Tensor, j: Tensor) -> Tensor:
    return (j * 0.5 <= i * 0.5) & ((j * 0.5) // 4 == (i * 0.5) // 4)


class Seen(Model):
    """Attention under a mask of float indices."""

    def __init__(self, seen: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def mix(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1], dtype=torch.float32)
        return self.attend(x, self.seen(index[:, None], index))


@pytest.mark.parametrize("seen", [seconds, window, blocks, hidden, halves], ids=lambda seen: seen.__name__)
def test_masks_of_fractions(seen: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, ids = Seen(seen).eval(), torch.randint(0, 19, (1, 140))
    with torch.no_grad(), recording() as found:
        fast = kvpass.compile(model, cache=kvpass.Cache("8MiB", page_size=4), verify=False)
        for rows in (9, 12, 130, 136, 140):
            torch.testing.assert_close(fast(ids[:, :rows]), model(ids[:, :rows]), rtol=1e-4, atol=1e-5)
    # Beside a causal mask in whole numbers the others are read, entry by entry.
    assert kvpass.Report.of(found).proven == (seen in (window, blocks, halves))
