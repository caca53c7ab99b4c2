"""An interrupt at any bytecode of the cache leaves the bookkeeping whole, no page pinned, and no wrong row."""

import dis
import functools
import itertools
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import pytest

from kvpass.cache import Cache, SlotTable
from tests.cache.support import begin, run, spec

SLOTS = [spec("k"), spec("v", (), (4,))]
PAGE = 4


class Stop(BaseException):
    pass


@functools.cache
def opcodes(code: CodeType) -> bytes:
    return code.co_code


def stopped(call: Callable[[], object], at: int, where: str = "/kvpass/cache/") -> bool:
    """Whether a call came to the ``at``-th place in this code where Python would handle a signal, and was stopped
    there: behind a call, at the beginning of a function, and where a loop turns.
    """
    left, before = at, dict[FrameType, str]()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if where not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            name = dis.opname[opcodes(frame.f_code)[frame.f_lasti]]
            # A value that a ``with`` returns is swapped out of its way: there Python is still in the call that made it.
            left -= before.get(frame, "").startswith(("CALL", "RESUME", "JUMP_BACKWARD")) and name != "SWAP"
            before[frame] = name
            if left == 0:
                raise Stop
        return trace

    sys.settrace(trace)
    try:
        call()
    except Stop:
        return True
    finally:
        sys.settrace(None)
        before.clear()  # frames, which hold leases
    return False


def grow(cache: Cache, table: SlotTable) -> None:
    run(cache, table, [[*range(9), 7, 8]])


def branch_and_evict(cache: Cache, table: SlotTable) -> None:
    run(cache, table, [[*range(6), 50, 51], [*range(3), 60, 61, 62, 63, 64]])


def be_dropped(cache: Cache, table: SlotTable) -> None:
    begin(cache, table, [[*range(9), 7]])
    cache.stats()


def split(cache: Cache, table: SlotTable) -> None:
    run(cache, table, [[*range(9), 7]], meanwhile=lambda: cache.register(SLOTS[:1]))


@pytest.mark.parametrize("what", [grow, branch_and_evict, be_dropped, split])
def test_a_change_that_is_broken_off(what: Callable[[Cache, SlotTable], None]) -> None:
    for at in itertools.count(1, 3):
        cache = Cache(7 * PAGE * sum(slot.row_bytes for slot in SLOTS), page_size=PAGE, poison=True)
        table = cache.register(SLOTS)
        run(cache, table, [list(range(9))])
        run(cache, table, [[*range(5), 40, 41]])
        if not stopped(lambda: what(cache, table), at):  # noqa: B023
            break
        cache._check()
        assert cache.stats().pages_pinned == 0
        run(cache, cache.register(SLOTS[:1]), [[*range(9), 7]])
        for text in ([*range(9), 7, 8], [*range(6), 50, 51], [*range(5), 40, 41]):
            run(cache, table, [text])
        cache._check()
    assert at > 200
