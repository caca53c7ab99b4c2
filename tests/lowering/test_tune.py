"""Which configuration wins, and that it is kept; the times are made up."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvpass.ir import Step
from kvpass.lowering import tune
from kvpass.lowering.architectures import ARCHITECTURES
from kvpass.lowering.triton_config import Config, config, shared_memory
from tests.lowering.cases import attention

DECODE = attention(8, 2, 128, dtype=torch.bfloat16, step=Step.DECODE, page_size=64)
PREFILL = replace(DECODE, step=Step.PREFILL)
KINDS = pytest.mark.parametrize("spec", [DECODE, PREFILL], ids=["decode", "prefill"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVPASS_CACHE", str(tmp_path))
    return tmp_path


class Clock:
    """Times by configuration: the wanted one is the fastest."""

    def __init__(self, wanted: Config | None) -> None:
        self.wanted, self.asked = wanted, list[Config]()

    def __call__(self, how: Config) -> float | None:
        self.asked.append(how)
        return None if self.wanted is None else float(how != self.wanted) + 1


@KINDS
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_candidates_fit(spec: tune.Attention, arch: str) -> None:
    found = tune.candidates(spec, arch)
    assert found[0] == config(spec, arch)
    assert len(found) == len(set(found)) > 3
    assert all(shared_memory(spec, c, ARCHITECTURES[arch]) <= ARCHITECTURES[arch].shared_limit for c in found)
    assert all(c.programs == found[0].programs for c in found)


@KINDS
def test_the_fastest_wins_and_is_not_measured_again(spec: tune.Attention) -> None:
    clock = Clock(tune.candidates(spec, "sm_90")[-1])
    assert tune.winner(spec, "sm_90", "H100", "text", clock) == clock.wanted
    assert clock.asked == tune.candidates(spec, "sm_90")
    again = Clock(None)
    assert tune.winner(spec, "sm_90", "H100", "text", again) == clock.wanted
    assert again.asked == []


@pytest.mark.parametrize("other", [("sm_80", "H100", "text"), ("sm_90", "H200", "text"), ("sm_90", "H100", "other")])
def test_another_device_or_source_is_measured_by_itself(other: tuple[str, str, str]) -> None:
    tune.winner(DECODE, "sm_90", "H100", "text", Clock(tune.candidates(DECODE, "sm_90")[2]))
    clock = Clock(config(DECODE, other[0]))
    assert tune.winner(DECODE, *other, clock) == clock.wanted
    assert clock.asked


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"block_m": "x"}'])
def test_a_damaged_entry_is_measured_again(folder: Path, damage: str) -> None:
    clock = Clock(tune.candidates(DECODE, "sm_90")[1])
    tune.winner(DECODE, "sm_90", "H100", "text", clock)
    (entry,) = (folder / "tuned").iterdir()
    entry.write_text(damage)
    clock.asked.clear()
    assert tune.winner(DECODE, "sm_90", "H100", "text", clock) == clock.wanted
    assert clock.asked


def test_where_nothing_can_be_launched_the_table_stands(folder: Path) -> None:
    assert tune.winner(DECODE, "sm_90", "H100", "text", Clock(None)) == config(DECODE, "sm_90")
    assert not (folder / "tuned").exists()
