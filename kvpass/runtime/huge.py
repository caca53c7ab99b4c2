"""Weights in huge pages of the operating system.

A step reads every weight once, and a core that reads memory in pages of 4 KiB waits for their translations: on a
virtual machine with two cores a loop of loads gains 1.25 times with one thread and 1.1 with two, and a step of SmolLM2
1.2. Linux puts pages together where they are (``MADV_COLLAPSE``, since 6.1): addresses and contents stay.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from kvpass.cache.pools import HUGE_PAGE
from kvpass.ir import storage_address

log = logging.getLogger("kvpass")
_GAP = 1 << 16  # bytes between two weights that are asked for with them: headers of an allocator
_COLLAPSE = 25  # MADV_COLLAPSE
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def settle(tensors: Iterable[Tensor]) -> int:
    """Ask for huge pages under these tensors, and return how many bytes the system gave.

    It takes a second for half a GiB, in which the tensors can be read. Nothing is done where the machine's owner says
    ``never``, or ``$KVPASS_HUGE_PAGES`` is ``0``.
    """
    if not wanted():
        return 0
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    given = 0
    for first, last in spans((storage_address(x), x.untyped_storage().nbytes()) for x in tensors if _own(x)):
        if advise(first, last - first, _COLLAPSE) == 0:
            given += last - first
        else:
            log.debug("no huge pages for %d bytes: %s", last - first, os.strerror(ctypes.get_errno()))
    return given


def wanted() -> bool:
    """Whether anybody says no."""
    if sys.platform != "linux" or os.environ.get("KVPASS_HUGE_PAGES") == "0":
        return False
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def _own(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not tensor.is_shared()  # type: ignore[no-untyped-call]


def spans(storages: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The whole huge pages under storages of (address, bytes), as (first, last) address: none holds much else."""
    joined: list[list[int]] = []
    for first, size in sorted(set(storages)):
        if joined and first - joined[-1][1] <= _GAP:
            joined[-1][1] = max(joined[-1][1], first + size)
        else:
            joined.append([first, first + size])
    whole = ((-(-first // HUGE_PAGE) * HUGE_PAGE, last // HUGE_PAGE * HUGE_PAGE) for first, last in joined)
    return [(first, last) for first, last in whole if first < last]
