"""Every stage in every format, and where it is written to."""

from __future__ import annotations

import json
import re
import stat
import xml.etree.ElementTree as ET
from argparse import Namespace
from pathlib import Path

import pytest

from kvpass.errors import InputError
from kvpass.report.cli import FORMATS, STAGES, dump_command, dumped, explain_command
from kvpass.report.compare import Change, compare
from kvpass.report.files import deliver
from kvpass.report.layers import FOLD, Repeat, folded, repeats
from kvpass.report.layout import layered
from kvpass.report.parts import incremental_of
from kvpass.report.report import Report
from kvpass.report.stages import Look, incremental_text
from kvpass.report.view import Graph, Op
from tests.report.conftest import Records

SVG = "{http://www.w3.org/2000/svg}"
# What each stage of a model with a sliding window must mention.
WORDS = {
    ("captured", "text"): ["scaled_dot_product_attention", "ids: int64 [2, S]", "# float32 [2, S, 8]", "k.weight"],
    ("facts", "text"): ["(j <= i) & (j > i - 4)", "row", "ids[b, i]"],
    ("plan", "text"): ["64 bytes per row and sequence", "Rebuilt from the inputs", "[2, 2, S, 4], 32 bytes per row"],
    ("incremental", "text"): ["before", "after", "append(pool_0", "N = S - P", "attention("],
    ("captured", "dot"): ["digraph kvpass {", "scaled_dot_product_attention", '"0/ids" -> '],
    ("facts", "dot"): ["(j <= i) & (j > i - 4)"],
    ("plan", "dot"): ["32 bytes per row"],
    ("incremental", "dot"): ["cluster_0", "cluster_1", "#d3f0d6", "append"],
    ("captured", "svg"): ["scaled_dot_product_attention"],
    ("facts", "svg"): ["(j &lt;= i) &amp; (j &gt; i - 4)"],
    ("plan", "svg"): ["stored in the cache"],
    ("incremental", "svg"): ["before: all S rows", "after: N = S - P new rows", "added"],
}


@pytest.mark.parametrize(("stage", "form"), WORDS)
def test_stage_and_format(stage: str, form: str, records: Records) -> None:
    text = dumped(records("sliding"), stage, form, Look())
    for word in WORDS[stage, form]:
        assert word in text


@pytest.mark.parametrize("stage", STAGES)
def test_json(stage: str, records: Records) -> None:
    told = json.loads(dumped(records("sliding"), stage, "json", Look()))
    assert (told["schema"], told["stage"]) == (1, stage)
    (graph,) = told["graphs"]
    assert graph["proven"]
    if stage in ("captured", "facts"):
        nodes = {node["name"]: node for node in graph["nodes"]}
        assert nodes["ids"]["shape"] == "[2, S]"
        assert all(set(node["operands"]) <= set(nodes) for node in nodes.values())
        assert "k.weight" in graph["weights"]
    if stage == "facts":
        attention = nodes["scaled_dot_product_attention"]["fact"]
        assert (attention["depends"], attention["axes"]) == ("row", "[2, 2, S, 4]")
        assert nodes["ids"]["fact"]["form"] == "ids[b, i]"
    if stage == "plan":
        assert graph["bytes_per_row"] == 64
        assert graph["attention"][0]["mask"] == "(j <= i) & (j > i - 4)"
    if stage == "incremental":
        after = {node["name"] for node in graph["after"]["nodes"]}
        assert {row["after"] for row in graph["rows"]} - {None} == after
        assert {row["change"] for row in graph["rows"]} >= {"same", "changed", "removed", "added"}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["bidirectional", "static", "broken", "unknown_op"])
def test_a_refused_graph_is_shown_as_far_as_it_came(kind: str, form: str, stage: str, records: Records) -> None:
    seen = kind in ("bidirectional", "unknown_op") and stage in ("captured", "facts")
    if form in ("dot", "svg") and not seen:
        with pytest.raises(InputError, match=f"there is no {stage} graph to draw: "):
            dumped(records(kind), stage, form, Look())
        return
    text = dumped(records(kind), stage, form, Look())
    if seen:
        assert "embedding" in text
    else:
        assert "KV" in text


