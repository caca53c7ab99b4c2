"""What people write is proven, cached and computed by kernels, whatever the history: the table of `tests.coverage`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvpass
from kvpass.frontend.api import recording
from kvpass.runtime import steps
from kvpass.runtime.keys import Keys
from tests.coverage import MODELS, VOCAB, Decoder, build
from tests.coverage.masks import Prefix
from tests.coverage.scores import LearnedQueries
from tests.property.oracle import Mismatch, check_same

Compile = Callable[[Decoder, kvpass.Cache], Any]


def texts(rows: int, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, rows), generator=torch.Generator().manual_seed(seed))


def compiled(model: Decoder, cache: kvpass.Cache) -> Any:
    return kvpass.compile(model, cache=cache, tiers="compiled")


def history(batches: bool) -> list[Tensor]:
    """Growing row by row and in steps, shorter, a branch, the longest again, another text; perhaps twice as many."""
    ids, other = texts(20), texts(13, seed=1)
    branched = ids.clone()
    branched[:, 5] = (branched[:, 5] + 1) % VOCAB
    grown = [ids[:, :9], ids[:, :10], ids[:, :14], ids[:, :6], branched[:, :12], ids]
    wider = [torch.cat((other, branched[:, :13])), torch.cat((ids, branched))[:, :14]]
    return [*grown, other, *(wider if batches else ())]


def plain(answer: Any) -> Any:
    """An answer as lists and dictionaries."""
    return dataclasses.asdict(answer) if dataclasses.is_dataclass(answer) and not isinstance(answer, type) else answer


def answers(model: Decoder, compile_model: Compile = compiled) -> tuple[list[int], kvpass.Report]:
    """Take the history; returns how many rows were computed in each call, and what is reported of the model."""
    torch._dynamo.reset()
    cache = kvpass.Cache(capacity="8MiB", page_size=4, poison=True)
    work = []
    with torch.no_grad(), recording() as found:
        fast = compile_model(model, cache)
        for ids in history(model.batches):
            before = cache.stats().rows_computed
            args = [ids, *model.arguments(ids)]
            check_same(lambda *a: plain(fast(*a)), lambda *a: plain(model(*a)), args, model.meaningful(ids))
            work.append(cache.stats().rows_computed - before)
    return work, kvpass.Report.of(found)


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_is_proven_cached_and_computed_by_kernels(kind: type[Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "FEW", 64)
    model = build(kind)
    work, report = answers(model)
    if kind.refused:
        assert {refusal.code for refusal in report.refusals} == {kind.refused}, str(report)
        assert work == [0] * len(work)
        return
    assert report.proven, str(report)
    tail = kind.tail
    shrunk = 2 * tail if kind.shrunk is None else kind.shrunk
    assert work[:4] == [18, 2 * max(1, tail), 2 * max(4, tail), shrunk], "work is proportional to what is new"
    assert work[5] == 2 * 6
    kernels = kind.layers if kind.kernels is None else kind.kernels
    lowerings = [attention.lowering for attention in report.attention]
    assert [lowering[:3] for lowering in lowerings] == ["C++"] * kernels * report.graphs, str(report)
    if kind.bytes_per_row is not None:
        assert report.bytes_per_row == kind.bytes_per_row * report.graphs


PROMPTS = [
    pytest.param(kind, marks=() if k % 14 == 0 else pytest.mark.soak, id=kind.__name__)
    for k, kind in enumerate(kind for kind in MODELS if not kind.refused)
]


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_compiled(kind: type[Decoder], caplog: pytest.LogCaptureFixture) -> None:
    """The same histories, in which two calls of three bring more rows than products of few rows are made for."""
    answers(build(kind), lambda model, cache: kvpass.compile(model, cache=cache, tiers="compiled", verify=False))
    assert not [line for line in caplog.messages if "could not be compiled" in line]


def test_a_model_that_is_not_what_was_compiled_is_noticed() -> None:
    """The table can fail: another model answers."""
    kind = MODELS[0]
    other = build(kind)
    with torch.no_grad():
        other.head.weight[0, 0] += 1.0
    with pytest.raises(Mismatch):
        answers(build(kind), lambda model, cache: kvpass.compile(other, cache=cache))


def test_models_say_what_they_are() -> None:
    assert len(MODELS) >= 60
    assert len({kind.__name__ for kind in MODELS}) == len(MODELS)
    assert all(kind.__doc__ for kind in MODELS)


def test_a_prefix_is_part_of_what_a_row_is_known_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the digest of the prefix a row is taken for one of a text whose later rows of the prefix were others."""

    def constant(keys: Keys, args: Any, table: Any, lead: int) -> Any:
        return np.zeros((*table.shape[:2], 32), np.uint8)

    monkeypatch.setattr(Keys, "_prefixes", constant)
    with pytest.raises(Mismatch):
        answers(build(Prefix), lambda model, cache: kvpass.compile(model, cache=cache, verify=False))


def test_explain_says_what_a_prefix_does() -> None:
    model, ids = build(Prefix), texts(12)
    report = kvpass.explain(model, ids, *model.arguments(ids))
    assert str(report).startswith(
        "proven: row i of every output depends on the inputs' rows up to i, and on those below"
    )
    assert "every row's key" in report.attention[0].proof


def test_queries_that_are_repeated_for_each_text() -> None:
    """Heads of a batch of fixed size, whichever of the two axes the recogniser takes the copies for."""
    work, report = answers(build(LearnedQueries))
    assert report.proven, str(report)
    assert work == [18, 2, 8, 2, 14, 12, 26, 4, 4]
