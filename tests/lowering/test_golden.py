"""The text of generated kernels. ``--accept`` writes it anew.

Most of a kernel is shared text. A case keeps the whole of it, or what the generator wrote: the head, the constants, the
sections that it replaced and the optional parts that it chose. So a change of the shared text shows once for each
kernel in `kernels/`.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from kvpass.ir import Attention, Read, Step
from kvpass.lowering import cpp, triton
from kvpass.lowering.triton import Strides
from tests.lowering.cases import attention
from tests.lowering.triton_cases import Case

FOLDER = Path(__file__).with_name("golden")
HOW = "If the change is meant, write it with: python -m pytest tests/lowering/test_golden.py --accept"


@dataclass(frozen=True)
class Golden:
    """A kernel, and whether its whole text is kept."""

    source: Callable[[], str]
    whole: bool = False


def _cpp(spec: Attention, whole: bool = False) -> Golden:
    return Golden(lambda: cpp.source(spec), whole)


def _triton(case: Case, dtype: torch.dtype, arch: str = "sm_90", whole: bool = False) -> Golden:
    return Golden(lambda: triton.source(case.spec(dtype), arch), whole)


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
WITH_SINK = replace(attention(4, 2, 192, 128), reads=(Read("sink", FP32, "h"),), sink="sink")
DECODE = Case(sizes=(128, 128), group=4, kv_heads=8, page=64)
CASES = {
    "cpp_causal_fp32": _cpp(attention(8, 2, 128), whole=True),
    "cpp_window_soft_cap_bf16": _cpp(attention(8, 4, 64, dtype=BF16, mask="window", score="soft_cap")),
    "cpp_alibi_padding_fp16": _cpp(attention(6, 2, 40, dtype=FP16, mask="padding", score="alibi")),
    "cpp_two_sizes_sink_fp32": _cpp(WITH_SINK),
    "triton_decode_bf16": _triton(DECODE, BF16, whole=True),
    "triton_decode_alibi_window_fp16": _triton(replace(DECODE, page=16, score="alibi", mask="window"), FP16, "sm_80"),
    "triton_prefill_bias_bf16": _triton(replace(DECODE, step=Step.PREFILL, score="bias"), BF16, whole=True),
    "triton_append": Golden(lambda: triton.append_source(64, 128, Strides.by_row(64, 8, 128)), whole=True),
}


# Of a general kernel: sections and lines that a fact replaces, conditions, headings.
_WRITTEN = re.compile(
    r"""^[ ]*(//|\#):[ ]begin[ ](\w+)\n .*? ^[ ]*\1:[ ]end[ ]\2\n
      | ^[ ]*(//|\#):[^\n]*\n
      | ^(//|\#)[ ]----[^\n]*\n
      | ^[^\n]*(//|\#)=[ ]*\w+\n
      | ^\n""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)


def outline(template: str) -> str:
    """A general kernel without the text that all shapes share; of an optional part only its condition is left."""
    kept = "".join(found[0] for found in _WRITTEN.finditer(template))
    return re.sub(r"^[ ]*(//|#): (if .*)\n", r"\g<0>\1 \2\n", kept, flags=re.MULTILINE)


@pytest.fixture
def outlined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the generators print is what they wrote."""
    for path in (cpp.SOURCE, *triton.FOLDER.glob("*.py")):
        (tmp_path / path.name).write_text(outline(path.read_text()))
    monkeypatch.setattr(cpp, "SOURCE", tmp_path / cpp.SOURCE.name)
    monkeypatch.setattr(triton, "FOLDER", tmp_path)


def compare(path: Path, found: str, accept: bool) -> None:
    """Fails where the file does not hold the text, or writes it."""
    if accept:
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
        return
    if not path.exists():
        pytest.fail(f"There is no {path.name}. {HOW}", pytrace=False)
    old = path.read_text()
    if old != found:
        lines = difflib.unified_diff(old.splitlines(), found.splitlines(), path.name, "generated", lineterm="")
        pytest.fail("\n".join([*lines, "", f"The generated text has changed. {HOW}"]), pytrace=False)


def orphans(folder: Path, accept: bool) -> list[str]:
    """Files that belong to no case; they are removed where that is accepted."""
    found = sorted(path for path in folder.glob("*") if path.name not in {f"{name}.txt" for name in CASES})
    for path in found if accept else ():
        path.unlink()
    return [] if accept else [path.name for path in found]


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--accept"))


@pytest.mark.parametrize("name", CASES)
def test_text(name: str, accept: bool, request: pytest.FixtureRequest) -> None:
    if not CASES[name].whole:
        request.getfixturevalue("outlined")
    compare(FOLDER / f"{name}.txt", CASES[name].source(), accept)


def test_every_file_belongs_to_a_case(accept: bool) -> None:
    assert orphans(FOLDER, accept) == [], HOW


def test_an_outline_drops_shared_text_only(outlined: None) -> None:
    """All that two shapes differ in is in what the generator wrote."""
    written = cpp.source(attention(8, 4, 64, dtype=BF16, mask="window", score="soft_cap"))
    for line in ("constexpr int GROUP = 2;", "using Element = bfloat16;", "// if half or brain", "hyperbolic("):
        assert line in written
    for line in ("// if half\n", "weigh(", "//=", "//:"):
        assert line not in written


def test_a_change_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "golden" / "kernel.txt"
    with pytest.raises(pytest.fail.Exception, match=r"no kernel\.txt.*--accept"):
        compare(path, "a\nb\n", accept=False)
    compare(path, "a\nb\n", accept=True)
    compare(path, "a\nb\n", accept=False)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)--- kernel\.txt\n.* a\n-b\n\+c\n.*--accept"):
        compare(path, "a\nc\n", accept=False)
    assert orphans(path.parent, accept=False) == ["kernel.txt"]
    assert orphans(path.parent, accept=True) == []
    assert not path.exists()
