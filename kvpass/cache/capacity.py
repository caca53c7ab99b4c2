"""How many bytes a user means, and how to say a number of bytes back."""

from __future__ import annotations

import os
import re
from pathlib import Path

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]I?)?B)?\s*", re.IGNORECASE)


def parse_capacity(capacity: object) -> int:
    """Turn a capacity into bytes.

    An int is bytes; a string is a number and a unit ("2GiB", "512MB", "1.5 GiB"); a float in (0, 1] is that fraction
    of the memory that is free now.

    Raises:
        TypeError: neither int, str nor float (a bool is refused too).
        ValueError: not positive, not understood, or a fraction outside (0, 1].
    """
    if isinstance(capacity, bool) or not isinstance(capacity, int | str | float):
        raise TypeError(f"capacity must be an int, a str or a float, not {type(capacity).__name__}: {capacity!r}")
    if isinstance(capacity, float):
        if not 0.0 < capacity <= 1.0:
            raise ValueError(f"capacity as a float is a fraction of the free memory, in (0, 1], but it is {capacity!r}")
        size = int(capacity * free_memory())
    elif isinstance(capacity, str):
        found = _TEXT.fullmatch(capacity)
        if found is None:
            raise ValueError(f'capacity must look like "2GiB", "512MB" or "1.5 GiB", but it is {capacity!r}')
        size = int(float(found[1]) * _UNITS[(found[2] or "").upper()])
    else:
        size = capacity
    if size <= 0:
        raise ValueError(f"capacity must be at least one byte, but it is {capacity!r}")
    return size


def free_memory() -> int:
    """Bytes of memory that a new allocation could get: the machine's, or what the control group leaves of it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        return max(min(free, limit - used), 1)
    except (OSError, ValueError):  # no control group, or "max"
        return free


def format_bytes(size: int) -> str:
    """A size for people: `format_bytes(24746393) == "23.6 MiB"`."""
    if size < 1024:
        return f"{size} B"
    step = next((step for step in (1, 2, 3) if size < 1023.95 * 1024**step), 4)
    return f"{size / 1024**step:.1f} {'KMGT'[step - 1]}iB"
