"""``kvpass::only_where(x, kept)``: ``x``, of whose entries only those may be read at which ``kept`` holds.

A rewrite that keeps the others no longer what they were says so, and the proof has to show that nothing reads them:
`Fact.valid` carries it. Nothing is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("kvpass", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("only_where(Tensor(a) x, Tensor kept) -> Tensor(a)")  # type: ignore[no-untyped-call]


def _only_where(x: Tensor, kept: Tensor) -> Tensor:
    return x


_library.impl("only_where", _only_where, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]

only_where = torch.ops.kvpass.only_where.default
