"""Which blocks, warps and stages a Triton kernel gets, by architecture. Nothing is measured at run time.

What a table says was compiled offline for each family of tensor cores with the widest heads of its line: no register
spills. What exceeds the shared memory of an architecture is passed over, because Triton itself does not look.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from sympy.core.function import AppliedUndef

from kvpass.ir import SCORE, Attention, I, Step
from kvpass.lowering.architectures import ARCHITECTURES, Architecture


@dataclass(frozen=True)
class Config:
    """How a kernel is cut up.

    Attributes:
        block_m: the most packed queries of a tile; a decode kernel takes the power of two that its rows need.
        block_n: keys of a tile.
        warps, stages: of Triton.
        programs: decode splits the keys until there are this many programs.
        least_tiles: of a split: below that the second kernel costs more than it gives.
        most_splits: bounds the memory of the parts.
        registers: how many a thread may have at most, of an NVIDIA GPU; 0 leaves it to ptxas, which aims at more
            threads on a multiprocessor and would rather spill a few bytes.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int = 0
    least_tiles: int = 4
    most_splits: int = 128
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Of Triton's launch and compiler."""
        most = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages} | most


# By the padded size of keys and values together, up to which an entry holds; entries in order of preference.
Table = tuple[tuple[int, Config], ...]
DECODE: Table = (
    (128, Config(32, 64, 4, 3, registers=128)),
    (512, Config(32, 64, 4, 3)),
    (512, Config(32, 32, 4, 2)),
    (1024, Config(16, 32, 4, 3)),
    (1024, Config(16, 16, 4, 1)),
)
PREFILL: Table = (
    (128, Config(128, 64, 8, 3)),
    (256, Config(64, 64, 8, 3)),
    (384, Config(64, 32, 4, 2)),
    (512, Config(64, 32, 8, 2)),
    (512, Config(32, 32, 4, 2)),
    (1024, Config(32, 32, 8, 2)),
    (1024, Config(16, 16, 4, 1)),
)
PREFILL_BY_GROUPS: Table = (
    (384, Config(128, 64, 8, 3)),
    (512, Config(128, 32, 8, 3)),
    *PREFILL[-2:],
)
# Products of fp32 are no work for tensor cores: a thread holds what it multiplies.
FP32: Table = ((256, Config(16, 16, 4, 1)), (1024, Config(16, 16, 4, 1, registers=255)))
FP32_NARROW: Table = ((512, Config(16, 16, 2, 1, registers=255)), *FP32)
# Half a tile less: with 64 keys ptxas keeps within 128 registers and spills.
PREFILL_SM100: Table = ((128, Config(128, 32, 8, 3)), *PREFILL_BY_GROUPS)
# For masks and scores that take registers of their own (`_reads_tiles`).
DECODE_BESIDE: Table = ((512, Config(32, 32, 4, 3)), *DECODE[-3:])
PREFILL_BESIDE: Table = (
    (256, Config(64, 32, 8, 2)),
    (512, Config(32, 32, 8, 2)),
    *PREFILL[-2:],
)
PREFILL_BESIDE_BY_GROUPS: Table = ((256, Config(128, 32, 8, 2)), (512, Config(64, 32, 8, 2)), *PREFILL[-2:])
PREFILL_BESIDE_CDNA: Table = (*PREFILL_BESIDE[:1], (512, Config(32, 32, 4, 2)), *PREFILL[-2:])

_FP32 = {
    ("sm_80", Step.DECODE): ((512, Config(16, 32, 4, 2, registers=255)), *FP32),
    ("sm_90", Step.DECODE): ((512, Config(16, 32, 4, 1)), *FP32),
    ("sm_80", Step.PREFILL): FP32_NARROW,
    ("sm_90", Step.PREFILL): FP32_NARROW,
}
_PREFILL = {"sm_90": PREFILL_BY_GROUPS, "sm_100": PREFILL_SM100}
_PREFILL_BESIDE = {"sm_90": PREFILL_BESIDE_BY_GROUPS, "gfx942": PREFILL_BESIDE_CDNA}


def config(spec: Attention, arch: str) -> Config:
    """The configuration of a kernel.

    Raises:
        NotImplementedError: an architecture that is not in the table, or heads that fit none of its entries.
    """
    if arch not in ARCHITECTURES:
        raise NotImplementedError(f"the architecture {arch}; there are {', '.join(ARCHITECTURES)}")
    machine = ARCHITECTURES[arch]
    for widest, found in table(spec, arch):
        if both(spec) <= widest and shared_memory(spec, found, machine) <= machine.shared_limit:
            registers = found.registers if machine.backend == "cuda" else 0
            return replace(found, programs=4 * machine.multiprocessors, registers=registers)
    raise NotImplementedError(f"heads of {spec.head_size} and {spec.value_size} on {arch}")


def table(spec: Attention, arch: str) -> Table:
    """The configurations that come into question."""
    if spec.dtype is torch.float32:
        return _FP32.get((arch, spec.step), FP32)
    if _reads_tiles(spec):
        return DECODE_BESIDE if spec.step is Step.DECODE else _PREFILL_BESIDE.get(arch, PREFILL_BESIDE)
    return DECODE if spec.step is Step.DECODE else _PREFILL.get(arch, PREFILL)


def _reads_tiles(spec: Attention) -> bool:
    """Whether a tile of scores comes with a tile of something else: a bias of both rows, or a changed score under a
    mask that compares what it reads of both."""
    both_rows = any({"i", "j"} <= set(read.axes) for read in spec.reads)
    compared = any(call.has(I) for call in spec.support.atoms(AppliedUndef))
    return both_rows or (spec.score != SCORE and compared)


def shared_memory(spec: Attention, found: Config, machine: Architecture) -> int:
    """An upper bound of a kernel's shared memory, in bytes: tiles on their way, queries and their weights, what scores
    and masks read, and a little for what warps exchange."""
    tile = found.block_n * both(spec)
    tiles = 2 if machine.by_groups and found.block_m >= 64 else max(1, found.stages - 2)
    tiles += spec.page_size is None  # no page is looked up before a tile is asked for: one more is on its way
    queries = found.block_m * (max(padded(spec.head_size), padded(spec.value_size)) + found.block_n)
    read = sum(read.dtype.itemsize for read in spec.reads if {"i", "j"} <= set(read.axes))
    read *= found.block_m * found.block_n * max(1, found.stages - 1)
    read += 8 * (found.block_m + found.block_n) if spec.reads else 0
    return (tiles * tile + queries) * spec.dtype.itemsize + read + 1024


def both(spec: Attention) -> int:
    """Padded entries of a key and a value."""
    return padded(spec.head_size) + padded(spec.value_size)


def padded(size: int) -> int:
    """A head size as tensor cores take it: a power of two from 16 up."""
    return max(16, 1 << (size - 1).bit_length())
