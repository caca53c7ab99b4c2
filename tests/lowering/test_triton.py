"""Generated Triton kernels without a GPU: values, faults, texts, and what they cost on each architecture."""

import importlib.util
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpass.ir import Attention, Read, Step
from kvpass.kernels.text import parse, parse_expression
from kvpass.lowering.architectures import ARCHITECTURES
from kvpass.lowering.triton import load, source
from kvpass.lowering.triton_config import config, shared_memory

ROOT = Path(__file__).resolve().parents[2]
needs_ttsem = pytest.mark.skipif(
    importlib.util.find_spec("ttsem") is None,
    reason="pip install --no-deps --ignore-requires-python ttsem==0.1.0",
)


def run(*words: str, interpreted: bool) -> None:
    """Checks in a process of their own: what executes the kernels changes torch and triton for good."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "tests.lowering.triton_run", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    bad = [part for part in done.stdout.split("\n") if not part.startswith("ok ")]
    assert done.returncode == 0, "\n".join(bad) + done.stderr
    assert bad[0].endswith("checks, 0 bad")


@pytest.mark.parametrize(
    "words", [("grid", "fp32", "fp16"), pytest.param(("drawn",), marks=pytest.mark.soak), ("append",)], ids=" ".join
)
def test_values_by_the_interpreter(words: tuple[str, ...]) -> None:
    run(*words, interpreted=True)


@needs_ttsem
@pytest.mark.parametrize("words", [("quarter", "bf16"), ("append",)], ids=" ".join)
def test_values_bounds_and_races_by_ttsem(words: tuple[str, ...]) -> None:
    run(*words, interpreted=False)


@needs_ttsem
def test_planted_faults_are_found() -> None:
    run("plants", interpreted=False)


@needs_ttsem
@pytest.mark.soak
def test_all_of_it() -> None:
    run("all", "fp32", "fp16", interpreted=True)
    run("all", "bf16", "fp16", "fp32", interpreted=False)
    run("drawn", interpreted=False)


def spec(**given: Any) -> Attention:
    base = parse(
        "attention heads=32 kv_heads=8 head_size=128 value_size=128 dtype=bfloat16 scale=0.088 page_size=64"
        " step=decode\n"
        "  score = score\n  support = j <= i"
    )
    return replace(base, **given)


def heads(query: int, kv: int, size: int, **given: Any) -> Attention:
    return spec(heads=query, kv_heads=kv, head_size=size, value_size=size, **given)


@pytest.mark.parametrize(("page", "most"), [(64, 32.0), (16, 40.0)])
def test_instructions_of_decode(page: int, most: float) -> None:
    """Warp instructions for each KiB of keys and values, in the loop over tiles that every row sees whole.

    The other loop that copies tiles masks them, and runs for one or two.
    """
    from kvpass.lowering.inspect import compile_for
    from kvpass.lowering.inspect.resources import disassemble, loaded
    from kvpass.lowering.inspect.sass import Flow, parse
    from kvpass.lowering.triton_offline import offline

    of = spec(page_size=page)
    made, how = compile_for(offline(of, "sm_90"), "sm_90"), config(of, "sm_90")
    code = parse(disassemble(made.asm["cubin"]), made.metadata.name)
    tile = how.block_n * (of.head_size + of.value_size) * of.dtype.itemsize
    copied = {
        len(body): sum(loaded(code[at]) for _, at in body if "LDGSTS" in code[at].opcode)
        for body in Flow(code).loops().values()
    }
    shortest = min(length for length, size in copied.items() if size * how.warps * 32 >= tile)
    assert 10 < shortest * how.warps / (tile / 1024) <= most


KERNELS: list[tuple[Attention, str]] = [
    *((heads(query, kv, 64), arch) for query, kv in ((9, 3), (64, 8)) for arch in ("sm_90", "sm_100")),
    *((spec(page_size=16), arch) for arch in ("sm_80", "sm_120", "gfx942")),
    (spec(page_size=None), "sm_90"),
    *((spec(step=Step.PREFILL), arch) for arch in ("sm_80", "sm_90", "sm_100")),
]

KINDS = ("async_copy", "global_load")


@pytest.mark.parametrize(("of", "arch"), KERNELS, ids=[f"{of.step.value} {of.heads} {arch}" for of, arch in KERNELS])
def test_resources(of: Attention, arch: str) -> None:
    from kvpass.lowering.inspect import compile_for, resources
    from kvpass.lowering.triton_offline import offline

    found = resources(compile_for(offline(of, arch), arch))
    bound = shared_memory(of, config(of, arch), ARCHITECTURES[arch])
    assert found.spill_bytes == 0
    assert found.shared_bytes <= bound <= ARCHITECTURES[arch].shared_limit
    assert found.instructions["mma"] >= 16
    loads = {size: sum(found.instructions.get(f"{kind}_{size}", 0) for kind in KINDS) for size in (1, 2, 16)}
    assert loads[16] >= 16
    assert loads[1] == loads[2] == 0
    if of.step is Step.DECODE and found.loop is not None:
        assert found.loop.issue_share < 0.5


WITH_BIAS: dict[str, Any] = {
    "score": parse_expression("score + bias(b, h, i, j)"),
    "support": parse_expression("(j <= i) & Ne(pad(b, j), 0)"),
    "reads": (Read("bias", torch.bfloat16, "hij"), Read("pad", torch.bool, "")),
}


def test_what_scores_read_takes_registers_too() -> None:
    from kvpass.lowering.inspect import compile_for, resources
    from kvpass.lowering.triton_offline import offline

    of = spec(step=Step.PREFILL, **WITH_BIAS)
    found = resources(compile_for(offline(of, "sm_90"), "sm_90"))
    assert found.spill_bytes == 0
    assert found.shared_bytes <= shared_memory(of, config(of, "sm_90"), ARCHITECTURES["sm_90"])


def test_a_window_costs_what_its_keys_cost() -> None:
    module = load(source(spec(support=parse_expression("(j <= i) & (j > i - 1024)"))))
    whole = load(source(spec()))

    def tiles(of: Any, rows: int) -> int:
        return sum(-(-min(high, rows) // 64) - low // 64 for low, high in of.spans(rows - 1, rows - 1, rows))

    assert tiles(whole, 32768) == 512
    assert tiles(module, 32768) == tiles(whole, 1024) == 16
    assert tiles(module, 32768 - 32) == 17


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"step": Step.ANY}, "neither decode nor prefill"),
        ({"dtype": torch.float64}, "elements of torch.float64"),
        ({"head_size": 513}, "heads of 513"),
        ({"softmax_dtype": torch.float64}, "a softmax in torch.float64"),
    ],
)
def test_what_has_no_words_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(NotImplementedError, match=said):
        source(spec(**given))


def test_the_text_stands_alone_and_says_what_it_is() -> None:
    made = source(spec())
    assert made.startswith("# attention heads=32 kv_heads=8")
    assert "kvpass" not in made
    assert "#=" not in made
    assert "#:" not in made


def test_another_constant_is_another_kernel() -> None:
    """Triton's cache keys a kernel by its text and by constants only if they are `tl.constexpr`."""
    one, other = (load(source(spec(head_size=size))).decode.cache_key for size in (128, 120))
    assert one != other


