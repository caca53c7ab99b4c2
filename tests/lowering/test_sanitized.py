"""Generated C++ under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpass.lowering import build
from tests.lowering.sanitized_run import GROUPS

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-g -fsanitize=address,undefined -fno-sanitize-recover=all"


def libraries() -> list[str]:
    """The run-time libraries of the compiler's sanitizers; a name without a folder is one that is not there."""
    try:
        words = [(build.compiler(), f"-print-file-name={name}") for name in ("libasan.so", "libubsan.so")]
    except build.NoCompiler:
        return []
    found = [subprocess.run(word, capture_output=True, text=True, check=False).stdout.strip() for word in words]
    return found if all(map(os.path.isabs, found)) else []


LIBRARIES = libraries()
pytestmark = pytest.mark.skipif(not LIBRARIES, reason="the C++ compiler has no libasan.so and libubsan.so")


def run(*words: str, level: str, module: str = "tests.lowering.sanitized_run") -> None:
    environment = os.environ | {
        "LD_PRELOAD": " ".join(LIBRARIES),
        "ASAN_OPTIONS": "detect_leaks=0",  # of the interpreter
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "KVPASS_CXXFLAGS": f"{level} {FLAGS}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{done.stdout[-1000:]}\n{done.stderr[:6000]}", pytrace=False)


def test_one_shape_and_planted_faults() -> None:
    """Not optimised, since a sanitized kernel compiles ten times as fast so."""
    run("plants", "one_shape", level="-O0")


@pytest.mark.soak
@pytest.mark.parametrize("group", [name for name in GROUPS if name != "one_shape"])
def test_all_shapes(group: str) -> None:
    run(group, level="-O1")


@pytest.mark.soak
def test_planted_faults_in_optimised_kernels() -> None:
    run("plants", level="-O1")


@pytest.mark.soak
def test_every_rule_of_a_tape() -> None:
    run("-q", "-p", "no:cacheprovider", "-n", "0", "tests/lowering/test_tape.py", level="-O0", module="pytest")
