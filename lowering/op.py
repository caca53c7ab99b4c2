"""The generated kernels as one operator, ``kvpass::attention``, that Dynamo and Inductor can hold in a graph.

A call from Python goes to the kernel itself, quicker than through the dispatcher; while a graph is traced it goes here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpass.ir import Attention, Layout
from kvpass.kernels.text import parse, text
from kvpass.lowering.build import name_of

# Keys and values are a pool with its table and its run, or one tensor with no table; a layout is the fields of
# `kvpass.ir.Layout`, or empty. `spec` is the text form of the attention.
_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor? key_table, SymInt key_run, int[] key_layout, "
    "Tensor value, Tensor? value_table, SymInt value_run, int[] value_layout, "
    "SymInt start, SymInt rows, Tensor[] reads, str spec) -> Tensor"
)
_library = torch.library.Library("kvpass", "DEF")  # type: ignore[no-untyped-call]
_library.define(_SCHEMA)  # type: ignore[no-untyped-call]

Kernel = Callable[..., Tensor]


def implement(device: str, lower: Callable[[Attention, Layout | None, Layout | None, torch.device], Kernel]) -> None:
    """Say how the kernels of a kind of device (``CPU``, ``CUDA``) are made."""

    @functools.lru_cache(maxsize=1024)
    def kernel(spec: str, key: tuple[int, ...], value: tuple[int, ...], where: torch.device) -> Kernel:
        return lower(parse(spec), _layout(key), _layout(value), where)

    def attention(
        query: Tensor,
        key: Tensor,
        key_table: Tensor | None,
        key_run: int,
        key_layout: Sequence[int],
        value: Tensor,
        value_table: Tensor | None,
        value_run: int,
        value_layout: Sequence[int],
        start: int,
        rows: int,
        reads: Sequence[Tensor],
        spec: str,
    ) -> Tensor:
        made = kernel(spec, tuple(key_layout), tuple(value_layout), query.device)
        keys = (key,) if key_table is None else (key, key_table, key_run)
        values = (value,) if value_table is None else (value, value_table, value_run)
        return made(query, keys, values, start, rows, reads)

    _library.impl("attention", attention, device)  # type: ignore[no-untyped-call]


def _shape(query: Tensor, *rest: Any) -> Tensor:
    spec = parse(rest[-1])
    batch, heads, new, _ = query.shape
    return query.new_empty(batch, new, heads, spec.value_size, dtype=spec.dtype).transpose(1, 2)


torch.library.register_fake("kvpass::attention", _shape, lib=_library)


def traceable(
    spec: Attention, key: Layout | None, value: Layout | None, direct: Kernel, target: str, source: str
) -> Kernel:
    """The kernel ``direct`` as `kvpass.ir.Lowering` says, which becomes the operator where a graph is being made.

    Args:
        target: the language of ``source``, for people.
    """
    written, key_layout, value_layout = text(spec), _numbers(key), _numbers(value)

    def attention(
        query: Tensor, keys: Sequence[Any], values: Sequence[Any], start: int, rows: int, reads: Sequence[Tensor]
    ) -> Tensor:
        if type(query) is Tensor and not torch.compiler.is_compiling():
            return direct(query, keys, values, start, rows, reads)
        made: Tensor = torch.ops.kvpass.attention(
            query,
            *(keys if key_layout else (keys[0], None, -1)),
            key_layout,
            *(values if value_layout else (values[0], None, -1)),
            value_layout,
            start,
            rows,
            reads,
            written,
        )
        return made

    named: Any = attention
    named.static, named.source, named.lowering = (spec,), source, f"{target} {name_of(source)}"
    named.layouts = key, value
    return attention


def _numbers(layout: Layout | None) -> list[int]:
    return [] if layout is None else [layout.before, int(layout.outside), layout.factor]


def _layout(numbers: Sequence[int]) -> Layout | None:
    return Layout(numbers[0], bool(numbers[1]), numbers[2]) if numbers else None
