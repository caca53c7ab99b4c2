"""``import kvpass`` is lazy: it costs next to nothing beyond ``import torch``, and every public name has a home."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest

import kvpass

TIMED = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import kvpass
print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))
"""
BUDGET_SECONDS = 0.050


def import_in_subprocess() -> tuple[float, list[str]]:
    run = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(run.stdout)
    return seconds, modules


def test_import_is_quick_and_brings_nothing() -> None:
    runs = [import_in_subprocess() for _ in range(3)]
    assert statistics.median(seconds for seconds, _ in runs) < BUDGET_SECONDS
    brought = {name.partition(".")[0] for _, modules in runs for name in modules}
    assert not brought & {"triton", "transformers", "sympy", "networkx", "numpy", "gguf"}


def test_the_timing_can_fail() -> None:
    slow = TIMED.replace("import kvpass", "import time; time.sleep(0.06)")
    run = subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)[0] > BUDGET_SECONDS


@pytest.mark.parametrize("name", [name for name in kvpass.__all__ if name != "__version__"])
def test_public_names_resolve(name: str) -> None:
    assert getattr(kvpass, name) is getattr(kvpass, name)
    assert name in dir(kvpass)


def test_compile_is_ours_and_not_the_builtin() -> None:
    import builtins

    assert kvpass.compile is not builtins.compile
    assert "kvpass" in kvpass.compile.__module__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Kache'"):
        kvpass.Kache  # noqa: B018
