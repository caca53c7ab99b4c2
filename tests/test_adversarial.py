"""What is not causal is refused by name and still answered; what only looks like it is proven."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kvpass
from kvpass.errors import REFUSALS
from kvpass.frontend.api import recording
from tests.adversarial import BREAK, CASES, NEAR_MISSES, STATIC, Case, Model
from tests.adversarial.base import VOCAB
from tests.property.oracle import check_same, compare

ROWS = 10
FOLDER = Path(__file__).parent / "adversarial"

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_near_miss = pytest.mark.parametrize("model", NEAR_MISSES, ids=lambda model: model.__name__)


def texts(rows: int = ROWS, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, rows), generator=torch.Generator().manual_seed(seed))


def differs(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() > 1e-3)


# --- the suite is what it says it is --------------------------------------------------------------------------


def sees_the_future(model: Model) -> bool:
    """Whether any row changes with a token that comes after it."""
    ids = texts()
    want = model(ids)
    for at in range(1, ROWS):
        other = ids.clone()
        other[:, at] = (other[:, at] + 1) % VOCAB
        if differs(model(other)[:, :at], want[:, :at]):
            return True
    return False


def sees_the_length(model: Model) -> bool:
    """Whether any row changes when the text after it is cut off."""
    ids = texts()
    want = model(ids)
    return any(differs(model(ids[:, :rows]), want[:, :rows]) for rows in range(1, ROWS))


def sees_the_batch(model: Model) -> bool:
    """Whether a text changes with the other texts of its batch."""
    ids = texts()
    other = ids.clone()
    other[1] = (other[1] + 1) % VOCAB
    swapped = ids.clone()
    swapped[0] = (swapped[0] + 1) % VOCAB
    return differs(model(other)[0], model(ids)[0]) or differs(model(swapped)[1], model(ids)[1])


def sees_chance(model: Model) -> bool:
    return differs(model(texts()), model(texts()))


PROBES: dict[str, Callable[[Model], bool]] = {
    "chance": sees_chance,
    "batch": sees_the_batch,
    "future": sees_the_future,
    "length": sees_the_length,
}


@every_case
@torch.no_grad()
def test_case_breaks_what_it_says(case: Case) -> None:
    model = case.build()
    if case.breaks == "nothing":
        assert not any(probe(model) for probe in PROBES.values())
        return
    assert PROBES[case.breaks](model)
    if case.breaks == "length":
        assert not sees_the_future(model)
    if case.breaks != "chance":
        assert not sees_chance(model)


@every_near_miss
@torch.no_grad()
def test_near_miss_is_causal(model: type[Model]) -> None:
    built = Case(model, "future").build()
    assert model.__doc__
    assert {name: probe(built) for name, probe in PROBES.items()} == dict.fromkeys(PROBES, False)


def test_cases_are_many_and_complete() -> None:
    assert len(CASES) >= 30
    assert len({case.name for case in CASES}) == len(CASES)
    known = {refusal.code for refusal in REFUSALS}
    for case in CASES:
        assert case.model.__doc__, case.name
        assert case.codes, case.name
        assert case.codes <= known, case.name


# --- the compiler sees it ------------------------------------------------------------------------------------


def place(source: str) -> tuple[str, int]:
    """File and line of a refusal's source."""
    found = re.search(r"([^\s\"]+\.py)\D+(\d+)", source)
    assert found, f"no file and line in {source!r}"
    return found[1], int(found[2])


def same_in_every_call(model: Model, *, seeded: bool = False) -> kvpass.Cache:
    """Texts that grow, shrink and branch, asked of the compiled and of the plain model."""
    torch._dynamo.reset()
    cache = kvpass.Cache(capacity="4MiB", page_size=4, poison=True)
    fast = kvpass.compile(model, cache=cache)
    ids = texts(20)
    branched = ids.clone()
    branched[:, 4] = (branched[:, 4] + 1) % VOCAB
    for call in (ids[:, :9], ids[:, :10], ids[:, :14], ids[:, :6], branched[:, :12], ids[:, :11], ids):
        if seeded:
            torch.manual_seed(1)
            want = model(call)
            torch.manual_seed(1)
            compare(fast(call), want)
        else:
            check_same(fast, model, [call])
    return cache


@every_case
@torch.no_grad()
def test_case_is_refused_by_name_and_answered(case: Case) -> None:
    with recording() as found:
        same_in_every_call(case.build(), seeded=case.breaks == "chance")
    report = kvpass.Report.of(found[:1])
    assert not report.proven
    assert report.refusals
    refusal = report.refusals[0]
    assert refusal.code in case.codes, str(report)
    assert refusal.message
    assert refusal.hint
    if refusal.code == BREAK:  # said of a graph as a whole
        return
    assert refusal.node or refusal.code == STATIC
    file, line = place(refusal.source)
    first = inspect.getsourcelines(case.model)[1]
    last = first + len(inspect.getsourcelines(case.model)[0])
    assert Path(file).name in {Path(inspect.getfile(case.model)).name, "base.py"}, refusal.source
    assert Path(file).name == "base.py" or first <= line <= last, refusal.source


@pytest.mark.parametrize("case", CASES[::9], ids=lambda case: case.name)
def test_explain_says_the_same(case: Case) -> None:
    report = kvpass.explain(case.build(), texts())
    assert not report.proven
    assert report.refusals[0].code in case.codes
    assert report.refusals[0].code in str(report)


@every_near_miss
def test_near_miss_is_proven(model: type[Model]) -> None:
    torch._dynamo.reset()
    report = kvpass.explain(Case(model, "future").build(), texts())
    assert report.proven, str(report)
    assert not report.refusals


@every_near_miss
@torch.no_grad()
def test_near_miss_is_exact_and_cached(model: type[Model]) -> None:
    cache = same_in_every_call(Case(model, "future").build())
    assert cache.stats().rows_reused > 0
