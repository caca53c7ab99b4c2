"""What a report says of one tiny model of each kind."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from kvpass.report import Report
from kvpass.report.gather import rescaled
from kvpass.report.names import line, spoken
from tests.report.conftest import Records

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
PROVEN = ["causal", "sliding", "mixture", "padded", "unrecognised"]
REFUSED = {
    "bidirectional": ["KV202"],
    "static": ["KV101"],
    "broken": ["KV104", "KV104"],
    "unknown_op": ["KV201"],
}


@pytest.mark.parametrize("kind", PROVEN)
def test_a_causal_model_is_proven(kind: str, records: Records) -> None:
    report = Report.of(records(kind))
    assert report.proven
    assert report.graphs == 1
    assert report.refusals == ()
    assert str(report).startswith("proven: row i of every output depends on the inputs' rows up to i only")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_says_why(kind: str, records: Records) -> None:
    report = Report.of(records(kind))
    assert not report.proven
    assert [refusal.code for refusal in report.refusals] == REFUSED[kind]
    assert report.graphs == len(REFUSED[kind])
    text = str(report)
    assert text.startswith("refused (")
    for refusal in report.refusals:
        assert refusal.message in text
        assert refusal.hint in text


def test_a_refusal_names_the_node_and_the_line(records: Records) -> None:
    (refusal,) = Report.of(records("bidirectional")).refusals
    assert refusal.reason == "DependsOnFuture"
    assert refusal.node == "scaled_dot_product_attention"
    assert "models.py" in refusal.source
    assert "scaled_dot_product_attention(*self.heads(x))" in refusal.source


def test_nothing_compiled_is_not_proven() -> None:
    report = Report.of([])
    assert (report.proven, report.graphs) == (False, 0)
    assert str(report) == "refused: nothing was compiled, so nothing is proved"


@pytest.mark.parametrize(
    ("kind", "masks", "scale"),
    [
        ("causal", ["j <= i"], 0.5),
        ("sliding", ["(j <= i) & (j > i - 4)"], 0.5),
        ("mixture", ["(j <= i) & (j > i - 4)", "(j <= i) & (j > i - 4)", "j <= i"], 0.5),
        ("padded", ["(j <= i) & attention_mask[b, j]"], 1.0),
    ],
)
def test_attention(kind: str, masks: list[str], scale: float, records: Records) -> None:
    attention = Report.of(records(kind)).attention
    assert [entry.mask for entry in attention] == masks
    for entry in attention:
        assert entry.lowering.startswith("C++ ")
        assert (entry.heads, entry.head_size, entry.value_size) == (2, 4, 4)
        assert entry.kv_heads == (1 if kind == "mixture" else 2)
        assert entry.score == "score"
        assert entry.scale == pytest.approx(scale)
        assert entry.proof == "j = i + 1 + d with d >= 0 turns j <= i into d + 1 <= 0: False"
        assert "models.py" in entry.source
        assert entry.node


def test_attention_that_is_not_recognised_is_told_with_its_proof(records: Records) -> None:
    report = Report.of(records("unrecognised"))
    assert report.attention == ()
    (missed,) = report.unrecognised
    assert missed.reason == "the weights are used more than once"
    assert missed.mask == "j <= i"
    assert "False" in missed.proof
    assert [reading.op for reading in report.readings] == ["matmul", "matmul"]
    assert all(reading.mask == "j <= i" for reading in report.readings)
    assert "Attention that runs as it was written, over cached rows" in str(report)


@pytest.mark.parametrize(("kind", "stored"), [("causal", 64), ("sliding", 64), ("mixture", 96), ("padded", 64)])
def test_bytes_per_row_are_keys_and_values(kind: str, stored: int, records: Records) -> None:
    report = Report.of(records(kind))
    assert report.bytes_per_row == stored
    assert report.output_bytes_per_row == 44
    assert sum(slot.bytes_per_row for slot in report.slots) == stored + 44
    assert {slot.dtype for slot in report.slots} == {"float32"}
    kept = [slot for slot in report.slots if not slot.is_output]
    assert {slot.shape for slot in kept} == {(4,) if kind == "mixture" else (2, 4)}


def test_meaningless_rows_and_returned_caches_are_told(records: Records) -> None:
    report = Report.of(records("padded"))
    logits, keys, _ = report.parts[0].outputs
    assert logits.meaningful == "attention_mask[b, i]"
    assert keys.meaningful == "True"
    assert [given.name for given in report.parts[0].inputs] == ["ids", "attention_mask"]
    (hint,) = report.hints
    assert hint.startswith("2 of 3 outputs look like the model's own cache")
    assert "use_cache=False" in hint
    assert "no other row depends on it" in str(report)


def test_repeated_layers_are_counted(records: Records) -> None:
    text = str(Report.of(records("mixture")))
    assert text.count("2 heads over 1 key/value head of size 4") == 2
    assert "2 x 2 heads over 1 key/value head" in text
    assert "6 x [4] float32, 16 bytes" in text


@pytest.mark.parametrize("kind", [*PROVEN, *REFUSED])
def test_json_round_trip(kind: str, records: Records) -> None:
    report = Report.of(records(kind))
    told = report.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["proven"] is report.proven
    assert [entry["mask"] for entry in told["attention"]] == [entry.mask for entry in report.attention]
    assert [entry["code"] for entry in told["refusals"]] == [entry.code for entry in report.refusals]


@pytest.mark.parametrize("kind", ["mixture", "bidirectional"])
def test_text_is_as_it_was(kind: str, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden text; KVPASS_ACCEPT=1 accepts what is said now."""
    monkeypatch.chdir(ROOT)
    text, path = f"{Report.of(records(kind))}\n", GOLDEN / f"explain_{kind}.txt"
    text = re.sub(r"(C\+\+) [0-9a-f]{10}", r"\1 (name)", text)  # the name changes with every word of a kernel
    if os.environ.get("KVPASS_ACCEPT"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['attention_mask']", "attention_mask"),
        ("L['args'][0]", "args[0]"),
        ("L['kwargs']['attention_mask']", "attention_mask"),
        ("L['self']._modules['h']._modules['0']._parameters['weight']", "h.0.weight"),
        ("L['self']._modules['rope']._buffers['inv_freq']", "rope.inv_freq"),
        ("", "arg3_1"),
    ],
)
def test_sources_are_spoken(source: str, name: str) -> None:
    assert spoken(source, "arg3_1") == name


def test_source_lines_are_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert line(f"{tmp_path}/a/model.py:3 in forward: x") == "a/model.py:3 in forward: x"
    assert line("/usr/lib/site-packages/lib/m.py:3 in f: x") == "lib/m.py:3 in f: x"
    assert len(line("m.py:3 in f: " + "x" * 500)) == 110


def test_a_factor_of_the_product_belongs_to_the_scale() -> None:
    import sympy
    import torch

    from kvpass.ir import SCORE, Attention

    def spec(score: sympy.Expr) -> Attention:
        return Attention(2, 2, 4, 4, torch.float32, 2.0, score, sympy.true)

    assert rescaled(spec(SCORE / 4)) == (0.5, SCORE)
    assert rescaled(spec(SCORE / 4 + 1)) == (0.5, SCORE + 1)
    assert rescaled(spec(50 * sympy.tanh(SCORE / 50))) == (2.0, 50 * sympy.tanh(SCORE / 50))
