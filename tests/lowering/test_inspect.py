"""Offline compilation and what is read from it. Triton's disk cache makes a second run quick."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import DriverConfig

from kvpass.lowering.inspect import ARCHITECTURES, Compiled, Source, architecture, compile_for, resources, roofline
from kvpass.lowering.inspect.resources import disassemble, loaded
from kvpass.lowering.inspect.sass import Flow, Instruction, UnreadableFlow, main_loop, parse


@triton.jit
def stream(x, out, rows, row_stride, column_stride, ROWS: tl.constexpr, D: tl.constexpr):
    """Sum of rows, read in tiles of [ROWS, D]."""
    row, column = tl.arange(0, ROWS), tl.arange(0, D)
    total = tl.zeros([ROWS, D], tl.float32)
    for at in range(0, rows, ROWS):
        total += tl.load(x + (at + row)[:, None] * row_stride + column[None, :] * column_stride).to(tl.float32)
    tl.store(out + column, tl.sum(total, 0))


@triton.jit
def powers(x, out, rows, B: tl.constexpr, TIMES: tl.constexpr):
    """TIMES multiply-adds for each value that is read."""
    lane = tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    for at in range(0, rows, B):
        value = tl.load(x + at + lane)
        for _ in tl.static_range(TIMES):
            total = total * value + 1.5
    tl.store(out + lane, total)


@triton.jit
def decode(q, k, v, out, length, part, D: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr):
    """One split of flash decoding: M query rows against keys and values of one head, in tiles of ROWS."""
    m, d, n = tl.arange(0, M), tl.arange(0, D), tl.arange(0, ROWS)
    queries = tl.load(q + m[:, None] * D + d[None, :])
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, D], tl.float32)
    first = tl.program_id(0) * part
    last = tl.minimum(first + part, length)
    for at in range(first, last, ROWS):
        inside = at + n < last
        place = (at + n)[:, None] * D + d[None, :]
        keys = tl.load(k + place, mask=inside[:, None], other=0.0)
        score = tl.where(inside[None, :], tl.dot(queries, tl.trans(keys)), float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(weight, 1)
        values = tl.load(v + place, mask=inside[:, None], other=0.0)
        result = tl.dot(weight.to(tl.bfloat16), values, result * shrink[:, None])
        top = new
    tl.store(out + (tl.program_id(0) * M + m)[:, None] * D + d[None, :], result / total[:, None])


@triton.jit
def tiles(x, out, rows, ROWS: tl.constexpr, D: tl.constexpr):
    """The stream through a tensor descriptor."""
    descriptor = tl.make_tensor_descriptor(x, [rows, D], [D, 1], [ROWS, D])
    total = tl.zeros([ROWS, D], tl.float32)
    for at in range(0, rows, ROWS):
        total += descriptor.load([at, 0])
    tl.store(out + tl.arange(0, D), tl.sum(total, 0))


TYPES = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "x": "*fp32", "out": "*fp32"}


def source(function: Any, constants: dict[str, object], options: dict[str, object], **types: str) -> Source:
    signature = {
        name: "constexpr" if name in constants else types.get(name) or TYPES.get(name, "i32")
        for name in function.arg_names
    }
    pointers = frozenset(name for name, type in signature.items() if type.startswith("*"))
    return Source(function, signature, constants, pointers, options)


def decoding(rows: int = 64, stages: int = 3) -> Source:
    kernel = source(decode, {"D": 128, "ROWS": rows, "M": 16}, {"num_warps": 4, "num_stages": stages})
    return dataclasses.replace(kernel, attributes=kernel.attributes | {"part"})


def streaming(**constants: object) -> Source:
    return source(stream, {"ROWS": 64, "D": 128, **constants}, {"num_warps": 4}, x="*bf16")


def powered(times: int, **options: object) -> Source:
    return source(powers, {"B": 1024, "TIMES": times}, {"num_warps": 4, **options})


def sass(text: str) -> list[Instruction]:
    """``label: opcode operands`` by line, where ``{label}`` stands for an address."""
    lines = [line.strip() for line in text.strip().splitlines()]
    labels = {line.partition(":")[0]: f"0x{16 * at:x}" for at, line in enumerate(lines) if ":" in line}
    body = [f"        /*{16 * at:04x}*/    {line.rpartition(':')[2].strip()} ;" for at, line in enumerate(lines)]
    return parse("\t\tFunction : f\n" + "\n".join(body).format(**labels), "f")


def loop_of(text: str) -> list[str]:
    return [f"{i.opcode} {i.operands}".strip() for i in main_loop(sass(text), loaded)]


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_flash_decoding(arch: str) -> None:
    found = resources(compile_for(decoding(), arch))
    assert (found.arch, found.threads, found.spill_bytes, found.instructions["spill"]) == (arch, 128, 0, 0)
    assert 64 <= found.registers <= 128
    # 16 KiB each of K and V, in pieces of 16 bytes by 128 threads; QK and PV are 16x64x128 each, by 16x8x16, and the
    # four warps share out both.
    assert found.loop is not None
    assert found.loop.bytes == 2 * 64 * 128 * 2
    assert found.loop.mix["async_copy_16"] == 16
    assert found.loop.mix["mma"] == found.instructions["mma"] == 32
    assert found.loop.mix["special"] >= 10
    assert found.loop.instructions == sum(found.loop.mix.values())
    assert 25 < found.loop.per_kib < 60
    assert found.loop.per_kib == found.loop.instructions * 4 / 32
    assert found.loop.issue_share == architecture(arch).issue_share(found.loop.per_kib)
    # Three blocks' tiles are in a multiprocessor of 228 KiB, one block's in one of 100.
    assert found.blocks_per_multiprocessor == (1 if arch == "sm_120" else 3)


@pytest.fixture
def _cold() -> Iterator[None]:
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        yield


@pytest.mark.usefixtures("_cold")
def test_no_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: DriverConfig) -> None:
        raise AssertionError("a driver was asked for")

    monkeypatch.setattr(DriverConfig, "active", property(absent))
    with pytest.raises(AssertionError, match="driver"):
        triton.runtime.driver.active  # noqa: B018
    compiled = compile_for(decoding(), "sm_80")
    assert isinstance(compiled, Compiled)
    assert resources(compiled).registers


def test_gfx942() -> None:
    compiled = compile_for(decoding(stages=2), "gfx942")
    found = resources(compiled)
    says = {name: int(number) for name, number in re.findall(r"^; (\w+): (\d+)", compiled.asm["amdgcn"], re.M)}
    assert (found.threads, found.spill_bytes, found.loop) == (256, 0, None)
    assert found.registers == says["TotalNumVgprs"]
    assert found.instructions["mma"] == len(re.findall(r"\bv_mfma", compiled.asm["amdgcn"])) > 0
    assert found.instructions["global_load_16"] > 0
    # LLVM counts waves on a SIMD, and this block puts one on each of the four.
    assert architecture("gfx942").blocks_that_fit(found.registers, 0, found.threads) == says["Occupancy"]
    assert 0 < found.shared_bytes <= found.shared_limit == 65536


def test_strides_that_are_not_known_cost_vectors() -> None:
    fast = resources(compile_for(streaming(row_stride=128, column_stride=1), "sm_90"))
    slow = resources(compile_for(streaming(), "sm_90"))
    assert fast.loop is not None
    assert slow.loop is not None
    assert fast.instructions["global_load_16"] > 0
    assert fast.instructions["global_load_2"] == 0
    assert slow.instructions["global_load_2"] > 0
    assert slow.instructions["global_load_16"] == 0
    assert slow.loop.per_kib > 2 * fast.loop.per_kib


def test_unrolling_is_counted_beyond_4096_instructions() -> None:
    compiled = compile_for(powered(600), "sm_90")
    found = resources(compiled)
    assert found.loop is not None
    assert found.loop.bytes == 1024 * 4
    assert found.loop.mix["fma"] == 600 * 1024 // 128
    assert found.loop.instructions - found.loop.mix["fma"] < 20
    # What disassembles only the beginning would have missed the branch back.
    assert found.loop.instructions > 4096

    # This one ptxas unrolls further: the pass is four of the source's, and the cost per byte stays.
    short = resources(compile_for(powered(4), "sm_90")).loop
    assert short is not None
    assert short.mix["fma"] * 1024 * 4 == short.bytes * 4 * 1024 // 128
    assert short.per_kib == short.instructions * 4 / (short.bytes / 1024)


def test_spills_are_reported() -> None:
    wide = source(powers, {"B": 16384, "TIMES": 2}, {"num_warps": 4, "maxnreg": 64})
    found = resources(compile_for(wide, "sm_90"))
    assert found.registers <= 64
    assert found.spill_bytes >= 4 * (16384 // 128 - 64)
    assert found.instructions["spill"] >= found.spill_bytes // 16
    roomy = resources(compile_for(dataclasses.replace(wide, options={"num_warps": 16}), "sm_90"))
    assert (roomy.spill_bytes, roomy.instructions["spill"]) == (0, 0)


def test_shared_memory_over_the_limit_is_reported() -> None:
    large = decoding(rows=128, stages=3)
    small, roomy = (resources(compile_for(large, arch)) for arch in ("sm_120", "sm_90"))
    assert small.shared_bytes > small.shared_limit == 99 * 1024
    assert small.blocks_per_multiprocessor == 0
    assert roomy.shared_bytes <= roomy.shared_limit == 227 * 1024
    assert roomy.blocks_per_multiprocessor > 0


def test_tma_needs_the_bytes() -> None:
    compiled = compile_for(source(tiles, {"ROWS": 64, "D": 64}, {"num_warps": 4}), "sm_90")
    with pytest.raises(ValueError, match="loop_bytes"):
        resources(compiled)
    found = resources(compiled, loop_bytes=64 * 64 * 4).loop
    assert found is not None
    # The wait for a tile spins in a block of its own behind the kernel's end.
    code = parse(disassemble(compiled.asm["cubin"]), "tiles")
    assert sorted(map(len, Flow(code).loops().values())) == [2, found.instructions]
    assert found.mix["tma"] == 1
    assert (found.bytes, found.per_kib) == (16384, found.instructions * 4 / 16)


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"function": lambda x: x}, TypeError, "TRITON_INTERPRET"),
        ({"signature": {"x": "*fp32"}}, ValueError, "signature"),
        ({"constants": {"B": 1024}}, ValueError, "constants"),
        ({"attributes": frozenset({"B"})}, ValueError, "attributes"),
        ({"attributes": frozenset({"y"})}, ValueError, "attributes"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        compile_for(dataclasses.replace(powered(4), **change), "sm_90")


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="sm_75"):
        compile_for(powered(4), "sm_75")


@pytest.mark.parametrize(
    ("arch", "per_kib", "share"),
    [("sm_90", 135, 0.46), ("sm_100", 138.5, 0.99), ("sm_100", 210, 1.50)],
)
def test_issue_share(arch: str, per_kib: float, share: float) -> None:
    """vLLM's unified kernel at D 128 and at D 64 with 9/3 heads."""
    assert architecture(arch).issue_share(per_kib) == pytest.approx(share, abs=0.02)


