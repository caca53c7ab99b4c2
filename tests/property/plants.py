"""Faults planted in the compiler itself: what the oracle, and the check at compile time, have to see."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpass.frontend import backend, pipeline
from kvpass.ir import Attention, Captured, I
from kvpass.kernels import ops
from kvpass.lowering import cpu
from kvpass.runtime.keys import Keys
from kvpass.runtime.weights import Weights
from kvpass.transforms.rewrite import Incremental

Plant = Callable[[pytest.MonkeyPatch], None]


def mask_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Every query of the incremental graph sees one key more than its mask allows."""
    right, kernel = ops.visible, pipeline.lower

    def visible(*args: Any) -> Tensor:
        seen = right(*args).clone()
        seen[..., 1:] |= seen[..., :-1].clone()
        return seen

    def lower(spec: Attention, *rest: Any, **options: Any) -> Any:
        return kernel(replace(spec, support=spec.support.xreplace({I: I + 1})), *rest, **options)

    patch.setattr(ops, "visible", visible)
    patch.setattr(pipeline, "lower", lower)


def position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Positions of the new rows are counted from one too many, as soon as any row is cached."""
    right = backend.incrementalise
    arange = torch.ops.aten.arange.start_step

    def shifted(first: Any, last: Any, step: Any, **options: Any) -> Tensor:
        positions: Tensor = arange(first, last, step, **options)
        return positions + 1 if first else positions

    def incrementalise(captured: Captured, **options: Any) -> Incremental:
        incremental = right(captured, **options)
        for node in incremental.module.graph.nodes:
            if node.target is arange:
                node.target = shifted
        incremental.module.recompile()
        return incremental

    patch.setattr(backend, "incrementalise", incrementalise)


def wrong_page(patch: pytest.MonkeyPatch) -> None:
    """The block table of a text of several pages is read from the second page on."""
    right, paged = ops.read, cpu.Rows.paged

    def read(pool: Tensor, table: Tensor, run: int, *rest: Any) -> Tensor:
        return right(pool, table.roll(1, dims=1), -1, *rest)

    def rows(layout: Any, pool: Tensor, table: Tensor, run: int) -> Any:
        return paged(layout, pool, table.roll(1, dims=1), -1)

    patch.setattr(ops, "read", read)
    patch.setattr(cpu.Rows, "paged", rows)


def wrong_row_in_page(patch: pytest.MonkeyPatch) -> None:
    """New rows are written one row too late in their page."""
    right = ops.append

    def append(pool: Tensor, rows: Tensor, place: Tensor, before: int) -> Tensor:
        size = pool.shape[before + 1]
        return right(pool, rows, place // size * size + (place + 1) % size, before)

    patch.setattr(ops, "append", append)


def stale_weights(patch: pytest.MonkeyPatch) -> None:
    """No change of a weight is ever noticed."""
    patch.setattr(Weights, "same", lambda self, tensors: True)


def blind_keys(patch: pytest.MonkeyPatch) -> None:
    """Rows are found by their place in the text alone, whatever stands there."""
    right = Keys.rows

    def rows(self: Keys, args: Any) -> Any:
        found, width = right(self, args)
        return [bytes(len(text)) for text in found], width

    patch.setattr(Keys, "rows", rows)
