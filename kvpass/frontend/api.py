"""What users call beside `torch.compile`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kvpass.frontend import backend
from kvpass.frontend.backend import Options, Record


def compile(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile(model, backend="kvpass")` with the sequence axis dynamic from the first call.

    Args:
        model: a module or a function of tensors.
        **options: of the backend (`kvpass.frontend.backend.Options`).

    Raises:
        OptionError: a malformed option.
    """
    Options.of(options)
    compiled = torch.compile(model, backend="kvpass", options=options or None)

    @functools.wraps(getattr(model, "forward", model))
    def call(*args: Any, **kwargs: Any) -> Any:
        mark_growing(args, kwargs)
        return compiled(*args, **kwargs)

    return call


def mark_growing(*given: Any, axis: int = 1) -> None:
    """Say of all tensors in there that they grow, so that the first capture has a symbolic length already.

    Args:
        axis: of tokens ``[B, S]``; 0 where they are ``[S, B]``.
    """
    for value in pytree.tree_leaves(given):
        _mark(value, axis)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point()


def _mark(value: Any, of_tokens: int) -> None:
    """Say that the sequence axis varies: axis 1, or the only one; the last two of a square mask, the last of
    ``[B, 1, 1, S]``.
    """
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return
    square = value.dim() >= 2 and value.shape[-1] == value.shape[-2] and value.shape[-1] > 1
    if square and (value.dim() != 3 or not value.is_floating_point()):  # which might be rows of as many entries
        axes = [value.dim() - 2, value.dim() - 1]
    elif value.dim() == 4 and value.shape[1] == value.shape[2] == 1:
        axes = [3]
    else:
        axes = [0] if value.dim() == 1 else [of_tokens if _are_tokens(value) else 1]
    for axis in axes:
        if value.shape[axis] > 1:
            torch._dynamo.maybe_mark_dynamic(value, axis)


def wait(fast: Callable[..., Any] | None = None, timeout: float | None = None) -> bool:
    """Block until the steps that are being compiled in the background are there.

    What is compiled is known after a model's first call. Compilations of all models of this process are waited for;
    ``fast`` is there to be read.

    Args:
        timeout: seconds.

    Returns:
        False where the time was up.
    """
    ends = None if timeout is None else time.monotonic() + timeout
    for record in backend.records():
        steps = None if record.program is None else record.program.steps
        for future in [] if steps is None else steps.pending():
            left = None if ends is None else max(0.0, ends - time.monotonic())
            if not futures.wait([future], left).done:
                return False
    return True


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compile a model for these arguments, without using a cache of the user's, and report what was found."""
    report = _explained(model, args, kwargs, axis=1)
    if not report.proven and any(map(_are_tokens, pytree.tree_leaves((args, kwargs)))):
        columns = _explained(model, args, kwargs, axis=0)
        # Where no row reads another one, any axis may be said to grow.
        kept = any(not slot.is_output for part in columns.parts for slot in part.slots)
        report = columns if columns.proven and kept else report
    return report


def _explained(model: Callable[..., Any], args: Any, kwargs: Any, axis: int) -> Any:
    """``axis``: of tokens, along which texts grow."""
    from kvpass.report import Report

    with recording() as found, torch.no_grad():
        torch._dynamo.reset()
        mark_growing(args, kwargs, axis=axis)
        torch.compile(model, backend="kvpass")(*args, **kwargs)
    wait()
    torch._dynamo.reset()
    return Report.of(found)


class recording:
    """Collect the compilations that happen inside a ``with`` block."""

    def __enter__(self) -> list[Record]:
        self.found: list[Record] = []
        backend._listeners.append(self.found.append)
        return self.found

    def __exit__(self, *_: object) -> None:
        backend._listeners.remove(self.found.append)


def reports() -> list[Any]:
    """A report for each of the latest compilations of this process, oldest first."""
    from kvpass.report import Report

    return [Report.of([record]) for record in backend.records()]