def test_roofline() -> None:
    assert roofline("sm_90", 3.35e12, 0, torch.bfloat16) == pytest.approx(1.0)
    assert roofline("sm_90", 3.35e12, 3 * 989.4e12, torch.bfloat16) == pytest.approx(3.0)
    assert ARCHITECTURES["sm_80"].flops(torch.float32) == pytest.approx(19.5e12, rel=0.01)
    assert ARCHITECTURES["sm_120"].flops(torch.float32) == pytest.approx(104.8e12, rel=0.01)
    assert ARCHITECTURES["gfx942"].flops(torch.float32) == pytest.approx(163.4e12, rel=0.01)


PRODUCTS = {"sm_80": 2048, "sm_86": 1024, "sm_89": 1024, "sm_90": 4096, "sm_100": 8192, "sm_120": 512, "gfx942": 2048}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_throughput_agrees_with_clock_and_size(arch: str) -> None:
    device = architecture(arch)
    rate = device.tensor_flops / device.multiprocessors / device.clock
    assert rate == pytest.approx(PRODUCTS[arch], rel=0.015)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "columns", "blocks"),
    [
        ("sm_80", 32, 0, 1024, 0, 2),  # threads
        ("sm_90", 16, 0, 32, 0, 32),  # blocks
        ("sm_89", 16, 0, 32, 0, 24),
        ("sm_90", 128, 0, 128, 0, 4),  # registers
        ("sm_90", 73, 0, 128, 0, 6),  # ... in steps of 8: seven would fit with 73
        ("sm_90", 96, 0, 224, 0, 2),  # ... by parts: five warps on each, though 21 would fit in all
        ("sm_90", 255, 0, 512, 0, 0),
        ("sm_90", 32, 75 * 1024, 128, 0, 3),  # 76 KiB with what a block takes for itself
        ("sm_90", 32, 75 * 1024 + 1, 128, 0, 2),
        ("sm_90", 32, 227 * 1024 + 1, 128, 0, 0),
        ("sm_100", 32, 0, 128, 256, 2),  # tensor memory
        ("gfx942", 128, 0, 256, 0, 4),
        ("gfx942", 129, 0, 256, 0, 3),
        ("gfx942", 32, 32 * 1024, 256, 0, 2),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, threads: int, columns: int, blocks: int) -> None:
    assert architecture(arch).blocks_that_fit(registers, shared, threads, columns) == blocks


