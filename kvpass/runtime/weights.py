"""Weights by identity: what they are, and whether they still are.

A stored row is only right for the weights that made it. Each constant is known by the SHA-256 of its contents; per call
a change is noticed by the storage's address, by the version counter that every in-place op moves, by the marks of
`kvpass.runtime.written` (``p.data.mul_()`` moves no counter that can be seen from ``p``) and, since memory that torch
does not own bears no mark, by a sample of the contents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from kvpass.analysis.identity import digest_of
from kvpass.runtime import written

_SAMPLES = 8  # entries of each constant that are looked at in every call
_digests: Any = WeakIdKeyDictionary()  # tensor -> (mark, sample, digest)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _unwatched(tensor: torch.Tensor, storage: written.Storage) -> bool:
    """True where nothing tells of a change, so that the contents must be read in every call.

    Tensors made under ``inference_mode`` have no version; of a tensor with holes no cheap sample can be taken.
    """
    if storage.marked:
        return False
    return tensor.is_inference() or (tensor.numel() > 0 and _peek(tensor) is None)


def _peek(tensor: torch.Tensor) -> torch.Tensor | None:
    """A view of some entries, spread over a tensor, as integers ``[n]``; None where that would cost a copy."""
    dense = tensor.detach()
    dense = dense.permute(sorted(range(dense.dim()), key=dense.stride, reverse=True))  # a transposed one has no holes
    if not dense.is_contiguous() or tensor.numel() == 0 or tensor.is_quantized:
        return None
    flat = dense.reshape(-1).view(_INTEGER[min(tensor.element_size(), 8)])  # NaN is not equal to itself
    step = max(1, len(flat) // _SAMPLES)
    return flat[step // 2 :: step][:_SAMPLES]


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


class _Sample:
    """A few entries of many tensors, and what they were; numpy looks at the host's ten times faster than torch."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._near: dict[torch.dtype, list[np.ndarray]] = {}
        self._far: dict[torch.dtype, list[torch.Tensor]] = {}
        for peek in map(_peek, tensors):
            if peek is not None and _on_host(peek):
                self._near.setdefault(peek.dtype, []).append(peek.numpy())
            elif peek is not None:
                self._far.setdefault(peek.dtype, []).append(peek)
        self._near_was, self._far_was = self._look_near(), self._look_far()

    def _look_near(self) -> list[bytes]:
        return [np.concatenate(peeks).tobytes() for peeks in self._near.values()]

    def _look_far(self) -> list[torch.Tensor]:
        return [torch.cat(peeks) for peeks in self._far.values()]

    def same(self) -> bool:
        if self._look_near() != self._near_was:
            return False
        return all(torch.equal(now, was) for now, was in zip(self._look_far(), self._far_was, strict=True))


# The address without the writable pointer that `data_ptr()` takes.
_address: Callable[[torch.Tensor], int] = torch._C._data_address  # type: ignore[attr-defined]


def _content(tensor: torch.Tensor, storage: written.Storage) -> bytes:
    """The content digest of a constant, computed again only where it may have changed."""
    if _unwatched(tensor, storage):
        return digest_of(tensor)
    peek = _peek(tensor)
    storage.look(tensor)
    mark = _address(tensor), _version(tensor), storage.epoch
    sample = b"" if peek is None else peek.cpu().clone().numpy().tobytes()
    known = _digests.get(tensor)
    if known is not None and known[:2] == (mark, sample):
        return known[2]  # type: ignore[no-any-return]
    digest = digest_of(tensor)
    if known is not None and known[0][:2] == mark[:2] and known[2] == digest:
        storage.false_alarm()
    _digests[tensor] = (mark, sample, digest)
    return digest


class Weights:
    """The constants of one program as they were when its slots were named."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.names = tuple(tensors)
        self.tensors = tuple(tensors.values())
        with written.lock:
            self._storages = [written.storage(tensor) for tensor in self.tensors]
            contents = [_content(*pair) for pair in zip(self.tensors, self._storages, strict=True)]
            self._sample = _Sample(self.tensors)
            for tensor, storage in zip(self.tensors, self._storages, strict=True):
                storage.mark(tensor)
            named = list(zip(self.names, self.tensors, self._storages, strict=True))
            self._marked = [tensor for _, tensor, storage in named if storage.marked]
            self._unwatched = [(name, tensor) for name, tensor, storage in named if _unwatched(tensor, storage)]
            self._versioned = [tensor for tensor in self.tensors if not tensor.is_inference()]
            self._was = self._now()
        self.digests = dict(zip(self.names, contents, strict=True))

    def _now(self) -> list[int]:
        if not all(map(written.bearing, self._marked)):
            for tensor, storage in zip(self.tensors, self._storages, strict=True):
                storage.look(tensor)
        epochs = map(attrgetter("epoch"), self._storages)
        return [*map(_address, self.tensors), *map(attrgetter("_version"), self._versioned), *epochs]

    def same(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """True where these are the same tensors with the contents that they had."""
        if not all(map(is_, tensors, self.tensors)):
            return False
        if self._now() != self._was or not self._sample.same():
            return False
        return all(digest_of(tensor) == self.digests[name] for name, tensor in self._unwatched)

    def changed(self, other: Weights) -> list[str]:
        """The constants whose contents differ from those of ``other``."""
        return [name for name in self.names if self.digests[name] != other.digests[name]]
