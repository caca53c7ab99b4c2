"""`kvpass kernels`: what each generated attention kernel of a model costs on a GPU, compiled without one.

As JSON:

    {"schema": 1, "cached_rows": P, "new_rows": {"decode": N, "prefill": N}, "page_size": .., "proven": bool,
     "refusals": [..], "attention": [{"text": .., "count": .., "kernels": [KERNEL, ..]}, ..]}

with one ``KERNEL`` of ``arch device kernel reason cost`` for each launch; ``cost`` is `Cost`, or null where ``reason``
says why there is no such kernel.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch

from kvpass.errors import InputError
from kvpass.ir import Attention, Layout, Step
from kvpass.kernels import ops
from kvpass.kernels.text import text
from kvpass.lowering import gpu
from kvpass.lowering.architectures import ARCHITECTURES, roofline
from kvpass.progress import counted
from kvpass.report.machine import SCHEMA
from kvpass.report.report import Report, plain
from kvpass.transforms.attend import bind
from kvpass.transforms.recognise import recognise
from kvpass.transforms.rewrite import Incremental, rewrite

if TYPE_CHECKING:
    from kvpass.lowering.inspect.launches import Launch

PREFILL_ROWS = 512
_LOADS = ("async_copy", "global_load")


@dataclass(frozen=True)
class Setting:
    """For which calls the kernels are compiled and counted: one sequence, ``new`` or `PREFILL_ROWS` rows behind
    ``rows`` cached ones, in pages of ``page_size`` rows; ``dtype`` takes the place of the model's."""

    archs: tuple[str, ...]
    rows: int = 4096
    new: int = 1
    page_size: int = 64
    dtype: torch.dtype | None = None

    def new_rows(self, step: Step) -> int:
        return self.new if step is Step.DECODE else PREFILL_ROWS


