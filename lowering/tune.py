"""The fastest configuration of a Triton kernel on the device at hand: measured once, on the first call, and kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

from kvpass.ir import Attention, Step
from kvpass.lowering.architectures import ARCHITECTURES
from kvpass.lowering.build import cache_folder
from kvpass.lowering.triton_config import Config, config, shared_memory

log = logging.getLogger("kvpass")


def candidates(spec: Attention, arch: str) -> list[Config]:
    """What the table says, first, and what is one step away from it in any direction and fits the shared memory.

    Raises:
        NotImplementedError: as `kvpass.lowering.triton_config.config`.
    """
    first, machine = config(spec, arch), ARCHITECTURES[arch]
    rows = [first.block_m] if spec.step is Step.DECODE else _around(first.block_m, 16, 128)
    keys, warps = _around(first.block_n, 16, 128), _around(first.warps, 2, 8)
    all_around = itertools.product(rows, keys, warps, (2, 3, 4))
    made = [replace(first, block_m=m, block_n=n, warps=w, stages=s) for m, n, w, s in all_around]
    fitting = [c for c in made if shared_memory(spec, c, machine) <= machine.shared_limit]
    return list(dict.fromkeys([first, *fitting]))


def _around(size: int, least: int, most: int) -> list[int]:
    return [s for s in (size // 2, size, size * 2) if least <= s <= most]


def winner(spec: Attention, arch: str, device: str, text: str, measure: Callable[[Config], float | None]) -> Config:
    """The fastest candidate, from the disk if it was measured before on such a device.

    Args:
        device: its name.
        text: the source by the table's configuration: what it says of shape, strides and code is part of the key.
        measure: the time of a configuration, in any unit; None where the device cannot launch it.

    Raises:
        NotImplementedError: as `candidates`.
    """
    key = hashlib.sha256("\0".join((arch, device, text)).encode()).hexdigest()
    path = cache_folder() / "tuned" / f"{key[:32]}.json"
    known = _read(path)
    if known is not None:
        return known
    times = {c: time for c in candidates(spec, arch) if (time := measure(c)) is not None}
    if not times:
        return config(spec, arch)
    best = min(times, key=lambda c: times[c])
    log.info("tuned on %s: %s of %d", device, best, len(times))
    _write(path, best)
    return best


def _read(path: Path) -> Config | None:
    try:
        found = json.loads(path.read_text())
        return Config(**{field.name: int(found[field.name]) for field in fields(Config)})
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: measured again
        return None


def _write(path: Path, best: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as scratch:
        json.dump(asdict(best), scratch)
    os.replace(scratch.name, path)
