"""A forked child answers as its parent does, whatever other threads of the parent were doing."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvpass
from kvpass.frontend import backend
from kvpass.lowering.tape import trace
from kvpass.runtime import steps, written

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
SECONDS = 30


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(19, 8), nn.Linear(8, 19)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True))


IDS = torch.arange(60).reshape(2, 30) % 19


def compiled(tiers: str) -> tuple[Small, Callable[..., Any], kvpass.Cache]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, cache = Small().eval(), kvpass.Cache(capacity="8MiB", page_size=4)
    return model, kvpass.compile(model, cache=cache, tiers=tiers), cache


def ends_well(child: Callable[[], None]) -> bool:
    """Whether a child comes to its end, and no assertion fails in it."""
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(SECONDS)
    process.kill()
    process.join()
    return process.exitcode == 0


@contextmanager
def elsewhere(hold: Any) -> Iterator[None]:
    """Another thread is inside of this meanwhile."""
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with hold:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    inside.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


@torch.no_grad()
@pytest.mark.parametrize("tiers", ["compiled", "auto", "eager"])
def test_a_child_calls_and_compiles(tiers: str) -> None:
    model, fast, _ = compiled(tiers)
    for length in (9, 10, 11):
        fast(IDS[:1, :length])
    kvpass.wait()

    def child() -> None:
        for rows, length in ((1, 12), (2, 9), (2, 10), (2, 11), (1, 13), (1, 26)):
            torch.testing.assert_close(fast(IDS[:rows, :length]), model(IDS[:rows, :length]))
        assert kvpass.wait(timeout=SECONDS / 2)
        torch.testing.assert_close(fast(IDS[:1, :14]), model(IDS[:1, :14]))
        other, again, _ = compiled(tiers)
        torch.testing.assert_close(again(IDS[:, :7]), other(IDS[:, :7]))

    assert ends_well(child)


@torch.no_grad()
def test_a_child_of_a_parent_that_compiles_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that the parent had begun is compiled in the child."""
    model, fast, _ = compiled("auto")
    prepared = threading.Event()
    monkeypatch.setattr(steps.Steps, "_prepare", lambda *_: prepared.wait())

    def child() -> None:
        assert not in_parent.pending()
        for length in (12, 13):
            torch.testing.assert_close(fast(IDS[:1, :length]), model(IDS[:1, :length]))
            assert kvpass.wait(timeout=SECONDS / 2)
        assert any(tape is not None for _, tape, _ in in_parent.describe())

    try:
        for length in (9, 10, 11):
            fast(IDS[:1, :length])
        found = backend.records()[-1].program
        assert found is not None
        assert found.steps is not None
        in_parent = found.steps
        assert in_parent.pending()
        monkeypatch.undo()
        with elsewhere(trace.tracing):
            assert ends_well(child)
    finally:
        prepared.set()


@torch.no_grad()
@pytest.mark.parametrize("which", ["cache", "program", "steps", "tape"])
def test_a_lock_that_another_thread_held(which: str) -> None:
    model, fast, cache = compiled("compiled")
    for length in (9, 10):
        fast(IDS[:1, :length])
    program = backend.records()[-1].program
    assert program is not None
    assert program.steps is not None
    tapes = [tape for _, tape, _ in program.steps.describe() if tape is not None]
    locks = {"cache": cache._lock, "program": program._lock, "steps": program.steps._lock, "tape": tapes[0].lock}

    def child() -> None:
        model.head.weight.data.mul_(2)
        for length in (11, 12):
            torch.testing.assert_close(fast(IDS[:1, :length]), model(IDS[:1, :length]))
        assert program.steps is not None
        assert all(not tape.lock.locked() for _, tape, _ in program.steps.describe() if tape is not None)

    with elsewhere(locks[which]):
        assert ends_well(child)


def test_a_fork_waits_for_weights_that_are_moved() -> None:
    moved, inside = threading.Event(), threading.Event()

    def move() -> None:
        with written.lock:
            inside.set()
            time.sleep(0.2)
            moved.set()

    def child() -> None:
        assert moved.is_set()
        with written.lock:
            pass

    thread = threading.Thread(target=move)
    thread.start()
    inside.wait()
    assert ends_well(child)
    thread.join()


@torch.no_grad()
def test_pages_of_a_call_in_another_thread_are_given_back_in_the_child() -> None:
    model, fast, cache = compiled("eager")
    fast(IDS[:1, :9])
    program = backend.records()[-1].program
    assert program is not None
    assert program._bound is not None
    table = program._bound.table
    lease: Any = None

    def child() -> None:
        assert cache.stats().pages_pinned == 0
        cache._check()
        torch.testing.assert_close(fast(IDS[:1, :12]), model(IDS[:1, :12]))

    def work() -> None:
        nonlocal lease
        lease = cache.begin(table, [bytes(8 * 9)], 8, b"", limit=8)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert cache.stats().pages_pinned > 0
    assert ends_well(child)
    assert cache.stats().pages_pinned > 0
    lease.abort()
    cache._check()


@torch.no_grad()
def test_a_cache_that_another_thread_was_changing() -> None:
    model, fast, cache = compiled("eager")
    fast(IDS[:1, :9])

    @contextmanager
    def changing() -> Iterator[None]:
        with cache._lock:
            cache._change()
            cache._budget.used += 1
            yield
            cache._budget.used -= 1
            cache._changing = False

    def child() -> None:
        for length in (9, 10):
            torch.testing.assert_close(fast(IDS[:1, :length]), model(IDS[:1, :length]))
        cache._check()

    with elsewhere(changing()):
        assert ends_well(child)
    cache._check()
