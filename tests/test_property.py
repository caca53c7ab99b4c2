"""Random models and random histories: every answer is the plain model's own, and only what is new is computed.

`KVPASS_SOAK=N` (`make soak`) takes N models more, from a start that `KVPASS_SOAK_SEED` names.
"""

import os

import pytest
from hypothesis import settings

from tests.models.draw import random_config
from tests.property.fast import compiled, few_pages
from tests.property.history import draw_steps, run_history
from tests.property.machine import SHRINKING, run_machine

MODELS, STEPS = 16, 24
SOAK = int(os.environ.get("KVPASS_SOAK", "0"))
SOAK_SEED = int(os.environ.get("KVPASS_SOAK_SEED", "100000"))


@pytest.mark.parametrize("seed", [*range(MODELS), 100_081])  # the last: padding in a batch of one, rows merged
def test_history(seed: int) -> None:
    run_history(random_config(seed), compiled, draw_steps(seed, STEPS))


@pytest.mark.parametrize("seed", range(1000, 1003))
def test_history_with_few_pages(seed: int) -> None:
    run_history(random_config(seed), few_pages, draw_steps(seed, STEPS), counted=False)


def test_state_machine() -> None:
    run_machine(compiled)


if SOAK:

    @pytest.mark.soak
    @pytest.mark.parametrize("seed", range(SOAK_SEED, SOAK_SEED + SOAK))
    def test_soak(seed: int) -> None:
        evict = seed % 5 == 0
        run_history(random_config(seed), few_pages if evict else compiled, draw_steps(seed, 60), counted=not evict)

    @pytest.mark.soak
    def test_soak_state_machine() -> None:
        run_machine(compiled, settings(SHRINKING, max_examples=max(1, SOAK // 4)))
