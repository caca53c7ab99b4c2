"""Bars on standard error, where that is a terminal; nothing elsewhere, and nothing is left behind."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvpass.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar for work that is counted.

    Raises:
        InputError: rich is not installed.
    """
    console = _console()
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        yield bar


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A moving bar with the time elapsed, for work whose end is not known.

    Raises:
        InputError: rich is not installed.
    """
    console = _console()
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        bar.add_task(what, total=None)
        yield


@contextmanager
def counted(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar, if rich is there, that what is yielded moves by one; from any thread."""
    with contextlib.ExitStack() as stack:
        try:
            bar = stack.enter_context(progress())
        except InputError:
            yield lambda: None
            return
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@functools.cache
def _console() -> Console:
    """One for all: bars within bars must know of each other."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise InputError("rich is not installed: pip install 'kvpass[demo]'") from error
    return Console(stderr=True)
