"""The oracle is tested too: every planted fault is seen, and what is right passes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kvpass
from kvpass.frontend.api import recording
from tests.models import Config, Transformer, build, make_call
from tests.models.config import LAST_K
from tests.models.draw import random_config
from tests.property import plants, standin
from tests.property.fast import unverified
from tests.property.history import STEPS, draw_steps, run_history
from tests.property.machine import run_machine
from tests.property.oracle import Mismatch, Model, check_same, compare, identical
from tests.property.session import CacheLike, NoReuse
from tests.spellings import CAUSAL_ONLY

TEXT = tuple((5 * i * i + 3 * i) % 23 for i in range(30))


def call_both(model: Transformer, fast: Model) -> None:
    call = make_call(model.config, [TEXT, TEXT[::-1]])
    with torch.no_grad():
        check_same(fast, model, call.args, call.rows)


# --- comparison ------------------------------------------------------------------------------------------------------

ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    "got",
    [
        pytest.param(ONE + 1e-3, id="value"),
        pytest.param(ONE.double(), id="dtype"),
        pytest.param(ONE[:1], id="broadcastable shape"),
        pytest.param(ONE.flatten(), id="shape"),
        pytest.param(ONE * math.nan, id="nan"),
        pytest.param(ONE * math.inf, id="inf"),
        pytest.param((ONE,), id="tuple"),
        pytest.param([ONE], id="list"),
        pytest.param({"logits": ONE}, id="dict"),
        pytest.param(None, id="none"),
        pytest.param(ONE.clone().requires_grad_(), id="gradient"),
    ],
)
def test_compare_sees_every_difference(got: Any) -> None:
    with pytest.raises(Mismatch):
        compare(got, ONE)
    with pytest.raises(Mismatch):
        compare((ONE, got), (ONE, ONE))
    with pytest.raises(Mismatch):
        compare(ONE, got)


def test_compare_takes_what_is_equal() -> None:
    nan = torch.tensor([1.0, math.nan])
    compare({"a": (nan, 3)}, {"a": (nan.clone(), 3)})
    compare(ONE + 1e-6, ONE)
    assert identical(nan, nan.clone())
    assert not identical(ONE + 1e-7, ONE)


def test_only_meaningful_rows_are_compared() -> None:
    want = torch.zeros(2, 4, 3)
    rows = torch.ones(2, 4, dtype=torch.bool)
    rows[1, :2] = False
    got = want.clone()
    got[1, :2] = math.nan
    compare(got, want, rows)
    compare(got[:, -3:], want[:, -3:], rows)
    got[1, 2] = 1.0
    with pytest.raises(Mismatch, match=r"by up to 1;"):
        compare(got, want, rows)


def test_an_argument_that_was_written_to_is_seen() -> None:
    model = build(Config())

    def writes(ids: Tensor) -> Any:
        answer = model(ids)
        ids.zero_()
        return answer

    with pytest.raises(Mismatch, match="argument"):
        call_both(model, writes)


# --- faults in the answer --------------------------------------------------------------------------------------------


# One layer that returns its last row only has no future to see, and `is_causal` has no mask to shift. In bfloat16 a
# single key of many may drown in the rounding, so nothing is claimed there.
DRAWN = [random_config(seed, output="all") for seed in range(50)]
MASKED = [
    config for config in DRAWN if config.spelling not in CAUSAL_ONLY and config.width > 1 and config.dtype != "bfloat16"
]


@pytest.mark.parametrize("config", MASKED, ids=repr)
@pytest.mark.parametrize("kind", [standin.ShiftedMask, standin.LostKey])
def test_wrong_mask_is_seen_in_every_model(kind: type[Transformer], config: Config) -> None:
    model = build(config)
    call_both(model, model)
    with pytest.raises(Mismatch):
        call_both(model, standin.like(model, kind))


@pytest.mark.parametrize("position", ["learned", "sinusoid_computed", "rotary_half", "rotary_interleaved"])
def test_wrong_position_is_seen(position: Any) -> None:
    model = build(Config(position=position))
    with pytest.raises(Mismatch):
        call_both(model, standin.like(model, standin.ShiftedPosition))


@pytest.mark.parametrize("output", ["all", "last", "last_k", "tuple", "dict"])
def test_swapped_rows_are_seen(output: Any) -> None:
    model = build(Config(output=output))
    with pytest.raises(Mismatch):
        call_both(model, standin.like(model, standin.SwappedRows))


# --- faults in a history ---------------------------------------------------------------------------------------------


def right(model: Transformer) -> tuple[Model, CacheLike]:
    memo = standin.Memo(model, shortest=LAST_K if model.config.output == "last_k" else 2)
    return memo, memo


def with_fault(fault: Callable[[Transformer], Model], model: Transformer) -> tuple[Model, CacheLike]:
    memo = standin.Memo(fault(model))
    return memo, memo


def test_histories_accept_a_perfect_cache() -> None:
    for seed in range(20):
        run_history(random_config(seed), right, draw_steps(seed, 30))


def test_every_step_is_drawn() -> None:
    drawn = {step for seed in range(40) for step in draw_steps(seed, 30)}
    assert drawn == set(STEPS)


def forgets(model: Transformer) -> tuple[Model, CacheLike]:
    memo = standin.Memo(model, forgets=True)
    return memo, memo


def test_a_compiler_that_recomputes_everything_is_seen() -> None:
    with pytest.raises(NoReuse, match="6 rows were computed where 1 of 6 are new"):
        run_history(Config(), forgets, ["repeat", "grow_1"])


def test_the_state_machine_accepts_a_perfect_cache() -> None:
    run_machine(right)


@pytest.mark.parametrize(
    "fault", [standin.Frozen, standin.Aliasing, standin.Swallowing, partial(standin.like, kind=standin.SwappedRows)]
)
def test_the_state_machine_sees_a_fault(fault: Callable[[Transformer], Model]) -> None:
    with pytest.raises(Mismatch) as caught:
        run_machine(partial(with_fault, fault))
    assert "model: build(Config(" in "".join(caught.value.__notes__)


FAULTS: list[tuple[str, Callable[[Transformer], Model], list[str]]] = [
    ("answers alias each other", standin.Aliasing, ["repeat", "scribble"]),
    ("an answer is overwritten by the next", standin.SharedBuffer, ["grow_1", "fresh_7"]),
    ("stale weights after add_", standin.Frozen, ["repeat", "mutate_add"]),
    ("stale weights after data.mul_", standin.Frozen, ["repeat", "mutate_data"]),
    ("stale weights after data =", standin.Frozen, ["repeat", "mutate_replace"]),
    ("stale weights after load_state_dict", standin.Frozen, ["repeat", "mutate_load"]),
    ("no error where the model raises", standin.Swallowing, ["repeat", "fail"]),
    ("rows from another page", partial(standin.like, kind=standin.SwappedRows), ["repeat", "grow_9", "grow_9"]),
    ("off by one in the mask", partial(standin.like, kind=standin.ShiftedMask), ["grow_9"]),
    ("off by one in the position", partial(standin.like, kind=standin.ShiftedPosition), ["grow_9"]),
]


@pytest.mark.parametrize(("fault", "steps"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_fault_is_seen_by_a_history(fault: Callable[[Transformer], Model], steps: list[str]) -> None:
    run_history(Config(), right, steps)
    with pytest.raises(Mismatch) as caught:
        run_history(Config(), partial(with_fault, fault), steps)
    note = "".join(caught.value.__notes__)
    assert "model: build(Config())" in note
    assert f"# {steps[-1]}" in note


# --- faults in the compiler itself ---------------------------------------------------------------------------------

PLANTS: list[tuple[plants.Plant, list[str]]] = [
    (plants.mask_off_by_one, ["fresh_7", "grow_2"]),
    (plants.position_off_by_one, ["fresh_7", "grow_1"]),
    (plants.wrong_page, ["fresh_7", "grow_1"]),
    (plants.wrong_row_in_page, ["fresh_7", "grow_1"]),
    (plants.stale_weights, ["fresh_7", "mutate_add", "mutate_load", "mutate_data"]),
    (plants.blind_keys, ["fresh_7", "fresh_7", "fresh_30"]),
]
SEEN_BY_VERIFY = [plants.mask_off_by_one, plants.position_off_by_one, plants.wrong_page, plants.wrong_row_in_page]


@pytest.mark.parametrize(("plant", "steps"), PLANTS, ids=[plant.__name__ for plant, _ in PLANTS])
@pytest.mark.parametrize("output", ["last", "all"])
def test_plant_is_seen(output: Any, plant: plants.Plant, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(output=output)
    run_history(config, unverified, steps)
    plant(monkeypatch)
    with pytest.raises(Mismatch):
        run_history(config, unverified, steps)


@pytest.mark.parametrize("plant", SEEN_BY_VERIFY)
@torch.no_grad()
def test_plant_is_seen_at_compile_time(plant: plants.Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that users get by default turns the fault into a refusal, and the answers stay right."""
    plant(monkeypatch)
    torch._dynamo.reset()
    model = build(Config())
    cache = kvpass.Cache(capacity="4MiB", page_size=4, poison=True)
    with recording() as found:
        fast = kvpass.compile(model, cache=cache)
        call = make_call(model.config, [TEXT])
        check_same(fast, model, call.args)
    assert [record.refusal.code for record in found if record.refusal] == ["KV301"]
    assert cache.stats().rows_computed == 0