def test_facts_stop_where_the_sweep_stopped(records: Records) -> None:
    text = dumped(records("unknown_op"), "facts", "text", Look())
    assert "-inf outside j <= i" in text
    assert text.splitlines()[-1].startswith("# KV201: no transfer rule for aten.special_bessel_j0.default")


def test_every_line_of_both_graphs_is_in_the_comparison(records: Records) -> None:
    incremental = incremental_of(records("causal")[0])
    assert incremental is not None
    both = compare(incremental)
    assert [row.before for row in both.rows if row.before] == list(both.before.ops)
    after = [row.after for row in both.rows if row.after]
    assert sorted(op.name for op in after) == sorted(op.name for op in both.after.ops)
    by_op = {row.before.op: row for row in both.rows if row.before}
    assert by_op["softmax"].change is Change.REMOVED
    assert by_op["masked_fill"].change is Change.REMOVED
    assert by_op["linear"].change is Change.SAME
    added = {row.after.op for row in both.rows if row.change is Change.ADDED and row.after}
    assert {"append", "read"} <= added


def test_columns_fit_and_colour_is_asked_for(records: Records) -> None:
    incremental = incremental_of(records("causal")[0])
    assert incremental is not None
    plain = incremental_text(incremental, Look(width=100))
    assert max(map(len, plain.splitlines())) <= 100
    assert "\x1b" not in plain
    coloured = incremental_text(incremental, Look(width=100, colour=True))
    assert "\x1b[32m" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain


def test_boxes_do_not_overlap_and_text_stays_inside(records: Records) -> None:
    root = ET.fromstring(dumped(records("mixture"), "incremental", "svg", Look()))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    clusters = [
        g
        for g in root.iter(f"{SVG}g")
        if (g.get("transform") or "").startswith("translate(") and g.find(f"{SVG}path") is not None
    ]
    assert len(clusters) == 2
    for cluster in clusters:
        left, top = map(float, re.findall(r"[\d.]+", cluster.get("transform", "")))
        boxes = []
        for group in cluster.iter(f"{SVG}g"):
            rect = group.find(f"{SVG}rect")
            if rect is None:
                continue
            x, y, w, h = (float(rect.get(key, 0)) for key in ("x", "y", "width", "height"))
            assert x >= 0
            assert left + x + w <= width
            assert top + y + h <= height
            for text in group.iter(f"{SVG}text"):
                assert float(text.get("x", 0)) + 6.63 * len(text.text or "") <= x + w
                assert y < float(text.get("y", 0)) < y + h
            boxes.append((x, y, x + w, y + h))
        for k, a in enumerate(boxes):
            for b in boxes[k + 1 :]:
                assert a[2] <= b[0] + 0.2 or b[2] <= a[0] + 0.2 or a[3] <= b[1] + 0.2 or b[3] <= a[1] + 0.2


# -- folding and layout ---------------------------------------------------------------------------------------------


def test_repeated_layers_are_found() -> None:
    layer = [f"op{k}" for k in range(7)]
    assert repeats(["in", *layer * 5, "out"]) == Repeat(1, 7, 5)
    assert repeats(["a", "b", "c"]) is None
    assert repeats([]) is None


def test_a_fold_stands_where_the_layers_stood() -> None:
    names = ["x", "a", "b", "c", "y"]
    graph = Graph(tuple(Op(n, "op", operands=(names[k - 1],) if k else ()) for k, n in enumerate(names)))
    shown = folded(graph, {"b", "c"}, "2 more")
    assert [(op.name, op.operands) for op in shown.ops] == [("x", ()), ("a", ("x",)), (FOLD, ("a",)), ("y", (FOLD,))]


