"""Random models and random histories: every answer is the plain model's own, and only what is new is computed.

`KVPASS_SOAK=N` (`make soak`) takes N models more, from a start that `KVPASS_SOAK_SEED` names.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import kvpass
from tests.models import Config, Transformer, build
from tests.models.draw import configs, random_config
from tests.property.history import MUTATIONS, describe, draw_steps, run_history
from tests.property.oracle import Model
from tests.property.session import Session

MODELS, STEPS = 52, 30
MACHINES, MACHINE_STEPS = 12, 25
SOAK = int(os.environ.get("KVPASS_SOAK", "0"))
SOAK_SEED = int(os.environ.get("KVPASS_SOAK_SEED", "100000"))

settings.register_profile(
    "kvpass-ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=MACHINES,
    stateful_step_count=MACHINE_STEPS,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
settings.register_profile(
    "kvpass-soak",
    settings.get_profile("kvpass-ci"),
    derandomize=False,
    max_examples=max(1, SOAK // 4),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
PROFILE = settings.get_profile("kvpass-soak" if SOAK else "kvpass-ci")


def compiled(model: Transformer, capacity: str = "64MiB") -> tuple[Model, kvpass.Cache]:
    """Small pages, so that a text has several, filled with NaN, so that a row read before it is written shows."""
    cache = kvpass.Cache(capacity=capacity, page_size=4, poison=True)
    return kvpass.compile(model, cache=cache), cache


def few_pages(model: Transformer) -> tuple[Model, kvpass.Cache]:
    """Room for about two texts of full length."""
    config = model.config
    row = 2 * config.layers * config.kv_heads * config.head_size * config.torch_dtype.itemsize
    return compiled(model, f"{row * 100}B")


@pytest.mark.parametrize("seed", range(MODELS))
def test_history(seed: int) -> None:
    run_history(random_config(seed), compiled, draw_steps(seed, STEPS))


@pytest.mark.parametrize("seed", range(1000, 1008))
def test_history_with_few_pages(seed: int) -> None:
    run_history(random_config(seed), few_pages, draw_steps(seed, STEPS), counted=False)


if SOAK:

    @pytest.mark.parametrize("seed", range(SOAK_SEED, SOAK_SEED + SOAK))
    def test_soak(seed: int) -> None:
        evict = seed % 5 == 0
        run_history(random_config(seed), few_pages if evict else compiled, draw_steps(seed, 60), counted=not evict)


class Histories(RuleBasedStateMachine):
    """One model, compiled once; hypothesis chooses the calls, and in a soak shrinks a history that fails."""

    session: Session

    @initialize(config=configs(), seed=st.integers(0, 99))
    def start(self, config: Config, seed: int) -> None:
        torch._dynamo.reset()
        model = build(config)
        fast, cache = compiled(model)
        self.session = Session(config, model, fast, cache, seed, counted=True)
        self.guard = torch.no_grad()
        self.guard.__enter__()
        self.batches = seed % 2 == 0

    def teardown(self) -> None:
        if hasattr(self, "guard"):
            self.guard.__exit__(None, None, None)

    @rule(count=st.sampled_from((1, 1, 1, 2, 5, 11)))
    def grow(self, count: int) -> None:
        self.session.grow(count)

    @rule()
    def branch(self) -> None:
        self.session.branch()

    @rule()
    def shrink(self) -> None:
        self.session.shrink()

    @rule()
    def repeat(self) -> None:
        self.session.repeat()

    @rule(count=st.sampled_from((1, 4, 5, 23)))
    def fresh(self, count: int) -> None:
        self.session.fresh(count)

    @rule()
    def go_back(self) -> None:
        self.session.go_back()

    @precondition(lambda self: self.batches)
    @rule(duplicate=st.booleans())
    def batch(self, duplicate: bool) -> None:
        self.session.batch(2, duplicate=duplicate)

    @precondition(lambda self: self.batches)
    @rule()
    def padded_batch(self) -> None:
        self.session.padded_batch(2)

    @rule(how=st.sampled_from(MUTATIONS))
    def mutate(self, how: str) -> None:
        self.session.mutate(how)

    @rule()
    def scribble(self) -> None:
        self.session.scribble()

    @rule()
    def scribble_older(self) -> None:
        self.session.scribble_older()

    @rule()
    def fail(self) -> None:
        self.session.fail()

    @rule()
    def two_threads(self) -> None:
        self.session.two_threads()


@pytest.fixture
def machine() -> Iterator[type[Histories]]:
    """`Histories`, which adds the model's line and the history to whatever it raises."""
    seen: list[Session] = []

    class Noted(Histories):
        def teardown(self) -> None:
            seen[:] = [self.session] if hasattr(self, "session") else []
            super().teardown()

    try:
        yield Noted
    finally:
        if seen:
            print(describe(seen[0]))


def test_state_machine(machine: type[Histories]) -> None:
    run_state_machine_as_test(machine, settings=PROFILE)
