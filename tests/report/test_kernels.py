"""`kvpass kernels`: the table against `lowering.inspect` called directly, and every way to get no table."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvpass import __main__ as cli
from kvpass.frontend.api import compile as compile_incremental
from kvpass.frontend.api import recording
from kvpass.ir import Attention, Step
from kvpass.kernels.text import parse, parse_expression, text
from kvpass.lowering.architectures import ARCHITECTURES, roofline
from kvpass.lowering.inspect import compile_for, resources
from kvpass.lowering.inspect.launches import Call, Launch, launches
from kvpass.lowering.triton_config import config
from kvpass.lowering.triton_offline import offline
from kvpass.report.cli import kernels_command
from kvpass.report.kernels import COLUMNS, Asked, Setting, _kernels, asked, measure
from kvpass.report.parts import incremental_of
from tests.lowering.test_inspect import loop_of
from tests.report.conftest import Records
from tests.report.models import VOCABULARY

ARCHS = ("sm_90", "gfx942")
STEPS = (Step.DECODE, Step.PREFILL)
# As `make_wide` is compiled: D 64, four heads over two.
WIDE = parse(
    "attention heads=4 kv_heads=2 head_size=64 value_size=64 dtype=bfloat16 scale=0.125\n"
    "  score = score\n  support = j <= i"
)


class Wide(nn.Module):
    """One attention of a size that tensor cores take."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 64, dtype=dtype), nn.Linear(64, VOCABULARY, dtype=dtype)
        self.q, self.kv = nn.Linear(64, 256, dtype=dtype), nn.Linear(64, 256, dtype=dtype)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        q = self.q(x).unflatten(-1, (4, 64)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (4, 64)).transpose(1, 2).chunk(2, 1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.head(x + y.transpose(1, 2).flatten(2).unflatten(-1, (4, 64)).sum(2))


def make_wide() -> nn.Module:
    torch.manual_seed(0)
    return Wide(torch.bfloat16)


def make_double() -> nn.Module:
    return Wide(torch.float64)


FIELDS: dict[str, Any] = {
    "arch": "sm_90,gfx942", "rows": 4096, "new": 1, "page_size": 64, "dtype": None, "format": "text", "output": None,
}  # fmt: skip


def told(records: Any, capsys: pytest.CaptureFixture[str], **given: Any) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command."""
    code = kernels_command(records, Namespace(**FIELDS | given))
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def wide() -> dict[str, Any]:
    """The JSON of the command for `Wide`."""
    torch._dynamo.reset()
    with recording() as found, torch.no_grad():
        compile_incremental(make_wide(), verify=False)(torch.arange(14).reshape(2, 7) % VOCABULARY)
    with redirect_stdout(io.StringIO()) as out:
        assert kernels_command(found, Namespace(**FIELDS | {"arch": ",".join(ARCHS), "format": "json"})) == 0
    return json.loads(out.getvalue())  # type: ignore[no-any-return]


@pytest.mark.parametrize("arch", ARCHS)
def test_figures_are_those_of_inspect(wide: dict[str, Any], arch: str) -> None:
    (attention,) = wide["attention"]
    spec = parse(attention["text"])
    assert (attention["count"], spec.heads, spec.kv_heads, spec.dtype) == (1, 4, 2, torch.bfloat16)
    rows = {row["kernel"]: row for row in attention["kernels"] if row["arch"] == arch}
    assert list(rows) == ["decode", "combine", "prefill"]
    for step, new in ((Step.DECODE, 1), (Step.PREFILL, 512)):
        sized = replace(spec, page_size=64, step=step)
        how = config(sized, arch)
        tile = how.block_n * 2 * 64 * 2
        found = resources(compile_for(offline(sized, arch, new, how=how), arch), loop_bytes=tile)
        cost, loads = rows[step.value]["cost"], found.instructions
        assert cost["registers"] == found.registers > 32
        assert cost["spill_bytes"] == found.spill_bytes == 0
        assert cost["shared_bytes"] == found.shared_bytes > 1024
        assert cost["shared_limit"] == ARCHITECTURES[arch].shared_limit
        assert cost["blocks_per_multiprocessor"] == found.blocks_per_multiprocessor > 0
        assert cost["mma"] == loads["mma"] > 0
        assert cost["loads_16"] == loads["async_copy_16"] + loads["global_load_16"] > 0
        assert cost["loads_2"] == loads["global_load_2"] == 0
        assert cost["seconds"] == roofline(arch, cost["bytes"], cost["flops"], spec.dtype)
        if found.loop is None:
            assert arch == "gfx942"
            assert cost["per_kib"] is cost["issue_share"] is None
        else:
            assert cost["per_kib"] == found.loop.per_kib > 10
            assert cost["issue_share"] == ARCHITECTURES[arch].issue_share(found.loop.per_kib)
            assert cost["issue_share"] < 1
    combine = rows["combine"]["cost"]
    assert (combine["per_kib"], combine["mma"], combine["spill_bytes"]) == (None, 0, 0)
    assert 0 < combine["registers"] < rows["decode"]["cost"]["registers"]


def test_bytes_and_flops_by_hand(wide: dict[str, Any]) -> None:
    assert {name: wide[name] for name in ("schema", "cached_rows", "page_size", "proven", "refusals")} == {
        "schema": 1, "cached_rows": 4096, "page_size": 64, "proven": True, "refusals": [],
    }  # fmt: skip
    assert wide["new_rows"] == {"decode": 1, "prefill": 512}
    costs = {row["kernel"]: row["cost"] for row in wide["attention"][0]["kernels"] if row["arch"] == "sm_90"}
    row, queries = 2 * 2 * 64 * 2, 4 * 64 * 2  # bytes of keys and values, and of queries, in a row
    # 65 tiles of 64 keys, four to a split: 17 parts of 64 values, a maximum and a total.
    parts = 4 * 17 * 66 * 4
    assert costs["decode"]["bytes"] == 4097 * row + queries + 65 * 4 + parts
    assert costs["combine"]["bytes"] == parts + queries
    assert costs["prefill"]["bytes"] == 4608 * row + 2 * 512 * queries + 72 * 4
    assert costs["decode"]["flops"] == 4 * 4 * 64 * 4097
    assert costs["prefill"]["flops"] == 4 * 4 * 64 * sum(range(4097, 4609))


def of(spec: Attention, step: Step, cached: int, new: int) -> tuple[Launch, ...]:
    return launches(spec, "sm_90", step, Call(cached, new, 64))


def windowed(support: str) -> Attention:
    return replace(WIDE, support=parse_expression(support))


def test_a_window_and_a_bias_are_counted() -> None:
    row = 2 * 2 * 64 * 2
    (whole,) = of(WIDE, Step.PREFILL, 1000, 24)
    (window,) = of(windowed("(j <= i) & (j > i - 100)"), Step.PREFILL, 1000, 24)
    # 23 rows before the last one see as many keys before its window.
    assert whole.bytes - window.bytes == (1024 - 123) * row + 4 * (16 - 2)
    assert window.flops == 4 * 4 * 64 * 24 * 100
    biased = parse(
        text(WIDE).replace("  score = score", "  read bias: float32[h, j]\n  score = score + bias(b, h, i, j)")
    )
    (bias,) = of(biased, Step.PREFILL, 1000, 24)
    assert bias.bytes - whole.bytes == 4 * 1024 * 4
    padded = parse(
        text(WIDE)
        .replace("  score = score", "  read keep: bool[]\n  score = score")
        .replace("j <= i", "(j <= i) & (keep(b, j) > 0)")
    )
    (kept,) = of(padded, Step.PREFILL, 1000, 24)
    assert kept.bytes - whole.bytes == 1024


def test_few_keys_are_not_split() -> None:
    (decode,) = of(WIDE, Step.DECODE, 100, 1)
    assert decode.kernel == "decode"
    assert decode.source.constants["DIRECT"] is True
    assert decode.bytes == 101 * 512 + 2 * 512 + 2 * 4
    assert decode.source.constants["BLOCK_M"] == 16
    (several,) = of(WIDE, Step.DECODE, 100, 16)
    assert several.source.constants["BLOCK_M"] == 32


def test_ranges_that_overlap_are_read_once() -> None:
    (whole,) = of(WIDE, Step.DECODE, 50, 1)
    (union,) = of(windowed("((j <= i) & (j < 40)) | ((j <= i) & (j > i - 30))"), Step.DECODE, 50, 1)
    assert (union.bytes, union.flops) == (whole.bytes, whole.flops)


def test_the_text_has_every_column(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = told(records("sliding"), capsys)
    assert (code, err) == (0, "")
    assert (
        "One sequence with 4,096 cached rows in pages of 64; new rows: 1 in decode and combine, 512 in prefill" in out
    )
    assert "sm_90: H100 SXM; gfx942: MI300X" in out
    lines = [line.split() for line in out.splitlines() if line.startswith(("arch ", *ARCHS))]
    heads = [line for line in lines if line[0] == "arch"]
    assert heads == [["arch", "kernel", *(name for name, _ in COLUMNS)]]
    incrementals = [incremental for record in records("sliding") if (incremental := incremental_of(record)) is not None]
    costs = [kernel.cost for one in measure(incrementals, Setting(ARCHS)) for kernel in one.kernels]
    rows = [line for line in lines if line[0] in ARCHS]
    assert [row[:2] for row in rows] == [[arch, step.value] for arch in ARCHS for step in STEPS]
    for row, cost in zip(rows, costs, strict=True):
        assert cost is not None
        per_kib, share = ("-", "-") if cost.per_kib is None else (f"{cost.per_kib:.1f}", f"{cost.issue_share:.0%}")
        assert row[2:] == [
            *map(str, (cost.registers, cost.spill_bytes, f"{cost.shared_bytes:,}", cost.blocks_per_multiprocessor)),
            *map(str, (cost.mma, cost.loads_16, cost.loads_2, per_kib, share, f"{cost.bytes:,}")),
            *(f"{cost.flops / 1e6:,.2f}", f"{cost.seconds * 1e6:.3g}", "us"),
        ]


def test_equal_attentions_are_compiled_once(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    """Two windows of one kind, and one attention without."""
    _, out, _ = told(records("mixture"), capsys, arch="gfx942")
    lines = [line for line in out.splitlines() if " x attention" in line or line.startswith("gfx942 ")]
    assert [line.split()[:2] for line in lines] == [
        ["2", "x"], ["gfx942", "decode"], ["gfx942", "prefill"],
        ["1", "x"], ["gfx942", "decode"], ["gfx942", "combine"], ["gfx942", "prefill"],
    ]  # fmt: skip


def test_a_file(records: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    given: dict[str, Any] = {"arch": "gfx942", "rows": 7, "new": 2, "page_size": 16, "format": "json"}
    assert told(records("sliding"), capsys, output=str(path), **given) == (0, "", "")
    data = json.loads(path.read_text())
    assert (data["cached_rows"], data["new_rows"]["decode"], data["page_size"]) == (7, 2, 16)
    code, out, err = told(records("sliding"), capsys, **given)
    assert (code, json.loads(out), err) == (0, data, "")
    code, out, err = told(records("sliding"), capsys, output=str(tmp_path / "no" / "file"), **given)
    assert (code, out) == (1, "")
    assert err.startswith("kvpass: cannot write")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--arch", "sm_91"], "there is no architecture 'sm_91'; there are sm_90, "),
        (["--arch", "gfx940"], "there is no architecture 'gfx940'; there are gfx942, "),
        (["--arch", "sm_90,"], "there is no architecture ''; there are sm_80, "),
    ],
)
def test_an_unknown_architecture(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "no.such:model", *argv]) == cli.ERROR
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"kvpass: {sentence}")
    assert all(arch in err for arch in ARCHITECTURES)


@pytest.mark.parametrize(
    "argv", [["--rows", "-1"], ["--rows", "x"], ["--rows", str(1 << 31)], ["--new", "0"], ["--page-size", "0"]]
)
def test_wrong_numbers(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["kernels", "no.such:model", *argv])
    assert caught.value.code == cli.ERROR
    assert "is not a whole number from" in capsys.readouterr().err


def test_help_names_the_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["kernels", "--help"])
    assert caught.value.code == 0
    assert f"of {', '.join(ARCHITECTURES)}, with" in " ".join(capsys.readouterr().out.split())


def test_a_refused_model(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = told(records("bidirectional"), capsys)
    assert (code, err) == (cli.REFUSED, "")
    assert out.startswith("refused (KV202)")
    assert "hint:" in out
    code, out, _ = told(records("bidirectional"), capsys, format="json")
    data = json.loads(out)
    assert (code, data["proven"], data["attention"]) == (cli.REFUSED, False, [])
    assert [refusal["code"] for refusal in data["refusals"]] == ["KV202"]


def test_what_has_no_words_says_so_on_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "tests.report.test_kernels:make_double", "--arch", "sm_90"]) == cli.PROVEN
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("sm_90 ")]
    assert [row.split(maxsplit=2) for row in rows] == [
        ["sm_90", step.value, "no Triton kernel for elements of torch.float64"] for step in STEPS
    ]


def test_no_attention(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(records("unrecognised"), capsys)
    assert (code, out) == (0, "no attention was recognised, so no kernel is generated\n")


def reasons(one: Asked, **given: int) -> list[str]:
    setting = Setting(("sm_90",), **given)
    return [kernel.reason for step in STEPS for kernel in _kernels(one, "sm_90", step, setting)]


def test_what_a_gpu_would_not_call(records: Records) -> None:
    incremental = incremental_of(records("sliding")[0])
    assert incremental is not None
    ((one, count),) = asked(incremental).items()
    assert (count, one.mixed, one.key) == (1, False, one.value)
    assert reasons(one)[0] == ""
    many = "a decode of 65 new rows with 1 heads in a group: a prefill computes them"
    assert reasons(one, new=65)[0].endswith(many)
    assert reasons(Asked(one.spec))[0] == ""  # keys and values that are not in pages
    assert "different types" in reasons(Asked(one.spec, mixed=True))[1]


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, records: Records) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("in absorb") from RuntimeError("PassManager::run failed\nmore")

    monkeypatch.setattr("kvpass.lowering.inspect.compile_for", crash)
    incremental = incremental_of(records("sliding")[0])
    assert incremental is not None
    assert reasons(next(iter(asked(incremental)))) == ["it cannot be measured: PassManager::run failed more"] * 2


def test_an_interpreter_is_refused(
    monkeypatch: pytest.MonkeyPatch, records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, out, err = told(records("sliding"), capsys)
    assert (code, out) == (1, "")
    assert err == "kvpass: TRITON_INTERPRET is set, so Triton compiles nothing: unset it\n"


def test_the_main_loop_is_the_one_without_masks() -> None:
    loop = """masked: LDG.E.128 R4, [R2.64]
        ISETP R1, R2
        @P0 BRA {masked}
        clear: LDG.E.128 R4, [R2.64]
        @P0 BRA {clear}
        EXIT"""
    assert loop_of(loop) == ["LDG.E.128 R4, [R2.64]", "BRA 0x30"]