FLOWS = {
    "the innermost of nested loops": (
        """outer: MOV R0, R1
        inner: LDG.E.128 R4, [R2.64]
        @P0 BRA {inner}
        @P1 BRA {outer}
        EXIT""",
        ["LDG.E.128 R4, [R2.64]", "BRA 0x10"],
    ),
    "the outer loop, if it loads more": (
        """outer: LDG.E.128 R4, [R2.64]
        inner: LDG.E.U16 R4, [R2.64]
        @P0 BRA {inner}
        BRA.U !UP1, {outer}
        EXIT""",
        ["LDG.E.128 R4, [R2.64]", "LDG.E.U16 R4, [R2.64]", "BRA 0x10", "BRA.U !UP1, 0x0"],
    ),
    "a block behind the end belongs to its loop": (
        """loop: LDG.E R4, [R2.64]
        @!P0 BRA {wait}
        back: FADD R1, R1, R4
        @P1 BRA {loop}
        EXIT
        wait: SYNCS.PHASECHK R3
        @!P2 BRA {wait}
        BRA {back}""",
        [
            *("LDG.E R4, [R2.64]", "BRA 0x50", "FADD R1, R1, R4", "BRA 0x0"),
            *("SYNCS.PHASECHK R3", "BRA 0x50", "BRA 0x20"),
        ],
    ),
    "a backward branch out of the loop is no loop": (
        """BRA {start}
        done: EXIT
        start: LDG.E R4, [R2.64]
        @P0 BRA {done}
        BRA {start}""",
        ["LDG.E R4, [R2.64]", "BRA 0x10", "BRA 0x20"],
    ),
    "threads that part meet again at the BSSY's target": (
        """loop: LDG.E R4, [R2.64]
        BSSY B0, {met}
        @P0 BRA {side}
        FADD R1, R1, R4
        BSYNC B0
        side: FMUL R1, R1, R4
        BSYNC.RECONVERGENT B0
        NOP
        met: @P1 BRA {loop}
        EXIT""",
        [
            *("LDG.E R4, [R2.64]", "BSSY B0, 0x80", "BRA 0x50", "FADD R1, R1, R4", "BSYNC B0"),
            *("FMUL R1, R1, R4", "BSYNC.RECONVERGENT B0", "BRA 0x0"),
        ],
    ),
    "a subroutine counts at each call": (
        """loop: LDG.E R4, [R2.64]
        CALL.REL.NOINC {sub}
        CALL.REL.NOINC {sub}
        @P1 BRA {loop}
        CALL.REL.NOINC {sub}
        EXIT
        sub: MUFU.RCP R4, R4
        RET.REL.NODEC R2 0x0""",
        [
            *("LDG.E R4, [R2.64]", "CALL.REL.NOINC 0x60", "CALL.REL.NOINC 0x60", "BRA 0x0"),
            *["MUFU.RCP R4, R4"] * 2,
            *["RET.REL.NODEC R2 0x0"] * 2,
        ],
    ),
    "a call that never returns is the way out, even of an inner loop": (
        """outer: MOV R0, R1
        loop: LDG.E R4, [R2.64]
        @P0 CALL.REL.NOINC {out}
        BRA {loop}
        out: @P1 BRA {outer}
        EXIT""",
        ["LDG.E R4, [R2.64]", "CALL.REL.NOINC 0x40", "BRA 0x10"],
    ),
    "a call that never returns may also stay in the loop": (
        """loop: LDG.E R4, [R2.64]
        CALL.REL.NOINC {rest}
        EXIT
        rest: @P1 BRA {loop}
        EXIT""",
        ["LDG.E R4, [R2.64]", "CALL.REL.NOINC 0x30", "BRA 0x0"],
    ),
    "a barrier within another": (
        """loop: LDG.E R4, [R2.64]
        BSSY B0, {met}
        BSSY B1, {inner}
        BSYNC B1
        EXIT
        inner: BSYNC B0
        EXIT
        met: @P1 BRA {loop}
        EXIT""",
        ["LDG.E R4, [R2.64]", "BSSY B0, 0x70", "BSSY B1, 0x50", "BSYNC B1", "BSYNC B0", "BRA 0x0"],
    ),
    "the slow copy for a parted warp is left out": (
        """loop: LDG.E R4, [R2.64]
        BRA.DIV UR4, {slow}
        SHFL.BFLY PT, R4, R4, 0x1, 0x1f
        back: @P1 BRA {loop}
        EXIT
        slow: WARPSYNC.COLLECTIVE R5, {back}
        BRA {back}""",
        ["LDG.E R4, [R2.64]", "BRA.DIV UR4, 0x50", "SHFL.BFLY PT, R4, R4, 0x1, 0x1f", "BRA 0x0"],
    ),
    "no loop loads": ("LDG.E R4, [R2.64]\nspin: @P0 BRA {spin}\nEXIT", []),
    "no loop": ("LDG.E R4, [R2.64]\nEXIT\nspin: BRA {spin}", []),
}


@pytest.mark.parametrize("name", FLOWS)
def test_main_loop(name: str) -> None:
    text, expected = FLOWS[name]
    assert loop_of(text) == expected


@pytest.mark.parametrize("branch", ["BRX R2 -0x10", "CALL.ABS.NOINC R2", "BRA 0x1000"])
def test_a_branch_without_a_target_is_refused(branch: str) -> None:
    with pytest.raises(UnreadableFlow, match=branch.split(".")[0].split()[0]):
        main_loop(sass(f"{branch}\nEXIT"), loaded)


def test_a_listing_without_the_function_is_refused() -> None:
    with pytest.raises(ValueError, match="no function 'g'"):
        parse("\t\tFunction : f\n", "g")