@dataclass(frozen=True)
class Cost:
    """What one launch takes.

    Attributes:
        registers, spill_bytes: per thread. ``shared_bytes``: per block, of ``shared_limit``.
        blocks_per_multiprocessor: resident at once; 0 where the kernel cannot be launched.
        mma, loads_16, loads_2: tensor-core instructions, and loads of 16 and of 2 bytes a thread, of the whole kernel.
        per_kib: warp instructions for each KiB of keys and values in the main loop; None on AMD, and where no keys
            are read. ``issue_share``: the share of the issue slots that this takes at full memory bandwidth.
        bytes, flops: of the launch (`kvpass.lowering.inspect.launches.Launch`).
        seconds: at the least, by bandwidth and bf16 throughput (`kvpass.lowering.architectures.roofline`).
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    blocks_per_multiprocessor: int
    mma: int
    loads_16: int
    loads_2: int
    per_kib: float | None
    issue_share: float | None
    bytes: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Kernel:
    """One launch on one architecture, or the reason why there is none. ``kernel``: decode, combine or prefill."""

    arch: str
    device: str
    kernel: str
    reason: str = ""
    cost: Cost | None = None


@dataclass(frozen=True)
class AttentionKernels:
    """The kernels of one attention, which occurs ``count`` times. ``text``: `kvpass.kernels.text`."""

    text: str
    count: int
    kernels: tuple[Kernel, ...]


def architectures(names: str) -> tuple[str, ...]:
    """The architectures of a list with commas.

    Raises:
        InputError: one is unknown; the message names those that are known, the nearest first.
    """
    given = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in given:
        if name not in ARCHITECTURES:
            near = sorted(ARCHITECTURES, key=lambda known: _likeness(name.lower(), known), reverse=True)
            raise InputError(f"there is no architecture {name!r}; there are {', '.join(near)}")
    return given


def _likeness(name: str, known: str) -> tuple[int, float]:
    compared = SequenceMatcher(None, name, known)
    return compared.find_longest_match().size, compared.ratio()


# -- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """An attention as a lowering is asked for it. ``mixed``: none is asked, for its operands differ in type."""

    spec: Attention
    key: Layout | None = None
    value: Layout | None = None
    mixed: bool = False


def asked(incremental: Incremental) -> Counter[Asked]:
    """How often each attention is called, whatever computes it on the device where it was compiled."""
    made: dict[Any, Asked] = {}

    def lower(spec: Attention, device: torch.device, key: Layout | None, value: Layout | None) -> Callable[..., Any]:
        kernel = bind(ops.attention, spec)
        made[kernel] = Asked(spec, key, value)
        return kernel

    found, _ = recognise(incremental.plan.analyzed)
    nodes = rewrite(incremental.plan, ops, found, lower, incremental.latents).module.graph.nodes
    specs = [(node.target, getattr(node.target, "static", (None,))[0]) for node in nodes]
    return Counter(made.get(target, Asked(spec, mixed=True)) for target, spec in specs if isinstance(spec, Attention))


def measure(incrementals: Iterable[Incremental], setting: Setting) -> list[AttentionKernels]:
    """Compile the kernels of all distinct attentions, one after the other: in threads, Triton's machine code varies.

    Raises:
        InputError: Triton is missing, or interprets.
    """
    found = Counter[Asked]()
    for incremental in incrementals:
        for one, count in asked(incremental).items():
            wanted = setting.dtype or one.spec.dtype
            found[replace(one, spec=replace(one.spec, dtype=wanted))] += count
    if found:
        _check_triton()
    jobs = [(one, arch, step) for one in found for arch in setting.archs for step in (Step.DECODE, Step.PREFILL)]
    kernels: dict[Asked, list[Kernel]] = {one: [] for one in found}
    with counted("compiling kernels", len(jobs)) as done:
        for one, arch, step in jobs:
            kernels[one] += _kernels(one, arch, step, setting)
            done()
    return [AttentionKernels(text(one.spec), found[one], tuple(kernels[one])) for one in found]


def _check_triton() -> None:
    try:
        import triton
    except ImportError as error:
        raise InputError(f"kernels are compiled by Triton, which cannot be imported: {error}") from error
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set, so Triton compiles nothing: unset it")


def _kernels(one: Asked, arch: str, step: Step, setting: Setting) -> Iterator[Kernel]:
    """The kernels of one step, or a line that says why there are none."""
    from triton.errors import TritonError

    from kvpass.lowering.inspect.launches import Call, launches
    from kvpass.lowering.inspect.sass import UnreadableFlow

    device, new = ARCHITECTURES[arch].device, setting.new_rows(step)
    kernel = step.value
    try:
        _check_call(one, arch, step, setting)
        page_size = setting.page_size if one.key or one.value else None
        for launch in launches(one.spec, arch, step, Call(setting.rows, new, page_size)):
            kernel = launch.kernel
            yield Kernel(arch, device, kernel, cost=_cost(launch, arch, one.spec.dtype))
    except NotImplementedError as error:
        yield Kernel(arch, device, kernel, f"no Triton kernel for {error}")
    except (TritonError, RuntimeError, UnreadableFlow) as error:
        yield Kernel(arch, device, kernel, f"it cannot be measured: {_first_cause(error)}")


def _first_cause(error: BaseException) -> str:
    """What an error says that Triton may have wrapped, once for each call in the kernel."""
    while error.__cause__ is not None:
        error = error.__cause__
    return shorten(str(getattr(error, "error_message", None) or error), 160)


def _check_call(one: Asked, arch: str, step: Step, setting: Setting) -> None:
    """Raises:
    NotImplementedError: a GPU would not compute this call by a generated kernel of this step.
    """
    if one.mixed:
        raise NotImplementedError("queries, keys and values of different types")
    gpu.lower(one.spec, one.key, one.value, arch, page_size=setting.page_size)
    if step is Step.DECODE and setting.new * one.spec.group > gpu.MOST_DECODED:
        raise NotImplementedError(
            f"a decode of {setting.new} new rows with {one.spec.group} heads in a group: a prefill computes them"
        )


def _cost(launch: Launch, arch: str, dtype: torch.dtype) -> Cost:
    from kvpass.lowering.inspect import compile_for, resources

    with redirect_stdout(sys.stderr):  # Triton prints what ptxas refuses
        compiled = compile_for(launch.source, arch)
    found = resources(compiled, loop_bytes=launch.loop_bytes)
    loop = found.loop if launch.loop_bytes else None
    loads_16, loads_2 = (sum(found.instructions[f"{kind}_{size}"] for kind in _LOADS) for size in (16, 2))
    return Cost(
        found.registers,
        found.spill_bytes,
        found.shared_bytes,
        found.shared_limit,
        found.blocks_per_multiprocessor,
        found.instructions["mma"],
        loads_16,
        loads_2,
        None if loop is None else loop.per_kib,
        None if loop is None else loop.issue_share,
        launch.bytes,
        launch.flops,
        roofline(arch, launch.bytes, launch.flops, dtype),
    )


# -- showing --------------------------------------------------------------------------------------------------------

# Heading, and how a cost fills the column.
COLUMNS: tuple[tuple[str, Callable[[Cost], str]], ...] = (
    ("regs", lambda c: str(c.registers)),
    ("spill", lambda c: str(c.spill_bytes)),
    ("shared", lambda c: f"{c.shared_bytes:,}"),
    ("blocks", lambda c: str(c.blocks_per_multiprocessor)),
    ("mma", lambda c: str(c.mma)),
    ("ld16", lambda c: str(c.loads_16)),
    ("ld2", lambda c: str(c.loads_2)),
    ("instr/KiB", lambda c: "-" if c.per_kib is None else f"{c.per_kib:.1f}"),
    ("issue", lambda c: "-" if c.issue_share is None else f"{c.issue_share:.0%}"),
    ("bytes", lambda c: f"{c.bytes:,}"),
    ("MFLOP", lambda c: f"{c.flops / 1e6:,.2f}"),
    ("roofline", lambda c: f"{c.seconds * 1e6:.3g} us"),
)
LEGEND = """\
regs, spill   registers and spilled bytes of a thread
shared        bytes of a block; blocks: resident on a multiprocessor at once, 0 where the kernel cannot be launched
mma, ld16/2   tensor-core instructions, and loads of 16 and of 2 bytes, in the whole kernel
instr/KiB     warp instructions for each KiB of keys and values in the main loop (not read from AMD machine code)
issue         share of all issue slots that they take where keys and values come at full memory bandwidth
bytes, MFLOP  of the call, each byte counted once; roofline: the time for them at full bandwidth and throughput"""


def table(found: Sequence[AttentionKernels], setting: Setting) -> str:
    """The costs as text."""
    if not found:
        return "no attention was recognised, so no kernel is generated"
    head = (
        f"One sequence with {setting.rows:,} cached rows in pages of {setting.page_size}; "
        f"new rows: {setting.new:,} in decode and combine, {PREFILL_ROWS} in prefill\n"
        + "; ".join(f"{arch}: {ARCHITECTURES[arch].device}" for arch in setting.archs)
    )
    return "\n\n".join([head, *map(_section, found), LEGEND])


def _section(one: AttentionKernels) -> str:
    names = [("arch", "kernel"), *((k.arch, k.kernel) for k in one.kernels)]
    cells = [[name for name, _ in COLUMNS]]
    cells += [[k.reason] if k.cost is None else [cell(k.cost) for _, cell in COLUMNS] for k in one.kernels]
    left = [max(map(len, column)) for column in zip(*names, strict=True)]
    right = [max(map(len, column)) for column in zip(*(row for row in cells if len(row) > 1), strict=True)]
    lines = [f"{one.count} x {one.text}"]
    for name, row in zip(names, cells, strict=True):
        words = [word.ljust(width) for word, width in zip(name, left, strict=True)]
        words += row if len(row) == 1 else [word.rjust(width) for word, width in zip(row, right, strict=True)]
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)


def data(found: Sequence[AttentionKernels], setting: Setting, report: Report) -> dict[str, Any]:
    """The costs as `json` takes them."""
    return {
        "schema": SCHEMA,
        "cached_rows": setting.rows,
        "new_rows": {step.value: setting.new_rows(step) for step in (Step.DECODE, Step.PREFILL)},
        "page_size": setting.page_size,
        "proven": report.proven,
        "refusals": plain(report.refusals),
        "attention": plain(found),
    }
