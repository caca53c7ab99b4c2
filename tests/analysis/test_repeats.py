"""Layers that are built alike are understood once, and no name of one stands in another."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor
from torch.nn.functional import linear, softmax
from torch.utils._python_dispatch import TorchDispatchMode

from kvpass.analysis import repeats, sweep
from kvpass.analysis.buffers import closed_form
from kvpass.analysis.facts import leaf_name
from kvpass.analysis.sweep import Analyzed, analyze
from kvpass.ir import Captured
from kvpass.transforms import plan, recognise
from tests.analysis.tools import BATCH, ROWS, captured_of

WIDTH = 4


def weights(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator)) for _ in range(number)]


def layer(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention under a mask that the layer makes itself, and a choice by data."""
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    scores = (linear(x, q) @ linear(x, k).mT).masked_fill(later, float("-inf"))
    x = x + softmax(scores, -1) @ linear(x, v)
    return x + (linear(x, q).argmax(-1, keepdim=True) == linear(x, k).argmax(-1, keepdim=True))


def stack(layers: int) -> Captured:
    def model(x: Tensor, *given: Tensor) -> Tensor:
        for n in range(layers):
            x = layer(x, *given[3 * n : 3 * n + 3])
        return x

    return captured_of(model, torch.randn(BATCH, ROWS, WIDTH), *weights(3 * layers))


@pytest.fixture(scope="module")
def stacks() -> dict[int, Captured]:
    return {layers: stack(layers) for layers in (2, 3, 4)}


def test_rules_run_once_for_all_layers(stacks: dict[int, Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Counter[str] = Counter()

    def counting(rule: Callable[..., Any]) -> Callable[..., Any]:
        def counted(op: Any) -> Any:
            ran[str(op.node.target)] += 1
            return rule(op)

        return counted

    monkeypatch.setattr(sweep, "RULES", {target: counting(rule) for target, rule in sweep.RULES.items()})
    found = {}
    for layers, captured in stacks.items():
        ran.clear()
        analyze(captured)
        found[layers] = dict(ran)
    own = {op: found[3][op] - times for op, times in found[2].items() if found[3][op] != times}
    assert own == {"aten.argmax.default": 2, "aten.eq.Tensor": 1, "aten.add.Tensor": 1}  # closed forms of one layer
    assert found[4] == {op: times + 2 * own.get(op, 0) for op, times in found[2].items()}


def test_facts_are_those_of_each_node_alone(stacks: dict[int, Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    shared = analyze(stacks[3])
    fresh = count()
    monkeypatch.setattr(repeats, "comparable", lambda _: next(fresh))
    alone = analyze(stacks[3])
    assert alone.steps == shared.steps
    assert len(set(alone.kinds.values())) == len(alone.steps) > len(set(shared.kinds.values()))


def test_one_name_does_not_stand_for_another() -> None:
    """Two choices by data of one kind: their entries are not the same."""

    def model(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        one, other = linear(x, a).argmax(-1), linear(x, b).argmax(-1)
        return one, other, one == other, one == one.clone(), x.mean(1), (x + 0).mean(1)

    analyzed = analyze(captured_of(model, torch.randn(BATCH, ROWS, WIDTH), *weights(2)))
    one, other, differ, same, mean, mean_again = analyzed.outputs
    for node in (one, other):
        (leaf,) = analyzed.fact(node).expr.atoms(AppliedUndef)  # type: ignore[union-attr]
        assert leaf.func.__name__ == leaf_name(node.name)
    assert analyzed.fact(differ).expr not in (sympy.true, sympy.false)
    assert analyzed.fact(same).expr == sympy.true
    for node in (mean, mean_again):
        assert analyzed.fact(node).whole is not None
        assert {cause.node for _, cause in analyzed.fact(node).tainted()} == {node.name}


def test_arguments_that_are_equal_in_python_only() -> None:
    values = [1, 1.0, True, 0.0, -0.0, 0, False, None, "1", [1], (1,), [1.0], [[1]], [None], torch.float32, "float32"]
    values += [sympy.Integer(1), sympy.Float(1.0), sympy.Symbol("s"), sympy.Symbol("s", integer=True)]
    assert len({repeats.comparable(value) for value in values}) == len(values)
    assert repeats.comparable([1, (2.5, None)]) == repeats.comparable([1, (2.5, None)])


def test_arguments_and_sizes_are_part_of_the_kind() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        return x.sum(1), x.sum(2), x.sum(2, keepdim=True), x * 2, x * 2.0, x + 2, x[:, -1], x[:, -2], x[:, :-1]

    analyzed = analyze(captured_of(model, torch.randn(BATCH, ROWS, WIDTH)))
    kinds = [analyzed.kinds[node] for node in analyzed.outputs]
    assert len(set(kinds)) == len(kinds)


def test_no_pass_walks_the_graph_once_a_layer(stacks: dict[int, Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    """To look one value up."""
    walks = Counter[str]()

    class Watched(dict[Any, Any]):
        def __iter__(self) -> Any:
            walks["steps"] += 1
            return super().__iter__()

        def items(self) -> Any:
            walks["steps"] += 1
            return super().items()

    def walked(captured: Captured) -> int:
        analyzed = analyze(captured)
        watched: Analyzed = replace(analyzed, steps=Watched(analyzed.steps))
        walks.clear()
        assert len(plan.plan(watched).slots) > 0
        assert recognise.recognise(watched)[0]
        return walks["steps"]

    assert walked(stacks[2]) == walked(stacks[4])


def test_of_a_weight_only_the_edge_is_read() -> None:
    most = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                most = max(most, out.numel())
            return out

    for weight in (torch.randn(64, 64), torch.randn(64, 32).bfloat16(), torch.randint(9, (64, 64))):
        with Largest():
            assert closed_form(weight, lambda: sympy.nan) is None
    assert most < 64 * 4
