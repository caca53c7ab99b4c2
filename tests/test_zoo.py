"""A random tenth of the architectures of transformers: none answers wrongly, and a refusal has a reason.

`make zoo` runs all of them. ``KVPASS_ZOO_SEED`` names another draw.
"""

import os
import random
from typing import get_args

import pytest

from tests.zoo.census import Row, Task, rows
from tests.zoo.tiny import Attn, Mapped, classes, has_attn

SEED = int(os.environ.get("KVPASS_ZOO_SEED", "18"))  # a draw with few of the models whose tracing takes a minute
ALL = [(m, t) for m in get_args(Mapped) for t in classes(m)]
DRAWN: list[Task] = [
    (m, t, random.Random(f"{SEED} {t}").choice(get_args(Attn)))
    for m, t in sorted(random.Random(SEED).sample(ALL, len(ALL) // 10))
]
DEFECTS = ("KV110", "KV301")  # of ours: no reason


@pytest.mark.parametrize("task", DRAWN, ids=lambda task: "-".join(task))
def test_right_or_refused_with_a_reason(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPASS_CXXFLAGS", "-O0")
    mapping, kind, attn = task
    (found,) = rows([(mapping, kind, attn if has_attn(*task) else "sdpa")], 1)
    assert found.status in ("proven", "refused", "pieces", "cannot build"), found
    assert found.code not in DEFECTS, f"KVPASS_ZOO_SEED={SEED}: {found} {found.message}"


def test_the_table_has_a_line_for_each_row() -> None:
    from tests.zoo.table import markdown

    found = [
        Row("causal", "a", "AForCausalLM", "sdpa", "proven", recognised=2, lowered=2, unrecognised=("why",)),
        Row("causal", "b", "BForCausalLM", "eager", "refused", code="KV202", message="a | b\nc"),
        Row("speech", "c", "CForSpeech", "sdpa", "WRONG", message="it differs"),
    ]
    page = markdown(found, "0")
    assert "| a | AForCausalLM | sdpa | proven and equal | 2 of 3 |" in page
    assert "| b | BForCausalLM | eager | refused (KV202): a \\| b |  |" in page
    assert "WRONG: it differs" in page
