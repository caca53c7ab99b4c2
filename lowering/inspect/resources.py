"""What the artefacts of an offline compilation say: registers, spills, shared memory, instructions, the main loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import triton

from kvpass.lowering.architectures import KIB, Architecture, architecture
from kvpass.lowering.inspect.compile import Compiled
from kvpass.lowering.inspect.sass import Instruction, main_loop, parse

Classes = tuple[tuple[str, re.Pattern[str]], ...]


def classes(end: str, **patterns: str) -> Classes:
    """A table of patterns of opcodes, each followed by ``end``; the first that matches decides."""
    return tuple((name, re.compile(f"(?:{pattern}){end}")) for name, pattern in patterns.items())


NVIDIA = classes(
    r"\b",
    mma=r"(UTC)?[A-Z]G?MMA",
    tma=r"UTMA\w+|UBLK\w+",
    async_copy=r"LDGSTS",
    global_load=r"LDG",
    global_store=r"STG",
    spill=r"LDL|STL",
    shared_load=r"LDSM?",
    shared_store=r"STSM?",
    special=r"MUFU",
    fma=r"FFMA2?|HFMA2",
    float=r"[FDH](ADD|MUL|MNMX|SEL|SETP?|CHK)[23]?|F2FP?|F2I|I2FP?",
    move=r"U?MOV|IMAD\.MOV|CS2R|S2U?R|R2UR|U?LDCU?|LDT|STT|MOVM",
    integer=r"U?V?I(ADD[23]?|MAD|MNMX3?|SETP|ABS)|V(IADD|IADDMNMX)|U?(LEA|P?LOP3|SHF|SHL|SHR|PRMT|SEL|SGXT|BMSK|FLO|POPC)|P2R|R2P",
    shuffle=r"SHFL|REDUX|VOTEU?",
    barrier=r"BAR|BSSY|BSYNC|SYNCS|WARPSYNC|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|ARRIVES|WARPGROUP",
    branch=r"BRA|JMP|CALL|RET|EXIT",
)
AMD = classes(
    "",
    mma=r"v_s?mfma",
    async_copy=r"(global|buffer)_load_lds",
    global_load=r"(global|buffer|flat)_load",
    global_store=r"(global|buffer|flat)_store",
    spill=r"scratch_",
    shuffle=r"ds_bpermute|ds_swizzle|v_permlane|v_readlane|v_readfirstlane",
    shared_load=r"ds_read|ds_load",
    shared_store=r"ds_write|ds_store",
    special=r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_f",
    fma=r"v_(pk_)?(fma|fmac|mad|mac)_f",
    float=r"v_\w*_b?f(16|32|64)",
    move=r"v_mov|v_accvgpr|s_c?mov|s_load",
    barrier=r"s_barrier|s_waitcnt",
    branch=r"s_c?branch|s_endpgm",
    integer=r"[vs]_\w*(_[biu](16|24|32|64)|saveexec\w*)",
)
# What an opcode has in it by the bytes of one thread; without any, it moves a word.
PARTS = {
    32: "256",
    16: "128 dwordx4",
    12: "dwordx3",
    8: "64 dwordx2",
    2: "U16 S16 ushort sshort short",
    1: "U8 S8 ubyte sbyte byte",
}
WIDTHS = {part: size for size, parts in PARTS.items() for part in parts.split()}
WITH_WIDTH = ("async_copy", "global_load", "global_store")


@dataclass(frozen=True)
class MainLoop:
    """The loop that reads K and V, as machine code. One pass may be several of the source's, where ptxas unrolled.

    Attributes:
        instructions: warp instructions of one pass in one warp; both sides of a branch count.
        mix: the same by class.
        bytes: of K and V that the whole block reads in one pass.
        per_kib: warp instructions of all warps of the block for each KiB of ``bytes``.
        issue_share: share of the device's issue slots that this takes at its full memory bandwidth.
    """

    instructions: int
    mix: Mapping[str, int]
    bytes: int
    per_kib: float
    issue_share: float


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture.

    Attributes:
        registers: of 32 bits per thread.
        spill_bytes: per thread; how many instructions move them is ``instructions["spill"]``.
        shared_bytes, shared_limit: per block, used and allowed; Triton compiles what is over the limit too.
        blocks_per_multiprocessor: resident at once; 0 where the kernel cannot be launched.
        instructions: of the whole kernel, by class: ``mma``, ``tma``, ``async_copy_16``, ``global_load_2`` (the number
            is the bytes of one thread), ``shared_load``, ``special``, ``fma``, ``integer``, ``branch``, ...; a class
            that does not occur counts 0.
        loop: None where no loop reads global memory, and always on AMD.
    """

    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    threads: int
    blocks_per_multiprocessor: int
    instructions: Mapping[str, int]
    loop: MainLoop | None


