"""Slots, keys and a stand-in for a model whose rows are known functions of the rows before them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence

import torch

from kvpass.cache import Cache, Lease, SlotSpec, SlotTable

CPU = torch.device("cpu")


def spec(
    name: str,
    before: tuple[int, ...] = (2,),
    after: tuple[int, ...] = (3,),
    dtype: torch.dtype = torch.float32,
) -> SlotSpec:
    """A slot whose identity follows from its name."""
    return SlotSpec(hashlib.sha256(name.encode()).digest(), before, after, dtype, CPU, name)


def key(tokens: Sequence[int], width: int = 8) -> bytes:
    """Row keys: each token as `width` bytes, the token at the end so that rows differ in their last byte only."""
    return b"".join(int(token).to_bytes(width, "big") for token in tokens)


@functools.cache
def row(name: str, context: bytes, prefix: bytes) -> float:
    """The first element of the row of a slot after `prefix`. Any other prefix gives another one."""
    digest = hashlib.sha256(name.encode() + b"|" + context + b"|" + prefix).digest()
    return int.from_bytes(digest[:3], "big") + 1.0


def begin(
    cache: Cache,
    table: SlotTable,
    batch: Sequence[Sequence[int]],
    *,
    context: bytes = b"",
    limit: int | None = None,
    width: int = 8,
) -> Lease:
    """A lease for a batch of token lists."""
    keys = [key(tokens, width) for tokens in batch]
    return cache.begin(table, keys, width, context, limit=len(batch[0]) - 1 if limit is None else limit)


def shape_of(slot: SlotSpec, values: torch.Tensor) -> torch.Tensor:
    """Rows `[R, *before, *after]` whose elements are the value and the position of the element added up."""
    row_shape = slot.before + slot.after
    count = torch.arange(torch.Size(row_shape).numel(), dtype=torch.float64).reshape(row_shape)
    rows = values.to(torch.float64).reshape(-1, *[1] * len(row_shape)) + count
    return rows.to(slot.dtype)


def expected(slot: SlotSpec, tokens: Sequence[int], context: bytes, start: int, width: int) -> torch.Tensor:
    """What a slot holds for rows `start ..` of a sequence."""
    keys = key(tokens, width)
    values = [row(slot.name, context, keys[: (i + 1) * width]) for i in range(start, len(tokens))]
    return shape_of(slot, torch.tensor(values, dtype=torch.float64))


def compute(
    lease: Lease, table: SlotTable, batch: Sequence[Sequence[int]], context: bytes = b"", width: int = 8
) -> None:
    """Write the new rows as a program would."""
    for index, slot in enumerate(table.slots):
        view = lease.slot(index)
        new = torch.cat([expected(slot, tokens, context, lease.start, width) for tokens in batch])
        before = len(slot.before)
        view.pool.flatten(before, before + 1).movedim(before, 0)[view.write_row] = new


def read(lease: Lease, index: int, slot: SlotSpec) -> torch.Tensor:
    """All rows of a slot, `[B, S, *before, *after]`, read through the block table."""
    view = lease.slot(index)
    before = len(slot.before)
    by_page = view.pool.movedim((before, before + 1), (0, 1))  # [pages, page_size, *before, *after]
    rows = by_page[view.block_table.long()].flatten(1, 2)[:, : lease.length]
    if view.run >= 0:
        in_place = by_page[view.run :].flatten(0, 1)[: lease.length]
        torch.testing.assert_close(in_place, rows[0], rtol=0, atol=0, equal_nan=True)
    return rows


def verify(
    lease: Lease, table: SlotTable, batch: Sequence[Sequence[int]], context: bytes = b"", width: int = 8
) -> None:
    """Every row that the lease gives access to is the right one, to the bit."""
    for index, slot in enumerate(table.slots):
        want = torch.stack([expected(slot, tokens, context, 0, width) for tokens in batch])
        got = read(lease, index, slot)
        assert torch.equal(got, want), f"slot {slot.name}: wrong rows {(got != want).nonzero().tolist()[:4]}"


def run(
    cache: Cache,
    table: SlotTable,
    batch: Sequence[Sequence[int]],
    *,
    context: bytes = b"",
    meanwhile: Callable[[], object] = lambda: None,
    width: int = 8,
) -> int:
    """One call from beginning to end; returns the number of rows per sequence that were found."""
    with begin(cache, table, batch, context=context, width=width) as lease:
        if lease.stored:
            compute(lease, table, batch, context, width)
        meanwhile()
        if lease.stored:
            verify(lease, table, batch, context, width)
    return lease.start
