"""Each kind of model is compiled once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest

from kvpass.report.parts import Record
from tests.report.models import compiled

Records = Callable[[str], Sequence[Record]]


@pytest.fixture(scope="session")
def records() -> Records:
    """The compilations of a kind, by its name in `tests.report.models.KINDS`."""
    return cache(compiled)
