"""Generated Triton kernels on a machine without a GPU, against `kvpass.kernels.reference`.

Runs as a script of its own, because both ways to execute a kernel change the process: Triton's interpreter
(``TRITON_INTERPRET=1`` before triton is imported; silently wrong in bf16, which it is not given) and ttsem, which
executes what Triton compiles, rounds as a GPU does and stops at an access out of bounds and at a race::

    TRITON_INTERPRET=1 python -m tests.lowering.triton_run grid fp32 fp16
    python -m tests.lowering.triton_run quarter bf16

Words: ``grid`` (each of the dtypes takes its share of the cases), ``quarter`` (each takes every fourth), ``all`` (each
takes all), ``drawn`` (by hypothesis), ``append``, ``plants`` (kernels with a fault, each of which has to be found).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from hypothesis import given, settings

from kvpass.ir import Step
from kvpass.kernels import ops
from kvpass.lowering.triton import Strides, append_source, load
from tests.lowering.triton_cases import DTYPES, SMALL, Case, drawn, grid, problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    from ttsem import sanitize


@dataclass(frozen=True)
class Plant:
    """A fault in the source of a case's kernel, and a word of what has to be said about it."""

    case: Case
    old: str
    new: str
    found: str

    def missed(self) -> str | None:
        def change(text: str) -> str:
            if self.old not in text:
                raise ValueError(f"the source has no {self.old!r}")
            return text.replace(self.old, self.new)

        try:
            said = problem(self.case, change)
        except sanitize.KernelFault as fault:
            said = f"{fault.fault.kind}: {fault}"
        return None if said and self.found in said else f"a fault was missed, only this was said: {said}"


def plants() -> Iterator[Plant]:
    case = Case(dtype="bf16", start=199, new=2, config=SMALL)
    padded = replace(case, mask="padding", config=None)
    clamp, there = "tl.minimum(j, rows - 1) if MASKED else j", "there = (r + tile * BLOCK_N < rows)[:, None]"
    yield Plant(padded, clamp, "j", "oob_read")
    yield Plant(replace(padded, step=Step.PREFILL), clamp, "j", "oob_read")
    yield Plant(case, "mask=tile * BLOCK_N + k * PAGE < rows, other=0", "mask=rows > 0, other=0", "oob_read")
    yield Plant(case, "mask=here[:, None] & (dv < DV)[None, :]", "mask=(dv < DV)[None, :]", "oob_write")
    yield Plant(case, "* splits + split", "* splits", "race")
    for step in Step.DECODE, Step.PREFILL:
        yield Plant(replace(case, step=step), there, "there = (r >= 0)[:, None]", "NaN")
        yield Plant(replace(case, step=step), "return (j <= i)", "return (j < i)", "an error of")
        yield Plant(replace(case, step=step, mask="window"), "(-69 + i0)", "(-30 + i0)", "an error of")


def append_problem(dtype: torch.dtype, by_row: bool, size: int) -> str | None:
    """New rows of three heads in a pool of NaN, against `kvpass.kernels.ops.append`."""
    torch.manual_seed(size)
    heads, pages, page, count = 3, 5, 8, 21
    pool = torch.full((pages, page, heads * size) if by_row else (heads, pages, page, size), torch.nan, dtype=dtype)
    want = pool.clone()
    # The projection of all heads, row by row; by head it is a view.
    rows = torch.randn(count, heads, size).to(dtype)
    place = torch.randperm(pages * page)[:count]
    strides = Strides.by_row(page, heads, size) if by_row else Strides.by_head(page, size)
    load(append_source(page, size, strides)).append(pool, rows.transpose(0, 1), place)
    ops.append(want, rows.flatten(1) if by_row else rows.transpose(0, 1), place, 0 if by_row else 1)
    return None if torch.equal(pool.nan_to_num(7.0), want.nan_to_num(7.0)) else "another pool"


@contextlib.contextmanager
def executed() -> Iterator[None]:
    """Where launches go: to the interpreter, or to ttsem."""
    if INTERPRETED:
        yield
        return
    with sanitize.session(cc=90):
        yield


def checks(word: str, dtypes: list[str]) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """What a word of the command line stands for: what is checked, and how."""
    if word in ("grid", "quarter", "all"):
        share = {"grid": len(dtypes), "quarter": 4, "all": 1}[word]
        for k, dtype in enumerate(dtypes):
            yield from ((f"{case}", partial(problem, case)) for case in list(grid(dtype))[k % share :: share])
    elif word == "plants":
        yield from ((f"{plant.case}: {plant.new}", plant.missed) for plant in plants())
    elif word == "append":
        for dtype, by_row, size in itertools.product(DTYPES.values(), (False, True), (40, 64)):
            yield f"append {dtype} {by_row} {size}", partial(append_problem, dtype, by_row, size)
    else:
        yield "drawn", examples


def examples() -> None:
    """Raises:
    AssertionError: a case that hypothesis made smaller.
    """

    @settings(max_examples=int(os.environ.get("KVPASS_SOAK", "12")), deadline=None, derandomize=True, database=None)
    @given(drawn(("fp32", "fp16") if INTERPRETED else ("bf16",)))
    def one(case: Case) -> None:
        wrong = problem(case)
        assert wrong is None, f"{case}: {wrong}"

    one()


def main(word: str, *dtypes: str) -> int:
    torch.set_num_threads(1)
    bad = done = 0
    for name, check in checks(word, list(dtypes)):
        begin = time.perf_counter()
        try:
            with executed():
                wrong = check()
        except Exception:  # noqa: BLE001  the other cases are to be heard as well
            wrong = traceback.format_exc()
        done, bad = done + 1, bad + (wrong is not None)
        print(
            f"{'ok' if wrong is None else 'BAD'} {time.perf_counter() - begin:5.2f} s  {name}  {wrong or ''}",
            flush=True,
        )
    print(f"{done} checks, {bad} bad")
    return bad


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