def test_importing_the_generator_does_not_import_triton() -> None:
    code = "import sys, kvpass.lowering.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


ALL_MASKS = (
    ("causal", "plain"),
    ("causal", "bias"),
    ("padding", "alibi"),
    ("padding", "bias"),
    ("padding", "batch"),
    ("documents", "bias"),
    ("documents", "cap"),
    ("window", "alibi read"),
)


@pytest.mark.soak
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("step", [Step.DECODE, Step.PREFILL], ids=lambda step: step.value)
def test_no_kernel_spills(arch: str, step: Step, dtype: torch.dtype) -> None:
    """Where register files are concerned: all sizes, groups, masks and scores of a line."""
    from kvpass.lowering.inspect import compile_for, resources
    from kvpass.lowering.triton_offline import offline
    from tests.lowering.triton_cases import Case

    wrong = []
    for (size, group), (mask, score) in itertools.product(((64, 3), (128, 4), (256, 4)), ALL_MASKS):
        case = Case(step=step, sizes=(size, size), group=group, kv_heads=8, page=64, mask=mask, score=score)
        of = case.spec(dtype)
        splits, new = (32, 1) if step is Step.DECODE else (1, 512)
        found = resources(compile_for(offline(of, arch, new, splits), arch))
        if found.spill_bytes or found.shared_bytes > shared_memory(of, config(of, arch), ARCHITECTURES[arch]):
            wrong.append((size, mask, score, found))
    assert not wrong
