"""Weights by identity: what they are, and whether they still are.

A stored row is only right for the weights that made it. Each constant is known by the SHA-256 of its contents; per call
a change is noticed by the storage's address, by how the tensor stands in it (``p.data = p.data.T``), by the version
counter that every in-place op moves, and by the marks of `kvpass.runtime.written` (``p.data.mul_()`` moves no counter
that can be seen from ``p``). What bears no mark, as a weight that an array made elsewhere may write into past it, is
read in full in every call. A sample of the contents is looked at besides.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch

from kvpass.analysis.identity import digest_of
from kvpass.ir import address, storage_address
from kvpass.runtime import written

_SAMPLES = 8  # entries of each constant that are looked at in every call


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _layout(tensor: torch.Tensor) -> written.Layout:
    """Which entries of the memory a tensor is, and how they are read."""
    read = tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return address(tensor), tensor.size(), tensor.stride(), *read


def _peek(tensor: torch.Tensor) -> torch.Tensor | None:
    """A view of some entries, spread over a tensor, as integers ``[n]``; None where that would cost a copy."""
    dense = tensor.detach()
    dense = dense.conj() if dense.is_conj() else dense
    dense = dense._neg_view() if dense.is_neg() else dense
    dense = dense.permute(sorted(range(dense.dim()), key=dense.stride, reverse=True))  # a transposed one has no holes
    if not dense.is_contiguous() or tensor.numel() == 0 or tensor.is_quantized:
        return None
    flat = dense.reshape(-1).view(_INTEGER[min(tensor.element_size(), 8)])  # NaN is not equal to itself
    step = max(1, len(flat) // _SAMPLES)
    return flat[step // 2 :: step][:_SAMPLES]


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


class _Near:
    """Samples in the host's memory, of one type and alignment: a window over all of them, and places in it.

    By addresses alone: no writable pointer is asked for, and no tensor is added to a storage. Only the places are read.
    """

    def __init__(self, peeks: Sequence[torch.Tensor]) -> None:
        size = peeks[0].element_size()
        places = np.concatenate([address(p) + np.arange(len(p)) * (p.stride(0) * size) for p in peeks])
        low = int(places.min())
        memory: Any = (ctypes.c_char * (int(places.max()) - low + size)).from_address(low)
        self._window = np.frombuffer(memory, str(peeks[0].dtype).removeprefix("torch."))
        self._places = (places - low) // size

    def look(self) -> bytes:
        return self._window.take(self._places).tobytes()


class _Sample:
    """A few entries of many tensors, and what they were."""

    def __init__(self, tensors: Sequence[torch.Tensor], storages: Sequence[written.Storage]) -> None:
        near: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
        self._far: dict[torch.dtype, list[torch.Tensor]] = {}
        self._memory = [tensor.untyped_storage() for tensor in tensors]  # of the near ones
        for tensor, storage in zip(tensors, storages, strict=True):
            peek = _peek(tensor)
            if peek is not None and _on_host(peek):
                near.setdefault((peek.dtype, address(peek) % peek.element_size()), []).append(peek)
            elif peek is not None:
                self._far.setdefault(peek.dtype, []).append(storage.samples.setdefault(_layout(tensor), peek.detach()))
        self._near = [_Near(peeks) for peeks in near.values()]
        self._near_was, self._far_was = self._look_near(), self._look_far()

    def _look_near(self) -> list[bytes]:
        return [near.look() for near in self._near]

    def _look_far(self) -> list[torch.Tensor]:
        return [torch.cat(peeks) for peeks in self._far.values()]

    def same(self) -> bool:
        if self._look_near() != self._near_was:
            return False
        return all(torch.equal(now, was) for now, was in zip(self._look_far(), self._far_was, strict=True))


def _stamp(tensor: torch.Tensor, storage: written.Storage) -> tuple[object, ...]:
    peek = _peek(tensor)
    sample = b"" if peek is None else peek.cpu().clone().numpy().tobytes()
    return _version(tensor), storage.epoch, sample


def _content(tensor: torch.Tensor, storage: written.Storage) -> bytes:
    """The content digest of a constant, computed again only where it may have changed."""
    known = storage.digests.get(_layout(tensor)) if storage.marked else None
    if known is not None and known[0] == _stamp(tensor, storage):
        return known[1]
    return digest_of(tensor)


class Weights:
    """The constants of one program as they were when its slots were named.

    Those in memory that torch does not own are moved into memory that it does.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.names = tuple(tensors)
        self.tensors = tuple(tensors.values())
        self._versioned = [tensor for tensor in self.tensors if not tensor.is_inference()]
        with written.lock:
            written.own(self.tensors)
            self._storages = [written.storage(tensor) for tensor in self.tensors]
            self._look()
            self._sample = _Sample(self.tensors, self._storages)
            self._watch()
            pairs = list(zip(self.tensors, self._storages, strict=True))
            contents = [_content(*pair) for pair in pairs]
            for (tensor, storage), digest in zip(pairs, contents, strict=True):
                storage.digests[_layout(tensor)] = _stamp(tensor, storage), digest
        self.digests = dict(zip(self.names, contents, strict=True))

    def _watch(self) -> None:
        """Mark what can be marked, before the contents are read: what is written meanwhile is noticed later."""
        known = Counter(dict(zip(self.tensors, self._storages, strict=True)).values())  # each tensor once
        for tensor, storage in zip(self.tensors, self._storages, strict=True):
            storage.mark(tensor, known[storage] + len(storage.samples))
        pairs = list(zip(self.names, self.tensors, self._storages, strict=True))
        self._marked = [tensor for _, tensor, storage in pairs if storage.marked]
        self.unwatched = [name for name, _, storage in pairs if not storage.marked]
        self._was = self._state()

    def _look(self) -> None:
        for tensor, storage in zip(self.tensors, self._storages, strict=True):
            storage.look(tensor)

    def _state(self) -> list[object]:
        epochs = map(attrgetter("epoch"), self._storages)
        places = *map(storage_address, self.tensors), *map(torch.Tensor.storage_offset, self.tensors)
        layouts = *map(torch.Tensor.size, self.tensors), *map(torch.Tensor.stride, self.tensors)
        return [*places, *layouts, *map(attrgetter("_version"), self._versioned), *epochs]

    def _untouched(self) -> bool:
        if not all(map(written.bearing, self._marked)):
            self._look()
        return self._state() == self._was

    def same(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """True where these are the same tensors with the contents that they had."""
        if not all(map(is_, tensors, self.tensors)):
            return False
        if not self._untouched() or not self._sample.same():
            return False
        return not self.unwatched or self._read_again()

    def _read_again(self) -> bool:
        """The contents of what is not watched, which is from now on, where that can be."""
        held, unwatched = dict(zip(self.names, self.tensors, strict=True)), self.unwatched
        with written.lock:
            if not self._untouched():
                return False
            self._watch()
            # Until they are read, and for ever where they are others, they are not what they were.
            now, self._was = self._was, []
            if not all(digest_of(held[name]) == self.digests[name] for name in unwatched):
                return False
            self._was = now
            return True

    def changed(self, other: Weights) -> list[str]:
        """The constants whose contents differ from those of ``other``."""
        return [name for name in self.names if self.digests[name] != other.digests[name]]