def test_a_fold_reads_what_is_computed_late() -> None:
    """A line of a later layer that needs no earlier one stands first in the order of execution."""
    graph = Graph(
        (Op("late", "op"), Op("x", "op"), Op("use", "op", operands=("x", "late")), Op("y", "op", operands=("use",)))
    )
    shown = folded(graph, {"late", "use"}, "1 more")
    assert [(op.name, op.operands) for op in shown.ops] == [("x", ()), (FOLD, ("x",)), ("y", (FOLD,))]


def test_a_layout_keeps_order_and_distance() -> None:
    sizes = dict.fromkeys("abcdef", (40.0, 20.0))
    arrows = [("a", "c"), ("b", "c"), ("a", "f"), ("c", "d"), ("d", "e"), ("e", "f")]
    placed = layered(sizes, arrows)
    y = {name: place[1] for name, place in placed.centres.items()}
    assert all(y[a] < y[b] for a, b in arrows)
    assert abs(placed.centres["a"][0] - placed.centres["b"][0]) >= 40
    (long,) = [points for a, b, points in placed.routes if (a, b) == ("a", "f")]
    assert len(long) == 3
    assert layered({}, []).height == 0


# -- the commands ---------------------------------------------------------------------------------------------------


def space(**fields: str | None) -> Namespace:
    return Namespace(**fields)


@pytest.mark.parametrize(("kind", "code"), [("causal", 0), ("bidirectional", 2), ("broken", 2)])
def test_exit_codes(kind: str, code: int, records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain_command(records(kind), space()) == code
    assert dump_command(records(kind), space(stage=None, format="text", output=None)) == code
    assert capsys.readouterr().err == ""


def test_explain_as_json(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain_command(records("causal"), space(format="json")) == 0
    assert json.loads(capsys.readouterr().out)["proven"] is True


def test_a_file_is_written_whole(records: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "graph.svg"
    assert dump_command(records("causal"), space(stage="incremental", format="svg", output=str(target))) == 0
    assert target.read_text().startswith("<svg")
    assert [entry.name for entry in tmp_path.iterdir()] == ["graph.svg"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o400
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["missing/graph.txt", "folder"])
def test_a_path_that_cannot_be_written(
    where: str, records: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / where
    assert dump_command(records("causal"), space(stage="plan", format="text", output=str(path))) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"kvpass: cannot write {path}: ")
    assert err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "old.txt"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="No space left"):
        deliver("new", str(target))
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.txt"]


def test_nothing_to_draw_is_one_sentence(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    assert dump_command(records("static"), space(stage="plan", format="svg", output=None)) == 1
    err = capsys.readouterr().err
    assert err.startswith("kvpass: there is no plan graph to draw: the graph was captured for one fixed length")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("stage", "form"), [("plans", "text"), ("plan", "png")])
def test_an_unknown_stage_or_format(stage: str, form: str, records: Records) -> None:
    with pytest.raises(InputError, match=r"there is no (stage|format) '(plans|png)'; there are "):
        dumped(records("causal"), stage, form, Look())


def test_kernels(records: Records) -> None:
    """Each kernel once, as it is compiled."""
    text = dumped(records("causal"), "kernels", "text", Look())
    assert text.startswith("// attention heads=")
    assert text.count("// attention heads=") == 1
    data = json.loads(dumped(records("causal"), "kernels", "json", Look()))
    assert [kernel["source"] for kernel in data["kernels"]] == [text]
    found = Report.of(records("mixture")).attention
    assert len(found) > len({entry.lowering for entry in found}) > 1
    text = dumped(records("mixture"), "kernels", "text", Look())
    assert text.count("// attention heads=") == len({entry.lowering for entry in found})
    with pytest.raises(InputError, match="svg"):
        dumped(records("causal"), "kernels", "svg", Look())
    with pytest.raises(InputError, match="no kernels"):
        dumped(records("static"), "kernels", "text", Look())
