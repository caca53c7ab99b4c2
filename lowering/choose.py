"""Which kernel computes an attention: by its device, and the reference where nothing else can."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable

import torch

from kvpass.ir import Attention, Layout
from kvpass.lowering import build, cpp, cpu, gpu

log = logging.getLogger("kvpass")
_said: set[str] = set()


def lower(
    spec: Attention, device: torch.device, key: Layout | None, value: Layout | None, *, autotune: bool = False
) -> Callable[..., torch.Tensor] | None:
    """A generated kernel, or None for the reference (`kvpass.ir.Lowering`); why, is logged once."""
    try:
        if device.type == "cuda":
            return gpu.lower(spec, key, value, gpu.architecture(device), autotune=autotune)
        return cpu.lower(spec, key, value) if device.type == "cpu" else None
    except build.NoCompiler as error:
        _say(f"attention runs on PyTorch's own kernels, several times slower: {error}")
    except NotImplementedError as error:
        log.debug("no kernel for %s: %s", spec, error)
    return None


def prepare(wanted: Iterable[tuple[Attention, torch.device]]) -> None:
    """Build the kernels of a graph side by side, before `lower` asks for one after the other."""
    sources = []
    for spec in dict.fromkeys(spec for spec, device in wanted if device.type == "cpu"):
        with contextlib.suppress(NotImplementedError):  # `lower` says so
            sources.append(cpp.source(spec))
    with contextlib.suppress(build.NoCompiler):
        build.shared_libraries(sources)


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning("%s", text)
