"""How far two answers may stand apart, per dtype: the only place where a test takes its tolerance from.

The numbers allow floating-point reordering (a product over cached rows sums in another order than one over all rows)
in models of up to four layers. They are far below the effect of one wrong key in a softmax: `test_oracle` holds that.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """`|got - want| <= atol + rtol * max |want|`, the largest finite value of the whole tensor.

    Logits are sums of terms that cancel: what rounding leaves of them is small against the largest, not against each.
    """

    rtol: float
    atol: float

    def allowed(self, want: torch.Tensor) -> float:
        """How far any value may be off."""
        if self.rtol == 0:
            return self.atol
        finite = want[want.isfinite()].abs()
        return self.atol + self.rtol * (finite.max().item() if finite.numel() else 0.0)


EXACT = Tolerance(0.0, 0.0)

TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-10, 1e-10),
    torch.float32: Tolerance(2e-5, 2e-5),
    torch.bfloat16: Tolerance(2.5e-2, 2e-2),
    torch.float16: Tolerance(4e-3, 4e-3),
}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """The tolerance for `dtype`; integers and booleans are compared exactly."""
    return TOLERANCES.get(dtype, EXACT)
