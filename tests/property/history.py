"""Histories as lists of step names, drawn by chance: cheaper than a state machine, and as reproducible."""

import random
from collections.abc import Callable

import torch

from tests.models import Config, Transformer, build
from tests.property.oracle import Model
from tests.property.session import CacheLike, Session

MUTATIONS = ("add", "data", "row", "replace", "load")

Step = Callable[[Session], None]

STEPS: dict[str, Step] = {
    "grow_1": lambda s: s.grow(1),
    "grow_2": lambda s: s.grow(2),
    "grow_9": lambda s: s.grow(9),
    "branch": Session.branch,
    "shrink": Session.shrink,
    "repeat": Session.repeat,
    "fresh_1": lambda s: s.fresh(1),
    "fresh_7": lambda s: s.fresh(7),
    "fresh_30": lambda s: s.fresh(30),
    "go_back": Session.go_back,
    "batch": lambda s: s.batch(3),
    "duplicate": lambda s: s.batch(3, duplicate=True),
    "grow_batch": lambda s: s.grow_batch(3),
    "padded_batch": lambda s: s.padded_batch(3),
    "scribble": Session.scribble,
    "scribble_older": Session.scribble_older,
    "fail": Session.fail,
    "two_threads": Session.two_threads,
    "inference": Session.inference,
    **{f"mutate_{how}": lambda s, how=how: s.mutate(how) for how in MUTATIONS},  # type: ignore[misc]
}

BATCHES = ("batch", "duplicate", "grow_batch", "padded_batch")
COSTLY = (*BATCHES, "inference", "fresh_1")
"""Steps that make Dynamo compile once more: a third of the histories does without, a third has those of batches."""

Compile = Callable[[Transformer], tuple[Model, CacheLike]]


def draw_steps(seed: int, count: int) -> list[str]:
    """`count` names of steps. Growing by one is every third step at least, as it is in decoding."""
    chance = random.Random(seed)
    costly: tuple[str, ...] = ((), BATCHES, ("inference", "fresh_1"))[seed % 3]
    names = [name for name in STEPS if name not in COSTLY or name in costly]
    others = chance.choices(names, k=count)
    return [name if chance.random() < 0.6 else "grow_1" for name in others]


def run_history(config: Config, compile_model: Compile, steps: list[str], *, counted: bool = True) -> Session:
    """Build the model, compile it once, and take `steps`; a failure prints the model's line and the history."""
    torch._dynamo.reset()
    model = build(config)
    fast, cache = compile_model(model)
    session = Session(config, model, fast, cache, config.seed, counted=counted)
    try:
        with torch.no_grad():
            for step in steps:
                session.log.append(f"# {step}")
                STEPS[step](session)
    except BaseException as error:
        error.add_note(describe(session))
        raise
    return session


def describe(session: Session) -> str:
    history = "\n  ".join(session.log)
    return f"model: build({session.config!r})  counted={session.counted}\nhistory:\n  {history}"
