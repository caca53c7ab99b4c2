"""Histories that hypothesis chooses, and shrinks where it is let."""

from typing import ClassVar

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.models import Config, build
from tests.models.draw import configs
from tests.property.history import MUTATIONS, Compile, describe
from tests.property.session import Session

# The same examples on every run: a failure that CI shows can be had at home.
REPRODUCIBLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=12,
    stateful_step_count=25,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    print_blob=True,
)
SHRINKING = settings(REPRODUCIBLE, derandomize=False, phases=(Phase.explicit, Phase.generate, Phase.shrink))


class Histories(RuleBasedStateMachine):
    """One model, compiled once; hypothesis chooses the calls, and in a soak shrinks a history that fails."""

    compile_model: ClassVar[Compile]
    session: Session

    @initialize(config=configs(), seed=st.integers(0, 99))
    def start(self, config: Config, seed: int) -> None:
        torch._dynamo.reset()
        model = build(config)
        fast, cache = type(self).compile_model(model)
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


def run_machine(compile_model: Compile, profile: settings = REPRODUCIBLE) -> None:
    """Run `Histories` on models compiled by `compile_model`; a failure carries the model's line and the history."""
    last: list[Session] = []

    class Noted(Histories):
        def teardown(self) -> None:
            last[:] = [self.session] if hasattr(self, "session") else []
            super().teardown()

    Noted.compile_model = staticmethod(compile_model)
    try:
        run_state_machine_as_test(Noted, settings=profile)
    except BaseException as error:
        if last:
            error.add_note(describe(last[0]))
        raise
