"""How far two answers may stand apart, per dtype: the only place where a test takes its tolerance from.

The numbers allow floating-point reordering (a product over cached rows sums in another order than one over all rows)
in models of up to four layers. They are far below the effect of one wrong key in a softmax: `test_oracle` holds that.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """`|got - want| <= atol + rtol * |want|`."""

    rtol: float
    atol: float


EXACT = Tolerance(0.0, 0.0)

TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-9, 1e-9),
    torch.float32: Tolerance(5e-5, 5e-5),
    torch.bfloat16: Tolerance(4e-2, 8e-2),
    torch.float16: Tolerance(4e-3, 8e-3),
}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """The tolerance for `dtype`; integers and booleans are compared exactly."""
    return TOLERANCES.get(dtype, EXACT)
