"""The folder of compiled kernels: shared by processes, mended when damaged, done without where there is no compiler."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvpass
from kvpass.lowering import build, choose, cpp, cpu
from kvpass.lowering.specialise import specialise
from tests.lowering.cases import attention
from tests.property.oracle import compare

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVPASS_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def missing() -> str:
        raise build.NoCompiler("no C++ compiler was found")

    monkeypatch.setattr(build, "compiler", missing)
    cpu.kernel.cache_clear()
    monkeypatch.setattr(choose, "_said", set())
    yield
    cpu.kernel.cache_clear()


def test_compiled_once(folder: Path) -> None:
    library = build.shared_library(SOURCE)
    made = library.stat().st_mtime_ns
    assert build.shared_library(SOURCE).stat().st_mtime_ns == made
    assert library.with_suffix(".cpp").read_text() == SOURCE
    assert not [path for path in folder.rglob("*") if path.name.startswith("tmp")]


def test_flags_and_text_are_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build.shared_library(SOURCE)
    assert build.shared_library(SOURCE + "\n") != plain
    monkeypatch.setenv("KVPASS_CXXFLAGS", "-O2")
    assert build.shared_library(SOURCE) != plain


@pytest.mark.parametrize("damage", [b"", b"\x7fELF and nothing else"])
def test_a_damaged_entry_is_built_again(damage: bytes) -> None:
    build.shared_library(SOURCE).write_bytes(damage)
    assert build.load(SOURCE).answer() == 42


def test_many_processes_at_once(folder: Path) -> None:
    program = f"from kvpass.lowering import build; print(build.load({SOURCE!r}).answer())"
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=dict(os.environ))
        for _ in range(4)
    ]
    assert [process.communicate()[0].strip() for process in started] == [b"42"] * 4
    assert len(list(folder.rglob("*.so"))) == 1


def test_an_error_of_the_compiler_is_told() -> None:
    with pytest.raises(build.NoCompiler, match="nonsense"):
        build.shared_library("nonsense;\n")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.key = nn.Embedding(19, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return nn.functional.scaled_dot_product_attention(x, self.key(x), x, is_causal=True)


@torch.no_grad()
def test_without_a_compiler_the_reference_runs_and_says_so_once(
    no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    model = Small().eval()
    ids = torch.arange(13).unsqueeze(0)
    with caplog.at_level(logging.WARNING, logger="kvpass"):
        for _ in range(2):
            fast = kvpass.compile(model, cache=kvpass.Cache(page_size=4))
            torch.testing.assert_close(fast(ids), model(ids))
            torch.testing.assert_close(fast(ids[:, :9]), model(ids[:, :9]))
            torch._dynamo.reset()
    assert len([r for r in caplog.records if "compiler" in r.message]) == 1
    assert kvpass.explain(model, ids).attention[0].lowering == "reference"


@torch.no_grad()
def test_a_kernel_runs_by_default() -> None:
    torch._dynamo.reset()
    assert kvpass.explain(Small().eval(), torch.arange(13).unsqueeze(0)).attention[0].lowering.startswith("C++ ")


class Upcast(Small):
    """Scores in float32 of a model in bfloat16: queries and keys have another dtype than values."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        rows = ids.shape[1]
        scores = x.float() @ self.key(x).float().mT
        scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), float("-inf"))
        return scores.softmax(-1).to(x.dtype) @ x


class Mixed(Small):
    """Values that are computed in float32, from queries and keys in bfloat16."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        rows = ids.shape[1]
        scores = (x @ self.key(x).mT).float()
        scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), float("-inf"))
        return scores.softmax(-1) @ x.float().tanh()


@pytest.mark.parametrize(("kind", "recognised"), [(Upcast, True), (Mixed, False)])
@torch.no_grad()
def test_operands_of_several_dtypes_run_as_they_were_written(kind: type[Small], recognised: bool) -> None:
    """But for those that were cast up from the dtype of the values: kernels sum up in float32 anyway."""
    torch._dynamo.reset()
    model = kind().eval().bfloat16()
    ids = torch.arange(13).unsqueeze(0)
    report = kvpass.explain(model, ids)
    assert report.proven
    assert [a.lowering[:3] for a in report.attention] == ["C++"] * recognised
    fast = kvpass.compile(model, cache=kvpass.Cache(page_size=4))
    for rows in (9, 13):
        compare(fast(ids[:, :rows]), model(ids[:, :rows]))


def test_a_kernel_says_what_it_is() -> None:
    """The head of a module is its text form, and nothing of the template is left."""
    spec = attention(mask="window", score="soft_cap")
    source = cpp.source(spec)
    assert source.startswith("// attention heads=4 kv_heads=2 head_size=64")
    for mark in ("//:", "//=", "@@"):
        assert mark not in source
    assert "return (" in source
    assert "hyperbolic((" in source


def test_facts_that_a_template_asks_for() -> None:
    template = "a = 1  #= one\n#: if two\nb\n#: endif\n#: begin three\nold\n#: end three\n"
    assert specialise(template, {"one": 7, "two": False, "three": "new"}, "#") == "a = 7\nnew\n"
    assert specialise(template, {"one": 7, "two": True, "three": "new"}, "#") == "a = 7\nb\nnew\n"
    with pytest.raises(ValueError, match="two"):
        specialise(template, {"one": 7, "three": "new"}, "#")


def test_the_general_kernel_compiles_as_it_stands() -> None:
    assert build.load(cpp.SOURCE.read_text()).kvpass_decode
    assert build.load(cpp.SOURCE.with_name("append.cpp").read_text()).kvpass_append


@pytest.mark.skipif("avx2" not in Path("/proc/cpuinfo").read_text(), reason="an x86 with AVX2 only")
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-march=x86-64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_vectors(flags: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The widths that this machine would not choose."""
    from tests.lowering import test_cpp
    from tests.lowering.cases import Shape

    monkeypatch.setenv("KVPASS_CXXFLAGS", flags)
    cpu.kernel.cache_clear()
    for new in (1, 3, 40):
        test_cpp.check(attention(6, 2, 72, 64, dtype, "window", "soft_cap"), Shape(new=new, cached=130))
    cpu.kernel.cache_clear()


def test_several_kernels_are_compiled_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [SOURCE.replace("42", str(k)) for k in range(4)]
    moved: list[int] = []

    @contextmanager
    def counted(what: str, total: int) -> Iterator[Any]:
        yield lambda: moved.append(total)

    monkeypatch.setattr(build, "counted", counted)
    build.shared_libraries([*sources, "no C++", sources[0]])
    assert moved == [5] * 5
    monkeypatch.setattr(build, "_call", None)
    assert [build.load(source).answer() for source in sources] == [0, 1, 2, 3]
    build.shared_libraries(sources)
    assert len(moved) == 5


def test_a_graph_has_its_kernels_compiled_before_it_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(build, "shared_libraries", given.extend)
    cpu = torch.device("cpu")
    meta = torch.device("meta")
    choose.prepare([(attention(4, 2, 16), cpu), (attention(4, 2, 2000), cpu), (attention(4, 2, 24), meta)])
    assert given == [cpp.source(attention(4, 2, 16))]
