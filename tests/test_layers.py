"""The level table of the architecture, held against what the modules import.

An import under ``TYPE_CHECKING`` counts: a name that is only known to the type checker is known all the same.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The longest matching prefix decides; kvpass/__init__ is the entry "".
LEVELS = {
    "ir": 0,
    "errors": 0,
    "config": 0,
    "forked": 0,
    "analysis": 1,
    "cache": 1,
    "kernels": 1,
    "progress": 1,
    "transforms": 2,
    "lowering": 2,
    "runtime": 3,
    "report": 3,
    "frontend": 4,
    "generation": 5,
    "huggingface": 5,
    "demos": 5,
    "demo": 5,
    "weights": 5,
    "__main__": 5,
    "": 5,
}
# Below level 3 a room may look only into the rooms named here (its own is always open).
OPEN = {
    "ir": {"errors", "config"},
    "errors": {"ir", "config"},
    "config": {"ir", "errors"},
    "forked": set(),
    "progress": {"errors"},
    "analysis": {"ir", "errors", "config"},
    "cache": {"ir", "errors", "config", "forked"},
    "kernels": {"ir", "errors", "config"},
    "transforms": {"ir", "errors", "config", "analysis"},
    "lowering": {"ir", "errors", "config", "forked", "progress", "kernels"},
}
NO_TORCH = {"cache.blocks", "cache.prefix", "cache.eviction"}
BANNED = {"kernels", "lowering"}


def room_of(module: str) -> str:
    """The entry of LEVELS that holds ``module`` (a dotted name below kvpass, ``""`` for kvpass itself)."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in LEVELS:
            return ".".join(parts[:end])
    return ""


def imported(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a module of ``package`` imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def check(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What ``source``, as the module ``kvpass.<module>``, imports against the table: one sentence each."""
    full = ["kvpass", *module.split(".")] if module else ["kvpass"]
    package = full if is_package or not module else full[:-1]
    room, found = room_of(module), []
    for line, name in imported(ast.parse(source), package):
        top, _, rest = name.partition(".")
        where = f"{'.'.join(full)}:{line}"
        if top in BANNED:
            found.append(f"{where} imports bare {name}; write kvpass.{name}")
        elif top == "torch" and module in NO_TORCH:
            found.append(f"{where} imports torch; this bookkeeping is tested without it")
        elif name.startswith("torch.fx") and room == "cache":
            found.append(f"{where} imports {name}; the cache knows no graphs")
        elif LEVELS[room] == 0 and top not in {*sys.stdlib_module_names, "sympy", "torch", "kvpass"}:
            found.append(f"{where} imports {name}; level 0 has the standard library, sympy and torch")
        elif top == "kvpass":
            found += [f"{where} {room or 'kvpass'} may not import {name}"] * (not allowed(room, room_of(rest)))
    return found


def allowed(room: str, target: str) -> bool:
    if room == target:
        return True
    if room in OPEN:
        return target in OPEN[room]
    return LEVELS[room] == 5 or LEVELS[target] < LEVELS[room]


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name below kvpass and path of every module, in the top-level folders too."""
    for prefix, folder in (("", ROOT / "kvpass"), ("kernels", ROOT / "kernels"), ("lowering", ROOT / "lowering")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if not prefix and parts[0] in BANNED:
                continue  # seen once more through its link
            yield ".".join([*filter(None, [prefix]), *parts]).removesuffix("__init__").rstrip("."), path


def test_every_import_points_downwards() -> None:
    found = [
        line for name, path in modules() for line in check(name, path.read_text(), is_package=path.stem == "__init__")
    ]
    assert not found, "\n".join(found)


def test_every_module_has_a_level() -> None:
    homeless = [name for name, _ in modules() if name and not room_of(name)]
    assert not homeless, f"give these a level: {homeless}"


def test_modules_are_found() -> None:
    names = {name for name, _ in modules()}
    assert "" in names, "kvpass/__init__ itself is held to the table too"
    assert {"errors", "ir"} <= names


@pytest.mark.parametrize(
    ("module", "source", "word"),
    [
        ("analysis.facts", "from kvpass.transforms import plan", "transforms"),
        ("analysis.facts", "from ..runtime.program import Program", "runtime"),
        ("analysis.facts", "def f():\n    import kvpass.cache", "cache"),
        ("analysis.rules", "from kvpass import cache", "cache"),
        ("analysis.rules", "import kvpass", "kvpass"),
        ("transforms.plan", "from kvpass.lowering import torch_ops", "lowering"),
        ("transforms.plan", "from kvpass.kernels import reference", "kernels"),
        ("lowering.cpp", "from kvpass.analysis import facts", "analysis"),
        ("runtime.program", "from kvpass.report import Report", "report"),
        ("report.cli", "from kvpass.frontend import explain", "frontend"),
        ("runtime.program", "if TYPE_CHECKING:\n    from kvpass.frontend import capture", "frontend"),
        ("frontend.backend", "from kvpass.huggingface import load", "huggingface"),
        ("errors", "import numpy", "numpy"),
        ("kernels.triton.decode", "import kernels", "bare kernels"),
        ("runtime.program", "from lowering.cpp import emit", "bare lowering"),
        ("cache.prefix", "import torch", "torch"),
        ("cache.pools", "import torch.fx", "graphs"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, word: str) -> None:
    found = check(module, source)
    assert len(found) == 1, found
    assert word in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("analysis.facts", "from . import expressions\nfrom .rules import layout\nimport sympy, torch"),
        ("transforms.plan", "from kvpass.analysis.facts import Fact\nfrom kvpass.ir import Attention"),
        ("lowering.cpp.emit", "from kvpass.kernels.reference import attention"),
        ("cache.pools", "import torch"),
        ("frontend.backend", "from kvpass.runtime import default_cache\nfrom kvpass import errors"),
        ("report.cli", "from kvpass.transforms.plan import Plan"),
        ("__main__", "from kvpass.demo import run"),
    ],
)
def test_what_the_table_allows_passes(module: str, source: str) -> None:
    assert check(module, source) == []
