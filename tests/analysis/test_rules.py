"""Every transfer rule against brute force: perturb a row, see which entries change."""

from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvpass import errors
from kvpass.analysis.facts import Kind
from kvpass.analysis.sweep import Analyzed, analyze
from kvpass.analysis.table import RULES, Op, Out
from kvpass.ir import Captured
from tests.analysis import overloads
from tests.analysis.claims import check, kind_of
from tests.analysis.programs import SELF, Case, Env, draw
from tests.analysis.programs_layout import LAYOUT
from tests.analysis.tools import analysis_of, captured_of, outputs_of, pruned

aten = torch.ops.aten
CASES: dict[str, Case] = SELF | LAYOUT

UNSOUND: dict[str, str] = {}
UNSOUND_OVERLOADS: dict[Any, str] = {}
BY_PROGRAM = (aten.clip.default, aten.clamp.default, aten.masked_fill.Tensor)
NOT_RUN: dict[Any, str] = {
    **dict.fromkeys(
        (aten.flatten.using_ints, aten.numpy_T.default, aten.mT.default, aten.movedim.int), "traced as others"
    ),
    **dict.fromkeys(
        (
            aten.randn_like.default, aten.randint_like.default, aten.bernoulli.default, aten.bernoulli.p,
            aten.multinomial.default, aten.normal_functional.default,
        ),
        "one rule with rand_like and randint: chance, whatever the operands",
    ),
    **dict.fromkeys(
        (aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default), "one rule with softmax"
    ),
    **dict.fromkeys(
        (aten.native_dropout.default, aten.alpha_dropout.default, aten.feature_dropout.default), "as dropout"
    ),
    **overloads.BY_HAND,
}  # fmt: skip


@cache
def everything() -> Captured:
    """All programs in one graph: tracing is what costs."""

    def together(*inputs: torch.Tensor) -> list[Any]:
        env = Env(*inputs)
        return [case.program(env) for case in CASES.values()]

    return captured_of(together, *draw())


@cache
def analyzed(name: str) -> Analyzed | None:
    """None where the program is refused."""
    graph = everything()
    try:
        return analyze(pruned(graph, outputs_of(graph)[list(CASES).index(name)]))
    except errors.Refusal:
        return None


def kind(found: Analyzed | None) -> str:
    return "refused" if found is None else kind_of(found.fact(found.outputs[0]))


def marked(names: dict[Any, Any], reasons: dict[Any, str]) -> list[Any]:
    """Parameters, those with a known defect marked as failing."""
    return [
        pytest.param(n, id=str(n), marks=[pytest.mark.xfail(strict=True, reason=reasons[n])] if n in reasons else [])
        for n in names
    ]


@pytest.mark.parametrize("name", marked(CASES, UNSOUND))
def test_fact_is_sound_and_as_strong_as_expected(name: str) -> None:
    found = analyzed(name)
    problems = [] if found is None else check(found, draw())
    assert [str(p) for p in problems] == []
    assert kind(found) == CASES[name].kind


@pytest.mark.parametrize("target", marked(dict.fromkeys(overloads.pointwise()), UNSOUND_OVERLOADS))
def test_pointwise_overload_is_sound(target: Any) -> None:
    assert [str(p) for p in overloads.problems() if p.target is target] == []
    assert target in BY_PROGRAM or overloads.graph()[1][target], "no operands that it takes"


def test_every_rule_is_exercised_or_excused() -> None:
    run = {n.target for graph in (everything(), overloads.graph()[0]) for n in graph.module.graph.nodes}
    numbers = {t for t in RULES if overloads.is_about_numbers(t) and t not in run}
    assert set(RULES) - run - numbers == set(NOT_RUN) - run
    assert all(RULES[t].__module__.endswith(("pointwise", "factories", "layout", "reductions")) for t in numbers)


@pytest.mark.parametrize("axes", [((1, 1), (1, 2)), ((1,), ())])
def test_roll_of_one_text(axes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    found = analysis_of(lambda x: x.roll(*axes), draw(1)[0])
    assert kind(found) in ("whole", "refused")


@pytest.mark.parametrize("factor", [0, 1])
def test_a_mask_that_is_looked_up_for_each_text(factor: int) -> None:
    """Of a batch of two, an axis of two entries that are alike meets the batch."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        text, j = torch.arange(2)[:, None, None, None], torch.arange(x.shape[1])
        seen = torch.ones(*x.shape[:2], dtype=torch.bool)[text, j] & (j <= j[:, None])
        mask = torch.where(seen, 0.0, -1e9) + (j - factor * text).sin()
        return scaled_dot_product_attention(*[x.float()[:, None]] * 3, attn_mask=mask)

    assert kind(analysis_of(attend, draw(2)[0])) == ("batch" if factor else "row")


# -- the checker itself ---------------------------------------------------------------------------------------------


def rowwise(op: Op) -> Out:
    """A rule that says of any op that its entries are those of its operand."""
    x = op.operands[0]
    return Out([list(d) for d in x.dims][: len(op.shape)], op.gather(), x.ghosts)


def sum_is_harmless(op: Op) -> Out:
    x, parts = op.operands[0], op.gather()
    parts.deps = {d for d in parts.deps if op.scope.atoms[d].kind is not Kind.SEQ}
    return Out([x.dims[0], x.dims[2]], parts, x.ghosts)


@pytest.mark.parametrize(
    ("name", "target", "rule"),
    [
        ("flip_rows", aten.flip.default, rowwise),
        ("flip_batch", aten.flip.default, rowwise),
        ("roll_rows", aten.roll.default, rowwise),
        ("softmax_unmasked", aten.softmax.int, rowwise),
        ("sum_rows", aten.sum.dim_IntList, sum_is_harmless),
        ("sort_rows", aten.sort.default, lambda op: [rowwise(op), rowwise(op)]),
        ("cumsum_batch", aten.cumsum.default, rowwise),
        ("renorm_sound", aten.renorm.default, rowwise),
        ("group_norm_rows", aten.group_norm.default, rowwise),
    ],
)
def test_checker_refutes_a_wrong_rule(name: str, target: Any, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = everything()
    monkeypatch.setitem(RULES, target, rule)
    assert check(analyze(pruned(graph, outputs_of(graph)[list(CASES).index(name)])), draw())
