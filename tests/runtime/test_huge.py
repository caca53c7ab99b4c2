"""Huge pages under the weights: which memory is asked for, and that nothing but its pages changes."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

import kvpass
from kvpass.cache.pools import HUGE_PAGE as PAGE
from kvpass.ir import address
from kvpass.runtime import huge, written
from kvpass.runtime.huge import spans
from tests.runtime.test_steps import Model, grow

linux = pytest.mark.skipif(sys.platform != "linux" or not huge.wanted(), reason="no huge pages here")


def test_whole_pages_of_what_stands_together() -> None:
    assert spans([(10 * PAGE, 3 * PAGE)]) == [(10 * PAGE, 13 * PAGE)]
    assert spans([(10 * PAGE + 64, 3 * PAGE)]) == [(11 * PAGE, 13 * PAGE)]
    assert spans([(10 * PAGE + 64, PAGE)]) == []
    near, far = (11 * PAGE + 4096, PAGE), (13 * PAGE + (1 << 17), 3 * PAGE)
    assert spans([far, (10 * PAGE, PAGE), near, near]) == [(10 * PAGE, 12 * PAGE), (14 * PAGE, 16 * PAGE)]
    assert spans([]) == []


def in_huge_pages(tensor: torch.Tensor) -> int:
    """Bytes of the mapping that holds a tensor which stand in huge pages."""
    at, found = address(tensor), 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= at < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages"):
            found = int(line.split()[1]) << 10
    return found


def _gives() -> bool:
    """Whether the system puts pages together for somebody who asks it without our help."""
    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(bytes(4 * PAGE))
    first = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PAGE
    try:
        memory.madvise(25, first, 2 * PAGE)  # MADV_COLLAPSE
    except OSError:
        return False
    return True


@linux
def test_addresses_contents_and_marks_stay() -> None:
    weight = torch.randn(8 * PAGE // 4)
    place, copy, record = address(weight), weight.clone(), written.storage(weight)
    with written.lock:
        record.mark(weight, 1)
    assert record.marked
    given = huge.settle([weight])
    if not _gives():
        pytest.skip("the system has no huge page to give")
    assert given >= 6 * PAGE
    assert in_huge_pages(weight) >= 6 * PAGE
    assert address(weight) == place
    assert written.bearing(weight)
    assert torch.equal(weight, copy)


@linux
def test_who_says_no(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weight = torch.randn(4 * PAGE // 4)
    with monkeypatch.context() as patch:
        patch.setenv("KVPASS_HUGE_PAGES", "0")
        assert huge.settle([weight]) == 0
    with monkeypatch.context() as patch:
        (tmp_path / "enabled").write_text("always madvise [never]\n")
        patch.setattr(huge, "_SETTING", tmp_path / "enabled")
        assert huge.settle([weight]) == 0
        patch.setattr(huge, "_SETTING", tmp_path / "absent")
        assert huge.settle([weight]) == 0


def test_memory_that_others_see_is_left_alone() -> None:
    weight = torch.randn(4 * PAGE // 4).share_memory_()
    assert huge.settle([weight]) == 0


@pytest.mark.parametrize(("tiers", "asked"), [("compiled", 2), ("eager", 0)])
def test_weights_settle_once_steps_are_compiled(tiers: str, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where they are other weights."""
    calls: list[int] = []
    monkeypatch.setattr(huge, "settle", lambda tensors: calls.append(len(tensors)) or 0)
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model().eval()
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers=tiers)
    ids = grow(fast, model, torch.randint(0, 23, (1, 9)), 5)
    assert kvpass.wait(fast)
    assert len(calls) == min(1, asked)
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    grow(fast, model, ids, 3)
    assert kvpass.wait(fast)
    assert calls == [len(list(model.parameters()))] * asked