def resources(compiled: Compiled, *, loop_bytes: int | None = None) -> Resources:
    """Read a compiled kernel.

    ``loop_bytes`` are the bytes of K and V that a block reads in one pass of the machine's main loop. By default they
    are the widths of its loads times the threads of the block, which counts page tables, and twice what two threads
    load both.

    Raises:
        ValueError: the main loop loads by TMA, whose instructions do not say how much, and ``loop_bytes`` is not given.
        UnreadableFlow: a branch of the machine code does not name its target.
        subprocess.CalledProcessError: cuobjdump cannot read the cubin.
    """
    target = compiled.metadata.target
    arch = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    device = architecture(arch)
    threads = compiled.metadata.num_warps * device.warp
    loop = None
    if device.backend == "cuda":
        listing = disassemble(compiled.asm["cubin"])
        code = parse(listing, compiled.metadata.name)
        registers, spill_bytes = usage(listing, compiled.metadata.name)
        instructions = count((instruction.opcode for instruction in code), NVIDIA)
        loop = measure(code, device, threads, loop_bytes)
    else:
        text = compiled.asm["amdgcn"]
        registers, spill_bytes = stated(text, "vgpr_count"), 4 * stated(text, "vgpr_spill_count")
        instructions = count(re.findall(r"^\t([a-z]+_\w+)", text, re.MULTILINE), AMD)
    shared = compiled.metadata.shared
    columns = getattr(compiled.metadata, "tmem_size", 0)
    blocks = device.blocks_that_fit(registers, shared, threads, columns)
    return Resources(arch, registers, spill_bytes, shared, device.shared_limit, threads, blocks, instructions, loop)


def disassemble(cubin: bytes) -> str:
    """Usage and SASS of all functions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def usage(listing: str, function: str) -> tuple[int, int]:
    """Registers and stack bytes per thread. Kernels of Triton have no other use for a stack than spills."""
    found = re.search(rf"Function {re.escape(function)}:\s+REG:(\d+) STACK:(\d+)", listing)
    if not found:
        raise ValueError(f"no resource usage of {function!r} in the listing")
    return int(found[1]), int(found[2])


def stated(text: str, name: str) -> int:
    """A number of the metadata at the end of an amdgcn text."""
    found = re.search(rf"^\s+\.{name}:\s+(\d+)$", text, re.MULTILINE)
    if not found:
        raise ValueError(f"no .{name} in the amdgcn text")
    return int(found[1])


def class_of(opcode: str, table: Classes) -> str:
    return next((name for name, pattern in table if pattern.match(opcode)), "other")


def width(opcode: str) -> int:
    """Bytes that one thread moves."""
    return next((WIDTHS[part] for part in re.split(r"[._]", opcode) if part in WIDTHS), 4)


def count(opcodes: Iterable[str], table: Classes) -> Mapping[str, int]:
    found: Counter[str] = Counter()
    for opcode in opcodes:
        name = class_of(opcode, table)
        found[f"{name}_{width(opcode)}" if name in WITH_WIDTH else name] += 1
    return MappingProxyType(found)


def measure(code: list[Instruction], device: Architecture, threads: int, loop_bytes: int | None) -> MainLoop | None:
    """The main loop of NVIDIA machine code."""
    loop = main_loop(code, loaded)
    if not loop:
        return None
    mix = count((instruction.opcode for instruction in loop), NVIDIA)
    if loop_bytes is None:
        if mix["tma"]:
            raise ValueError("the main loop loads by TMA: say how much in loop_bytes")
        loop_bytes = sum(map(loaded, loop)) * threads
    per_kib = len(loop) * (threads // device.warp) / (loop_bytes / KIB)
    return MainLoop(len(loop), mix, loop_bytes, per_kib, device.issue_share(per_kib))


def loaded(instruction: Instruction) -> int:
    """Global bytes that one thread loads; a TMA load is a tile, more than any other."""
    match class_of(instruction.opcode, NVIDIA):
        case "tma" if "LDG" in instruction.name or "CP" in instruction.name:
            return 1 << 16
        case "async_copy" | "global_load":
            return width(instruction.opcode)
    return 0
