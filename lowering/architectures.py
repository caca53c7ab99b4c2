"""Constants of the architectures: one device stands for each, and its figures are those of public documents.

What a compute capability has (threads, blocks, registers, shared memory) is in the CUDA Programming Guide, "Technical
Specifications per Compute Capability"; for gfx942 it is in LLVM's ``AMDGPUBaseInfo``. Clock, bandwidth and throughput
belong to the device, and the maker's document stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command's --help is not to wait for torch
    import torch

KIB = 1024
REGISTER_STEP = 8  # registers are given to a warp in steps of 8 per thread, by both makers
PARTS = 4  # of a multiprocessor, each with warps and registers of its own: sub-partitions, SIMDs


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One device of an architecture.

    Attributes:
        backend, target: the words of Triton for it.
        warp: threads in a warp or wavefront.
        threads, blocks, registers, shared_bytes: room of one multiprocessor; registers have 32 bits.
        shared_limit: shared memory in bytes that one block may ask for; every block is charged the rest of the
            multiprocessor's on top.
        by_groups: tensor cores take 64 rows from a group of four warps (wgmma, tcgen05), and tiles from shared memory.
        tensor_columns: columns of tensor memory per multiprocessor, 0 where there is none.
        multiprocessors: SMs or compute units of the device.
        issue: instructions of a whole warp that a multiprocessor issues in a cycle.
        clock: boost clock, Hz.
        bandwidth: of the device memory, bytes per second.
        tensor_flops: dense bf16 products with fp32 sums, FLOP per second.
        lanes: fp32 multiply-adds of a multiprocessor in a cycle (CUDA C++ Programming Guide, throughput of native
            arithmetic instructions; CDNA 3 whitepaper). Products of fp32 are done there, as they are to be exact.
    """

    device: str
    backend: str = "cuda"
    target: int | str
    warp: int = 32
    threads: int
    blocks: int
    registers: int = 65536
    shared_bytes: int
    shared_limit: int
    by_groups: bool = False
    tensor_columns: int = 0
    multiprocessors: int
    issue: int = PARTS
    clock: float
    bandwidth: float
    tensor_flops: float
    lanes: int = 128

    def flops(self, dtype: torch.dtype) -> float:
        """Products of such operands, FLOP per second."""
        if dtype.itemsize == 4:
            return 2 * self.lanes * self.multiprocessors * self.clock
        return self.tensor_flops

    def blocks_that_fit(self, registers: int, shared_bytes: int, threads: int, tensor_columns: int = 0) -> int:
        """Blocks that are resident on one multiprocessor at once; 0 means that the kernel cannot be launched.

        ``registers`` are per thread, ``shared_bytes`` and ``tensor_columns`` per block. The rules are those of the CUDA
        occupancy calculator: registers are given by warp, and each part has its own.
        """
        warps = -(-threads // self.warp)
        per_warp = -(-max(registers, 1) // REGISTER_STEP) * REGISTER_STEP * self.warp
        resident = self.registers // PARTS // per_warp * PARTS
        limits = [self.blocks, self.threads // (warps * self.warp), resident // warps]
        taken = shared_bytes + self.shared_bytes - self.shared_limit
        if taken:
            limits.append(self.shared_bytes // taken)
        if tensor_columns:
            limits.append(self.tensor_columns // tensor_columns)
        return min(limits)

    def issue_share(self, per_kib: float) -> float:
        """Share of all issue slots that ``per_kib`` warp instructions per KiB need at full memory bandwidth.

        Over 1.0 the memory's speed is out of reach.
        """
        return per_kib * (self.bandwidth / KIB) / (self.multiprocessors * self.issue * self.clock)


ARCHITECTURES = {
    # "NVIDIA A100 Tensor Core GPU" datasheet and "NVIDIA A100 Tensor Core GPU Architecture" whitepaper.
    "sm_80": Architecture(
        device="A100 80GB SXM",
        target=80,
        threads=2048,
        blocks=32,
        shared_bytes=164 * KIB,
        shared_limit=163 * KIB,
        multiprocessors=108,
        clock=1.41e9,
        bandwidth=2.039e12,
        tensor_flops=312e12,
        lanes=64,
    ),
    # "NVIDIA A40" datasheet (throughput without sparsity) and product brief (clock).
    "sm_86": Architecture(
        device="A40",
        target=86,
        threads=1536,
        blocks=16,
        shared_bytes=100 * KIB,
        shared_limit=99 * KIB,
        multiprocessors=84,
        clock=1.74e9,
        bandwidth=0.696e12,
        tensor_flops=149.7e12,
    ),
    # "NVIDIA L40S" datasheet (throughput without sparsity) and product brief (clock).
    "sm_89": Architecture(
        device="L40S",
        target=89,
        threads=1536,
        blocks=24,
        shared_bytes=100 * KIB,
        shared_limit=99 * KIB,
        multiprocessors=142,
        clock=2.52e9,
        bandwidth=0.864e12,
        tensor_flops=362e12,
    ),
    # "NVIDIA H100 Tensor Core GPU" datasheet, SXM5. Its throughput is 4,096 per SM and cycle at this clock.
    "sm_90": Architecture(
        device="H100 SXM",
        target=90,
        threads=2048,
        blocks=32,
        shared_bytes=228 * KIB,
        shared_limit=227 * KIB,
        by_groups=True,
        multiprocessors=132,
        clock=1.83e9,
        bandwidth=3.35e12,
        tensor_flops=989.4e12,
    ),
    # "NVIDIA Blackwell Architecture Technical Brief", HGX B200. No clock is published: this one is its throughput over
    # 8,192 per SM and cycle.
    "sm_100": Architecture(
        device="B200",
        target=100,
        threads=2048,
        blocks=32,
        shared_bytes=228 * KIB,
        shared_limit=227 * KIB,
        by_groups=True,
        tensor_columns=512,
        multiprocessors=148,
        clock=1.856e9,
        bandwidth=8e12,
        tensor_flops=2250e12,
    ),
    # "NVIDIA RTX Blackwell GPU Architecture" whitepaper.
    "sm_120": Architecture(
        device="RTX 5090",
        target=120,
        threads=1536,
        blocks=24,
        shared_bytes=100 * KIB,
        shared_limit=99 * KIB,
        multiprocessors=170,
        clock=2.407e9,
        bandwidth=1.792e12,
        tensor_flops=209.5e12,
    ),
    # "AMD Instinct MI300X Accelerator" datasheet and "AMD CDNA 3 Architecture" whitepaper. A SIMD takes the 64 threads
    # of a vector instruction in four cycles, so the four of a compute unit issue one a cycle.
    "gfx942": Architecture(
        device="MI300X",
        backend="hip",
        target="gfx942",
        warp=64,
        threads=2048,
        blocks=32,
        registers=131072,
        shared_bytes=64 * KIB,
        shared_limit=64 * KIB,
        multiprocessors=304,
        issue=1,
        clock=2.1e9,
        bandwidth=5.3e12,
        tensor_flops=1307.4e12,
    ),
}


def architecture(arch: str) -> Architecture:
    """The entry of the table.

    Raises:
        ValueError: the table has no such architecture.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"no constants for {arch!r}; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch]


def roofline(arch: str, bytes: float, flops: float, dtype: torch.dtype) -> float:
    """Seconds that the device needs at least to move ``bytes`` of its memory and do ``flops`` of products of ``dtype``.

    Raises:
        ValueError: the table has no such architecture.
    """
    device = architecture(arch)
    return max(bytes / device.bandwidth, flops / device.flops(dtype))
