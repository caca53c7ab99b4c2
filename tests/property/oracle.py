"""The oracle: the plain model. `check_same` compares an answer with its own, in all that a caller can see."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.models.tolerances import tolerance

Model = Callable[..., Any]


class Mismatch(AssertionError):
    """The compiled model answered something else than the plain one."""


def check_same(fast: Model, model: Model, args: Sequence[Tensor | None], rows: Tensor | None = None) -> Any:
    """Call both with `args` and compare; returns the answer of `fast`.

    Args:
        rows: bool `[B, S]`, which rows of the answer mean something; the others (left padding) are not compared.
    """
    want = model(*clone(args))
    given = clone(args)
    got = fast(*given)
    compare(given, args, None, what="argument")
    compare(got, want, rows)
    return got


def compare(got: Any, want: Any, rows: Tensor | None = None, what: str = "answer") -> None:
    """Raise `Mismatch` unless structure, dtypes, shapes and values agree; NaN equals NaN only."""
    got_leaves, got_spec = pytree.tree_flatten(got)
    want_leaves, want_spec = pytree.tree_flatten(want)
    if got_spec != want_spec:
        raise Mismatch(f"{what}: structure {got_spec} instead of {want_spec}")
    for index, (g, w) in enumerate(zip(got_leaves, want_leaves, strict=True)):
        _compare_leaf(g, w, rows, f"{what}[{index}]" if len(want_leaves) > 1 else what)


def _compare_leaf(got: Any, want: Any, rows: Tensor | None, name: str) -> None:
    if not isinstance(want, Tensor):
        if type(got) is not type(want) or got != want:
            raise Mismatch(f"{name}: {got!r} instead of {want!r}")
        return
    if not isinstance(got, Tensor):
        raise Mismatch(f"{name}: {type(got).__name__} instead of a tensor")
    seen = [(x.shape, x.dtype, x.device, x.requires_grad) for x in (got, want)]
    if seen[0] != seen[1]:
        raise Mismatch(f"{name}: (shape, dtype, device, requires_grad) is {seen[0]} instead of {seen[1]}")
    if rows is not None and want.dim() == 3:
        keep = rows[:, rows.shape[1] - want.shape[1] :]
        got, want = got[keep], want[keep]
    close = torch.isclose(got, want, rtol=0.0, atol=tolerance(want.dtype).allowed(want), equal_nan=True)
    if not close.all():
        raise Mismatch(_describe(got, want, ~close, name))


def _describe(got: Tensor, want: Tensor, wrong: Tensor, name: str) -> str:
    where = tuple(int(x) for x in wrong.nonzero()[0])
    off = (got.double() - want.double()).abs()[wrong]
    return (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} values differ, by up to {off.max().item():.3g}; "
        f"the first at {where} of {tuple(want.shape)}: {got[where].item():.6g} instead of {want[where].item():.6g}"
    )


def clone(tree: Any) -> Any:
    """A copy of every tensor in `tree`."""
    return pytree.tree_map_only(Tensor, torch.clone, tree)


def identical(got: Any, want: Any) -> bool:
    """Bit for bit, NaN equal to NaN."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    return all(torch.equal(torch.nan_to_num(g, 123.0), torch.nan_to_num(w, 123.0)) for g, w in pairs)
