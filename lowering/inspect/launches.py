"""The kernels that one call of a generated attention launches, and what each of them moves and computes.

Imports Triton, so nothing that is imported with kvpass may import this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import triton
from sympy.core.function import AppliedUndef

from kvpass.ir import Attention, B, H, I, J, Read, Step
from kvpass.lowering.inspect.compile import Source
from kvpass.lowering.triton import load, source
from kvpass.lowering.triton_config import Config, config
from kvpass.lowering.triton_offline import offline

_FLOAT = 4  # bytes of an entry of what splits leave
_PAGE_NUMBER = 4  # bytes of an entry of a page table


@dataclass(frozen=True)
class Call:
    """A call for one sequence: ``new`` rows behind ``cached`` ones, keys and values in the same pages of ``page_size``
    rows, heads outside of them (pools ``[K, pages, page_size, D]``), or without pages (``[1, K, S, D]``)."""

    cached: int
    new: int
    page_size: int | None

    @property
    def rows(self) -> int:
        return self.cached + self.new


@dataclass(frozen=True)
class Launch:
    """One kernel of a call.

    Attributes:
        kernel: ``decode``, ``combine`` or ``prefill``.
        source: what `compile_for` takes.
        loop_bytes: keys and values that a block reads in one pass of the main loop, one tile of each: ptxas was not
            seen to unroll these loops for any configuration. None for ``combine``, which reads none.
        bytes: of what the launch reads and writes, each byte counted once.
        flops: of the products of queries with keys and of weights with values, over the keys inside the ends of the
            mask (`kvpass.lowering.bounds`); for ``combine`` of the sum over splits.
    """

    kernel: str
    source: Source
    loop_bytes: int | None
    bytes: int
    flops: int


def launches(spec: Attention, arch: str, step: Step, call: Call) -> tuple[Launch, ...]:
    """The launches of a call, in order: those of ``attention`` in `kernels/triton/decode.py` or `prefill.py`.

    Raises:
        NotImplementedError: Triton has no words for this shape, or the architecture no configuration.
    """
    spec = replace(spec, page_size=call.page_size, step=step)
    how = config(spec, arch)
    module = load(source(spec, arch, how=how))
    if step is Step.DECODE:
        return _decode(spec, arch, how, module, call)
    moved = _read(spec, module, call) + _written(spec, call)
    return (_main(spec, arch, how, module, call, moved),)


def _decode(spec: Attention, arch: str, how: Config, module: ModuleType, call: Call) -> tuple[Launch, ...]:
    queries = call.new * spec.group
    block = min(how.block_m, max(16, triton.next_power_of_2(queries)))
    _, splits = module.shares(spec.kv_heads * triton.cdiv(queries, block), call.cached, call.rows)
    if splits == 1:
        return (_main(spec, arch, how, module, call, _read(spec, module, call) + _written(spec, call)),)
    # Of each query and split the weighted values, the maximum and the total.
    parts = call.new * spec.heads * splits * (spec.value_size + 2) * _FLOAT
    main = _main(spec, arch, how, module, call, _read(spec, module, call) + parts, splits)
    kernel, chunk = module.combine, 16
    constants = {"SPLITS": triton.next_power_of_2(splits), "CHUNK": chunk}
    signature = {name: main.source.signature.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    joined = Source(kernel, signature, constants, main.source.attributes & set(signature), {"num_warps": 4})
    flops = 2 * call.new * spec.heads * splits * spec.value_size
    return main, Launch("combine", joined, None, parts + _written(spec, call), flops)


def _main(
    spec: Attention, arch: str, how: Config, module: ModuleType, call: Call, moved: int, splits: int = 1
) -> Launch:
    sizes = spec.head_size + spec.value_size
    pairs = sum(_keys(module, row, row, call.rows) for row in range(call.cached, call.rows))
    made = offline(spec, arch, call.new, splits, how)
    tile = how.block_n * sizes * spec.dtype.itemsize
    return Launch(spec.step.value, made, tile, moved, 2 * sizes * spec.heads * pairs)


def _keys(module: ModuleType, first: int, last: int, rows: int) -> int:
    """How many keys are inside the ends that the mask gives to rows ``first .. last``."""
    count = done = 0
    for low, high in module.spans(first, last, rows):
        end = max(min(high, rows), done)
        count += max(end - max(low, done), 0)
        done = end
    return count


def _read(spec: Attention, module: ModuleType, call: Call) -> int:
    """Bytes of queries, keys, values, page numbers, and what scores and masks read."""
    keys = _keys(module, call.cached, call.rows - 1, call.rows)
    entries = keys * spec.kv_heads * (spec.head_size + spec.value_size) + call.new * spec.heads * spec.head_size
    sizes = {"b": 1, "h": spec.heads, "i": call.new, "j": keys}
    loads = sum(
        math.prod(sizes[letter] for letter in _letters(spec, read)) * read.dtype.itemsize for read in spec.reads
    )
    pages = -(-keys // call.page_size) if call.page_size else 0
    return entries * spec.dtype.itemsize + pages * _PAGE_NUMBER + loads


def _written(spec: Attention, call: Call) -> int:
    return call.new * spec.heads * spec.value_size * spec.dtype.itemsize


def _letters(spec: Attention, read: Read) -> Iterator[str]:
    """The indices that a read varies with; in a support they are in its arguments."""
    calls = [call for call in spec.support.atoms(AppliedUndef) if call.func.__name__ == read.name]
    used = {symbol for call in calls for symbol in call.free_symbols}
    for letter, symbol in zip("bhij", (B, H, I, J), strict=True):
        if letter in read.axes or symbol in used:
            yield letter
