"""Normal form in, what people write out."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
from sympy import And, Eq, Ge, Gt, Integer, Le, Lt, Ne, Not, Or, floor

from kvpass.analysis.expressions import simplify
from kvpass.ir import SCORE, B, H, I, J
from kvpass.report.formula import Leaf, causality, formula

MASK, SEGMENT, BIAS = (sympy.Function(name, integer=True) for name in ("v_arg6_1", "v_arg7_1", "load_bias"))
LEAVES = {
    "v_arg6_1": Leaf("attention_mask", boolean=True),
    "v_arg7_1": Leaf("segment"),
    "load_bias": Leaf("alibi", letters=("h", "j")),
}

TABLE = [
    (sympy.true, "True"),
    (Le(J - I, 0), "j <= i"),
    (Le(J, I), "j <= i"),
    (Lt(J, I), "j < i"),
    (Gt(J, I), "j > i"),
    (Ge(J, I), "j >= i"),
    (Le(I - J, 3), "j > i - 4"),
    (Le(J - I, 2), "j <= i + 2"),
    (Le(J - I, -1), "j < i"),
    (Le(J - I, -3), "j <= i - 3"),
    (Le(I - J, -1), "j > i"),
    (Le(J, 3), "j < 4"),
    (Le(-J, -3), "j >= 3"),
    (Le(I, 5), "i < 6"),
    (Eq(I - J, 2), "j == i - 2"),
    (Ne(J, 0), "j != 0"),
    (And(Le(I - J, 7), Le(J - I, 0)), "(j <= i) & (j > i - 8)"),
    (Or(And(Le(I - J, 7), Le(J - I, 0)), Le(J, 3)), "(j < 4) | ((j <= i) & (j > i - 8))"),
    (Not(And(Le(I - J, 7), Le(J - I, 0)), evaluate=False), "~((j <= i) & (j > i - 8))"),
    (Eq(floor(I / 8) - floor(J / 8), 0), "i // 8 == j // 8"),
    (And(Le(J - I, 0), Eq(floor(I / 8), floor(J / 8))), "(j <= i) & (i // 8 == j // 8)"),
    (Ne(MASK(B, J), 0), "attention_mask[b, j]"),
    (Eq(MASK(B, J), 0), "~attention_mask[b, j]"),
    (Ne(SEGMENT(B, J), 0), "segment[b, j]"),
    (Eq(SEGMENT(B, J), 0), "segment[b, j] == 0"),
    (And(Ne(MASK(B, J), 0), Le(J - I, 0)), "(j <= i) & attention_mask[b, j]"),
    (Eq(SEGMENT(B, I) - SEGMENT(B, J), 0), "segment[b, i] == segment[b, j]"),
    (Le(SEGMENT(B, J) - SEGMENT(B, I), -1), "segment[b, j] <= segment[b, i] - 1"),
    (Le(2 * J - I, 0), "i >= 2*j"),
    (SCORE, "score"),
    (50 * sympy.tanh(SCORE * sympy.Float(0.02)), "50*tanh(0.02*score)"),
    (SCORE + BIAS(B, H, I, J), "score + alibi[h, j]"),
    (sympy.Piecewise((SCORE, Le(J - I, 0)), (Integer(0), True)), "(score if j <= i else 0)"),
]


@pytest.mark.parametrize(("value", "text"), TABLE, ids=[text for _, text in TABLE])
def test_normal_form_reads_as_people_write(value: sympy.Basic, text: str) -> None:
    assert formula(value, LEAVES) == text


@pytest.mark.parametrize(("value", "text"), [row for row in TABLE if row[0] != SCORE and row[0].is_Boolean])
def test_text_means_what_the_predicate_means(value: sympy.Basic, text: str) -> None:
    """The text is Python: it is evaluated beside the predicate on small indices."""
    if value.atoms(sympy.core.function.AppliedUndef):
        tables = {
            "attention_mask": {(0, k): np.bool_(k % 2 == 0) for k in range(12)},
            "segment": {(0, k): k // 3 for k in range(12)},
        }
    else:
        tables = {}
    for i in range(12):
        for j in range(12):
            at = {I: Integer(i), J: Integer(j), B: Integer(0)}
            truth = value.xreplace(at)
            for leaf in truth.atoms(sympy.core.function.AppliedUndef):
                table = tables[LEAVES[leaf.func.__name__].label]
                truth = truth.xreplace({leaf: Integer(int(table[0, int(leaf.args[1])]))})
            said = eval(text, {}, {"i": np.int64(i), "j": np.int64(j), "b": 0, **tables})
            assert bool(said) == bool(simplify(truth)), (i, j)


def test_order_does_not_depend_on_how_it_was_built() -> None:
    parts = [Le(J - I, 0), Le(I - J, 7), Ne(MASK(B, J), 0)]
    texts = {formula(And(*order), LEAVES) for order in (parts, parts[::-1], [parts[1], parts[2], parts[0]])}
    assert texts == {"(j <= i) & (j > i - 8) & attention_mask[b, j]"}


def test_an_unknown_leaf_keeps_its_nodes_name() -> None:
    assert formula(Ne(sympy.Function("v_ne_3", integer=True)(B, J), 0)) == "ne_3[b, j]"


@pytest.mark.parametrize(
    ("support", "words"),
    [
        (Le(J - I, 0), "turns j <= i into d + 1 <= 0: False"),
        (And(Le(I - J, 7), Le(J - I, 0)), "turns j <= i into d + 1 <= 0: False"),
        (And(Le(J - I, -2), Ne(MASK(B, J), 0)), "turns j <= i - 2 into d + 3 <= 0: False"),
        (Eq(J - I, 0), "turns j == i into a contradiction: False"),
        (Or(Le(J - I, 0), Le(J - I, -4)), "turns (j <= i) | (j <= i - 4) into a contradiction: False"),
    ],
)
def test_the_proof_is_told(support: sympy.Basic, words: str) -> None:
    assert causality(support, LEAVES) == f"j = i + 1 + d with d >= 0 {words}"


@pytest.mark.parametrize("support", [sympy.true, Le(J - I, 1), Le(J, 3), Ne(MASK(B, J), 0)])
def test_no_proof_is_told_where_there_is_none(support: sympy.Basic) -> None:
    assert causality(support, LEAVES) == ""
