"""Whether a storage was written into, through whichever tensor.

A storage that torch has cloned lazily carries a mark, and the first op that asks it for a writable pointer takes the
mark away. With no clone beside it nothing is copied and nothing else changes, so the mark is a detector of writes that
``p.data[3] = 0`` cannot pass by, as it passes by the version counter of ``p``. Memory that torch does not own, such as
numpy's or a mapped file, takes no mark: `own` moves it.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a fork waits: tensors that share memory are moved one after the other
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
_epochs = itertools.count(1)
Layout = tuple[object, ...]
bearing: Callable[[Tensor], bool] = torch._C._is_cow_tensor  # type: ignore[attr-defined]


class Storage:
    """What all programs know of one storage.

    No tensor is referred to weakly: `torch.utils.swap_tensors` would refuse it.

    Attributes:
        marked: writes are noticed; otherwise the contents must be read to know.
        epoch: belongs to this storage only, and changes when it may have been written into.
        digests: of the contents, by the layout of a tensor; each with what has to be so still.
        samples: views of a few entries on a device, by the layout of a tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.ref = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self.marked = False
        self.epoch = next(_epochs)
        self.digests: dict[Layout, tuple[object, bytes]] = {}
        self.samples: dict[Layout, Tensor] = {}

    def mark(self, tensor: Tensor, known: int) -> None:
        """Notice writes from now on; only for who holds `lock` and has looked, and reads the contents afterwards.

        Whoever was given an array (``a = p.numpy()``) may write into it later, past the mark: there is none before all
        tensors on the storage are ``known`` ones.
        """
        if not self.marked and _tensors_on(tensor) <= known and _mark(tensor):
            self.marked = True
            self.epoch = next(_epochs)

    def look(self, tensor: Tensor) -> None:
        """Begin a new epoch if the mark is gone."""
        with lock:
            if self.marked and not bearing(tensor):
                self.marked = False
                self.epoch = next(_epochs)


_storages: WeakValueDictionary[int, Storage] = WeakValueDictionary()


def storage(tensor: Tensor) -> Storage:
    """The record of a tensor's storage; it lives as long as somebody holds it."""
    with lock:
        known = _recorded(tensor)
        if known is None:
            known = _storages[tensor.untyped_storage()._cdata] = Storage(tensor)
        return known


def _recorded(tensor: Tensor) -> Storage | None:
    known = _storages.get(tensor.untyped_storage()._cdata)
    return None if known is None or known.ref.expired() else known  # type: ignore[no-untyped-call]


def own(tensors: Iterable[Tensor]) -> None:
    """Move weights that lie in memory torch does not own into memory that it does, as ``model.to`` would.

    Tensors on one storage share the new one. Memory stays where it is if other tensors, other processes or a device
    see it too. What should bear a mark is left alone: to try whether it takes one would hide that it lost it.
    """
    groups: defaultdict[int, list[Tensor]] = defaultdict(list)
    for tensor in dict.fromkeys(tensors):
        groups[tensor.untyped_storage()._cdata].append(tensor)
    for group in groups.values():
        known = _recorded(group[0])
        if (known is not None and known.marked) or _tensors_on(group[0]) != len(group):
            continue
        if all(map(_movable, group)) and not _mark(group[0]):
            moved = group[0].untyped_storage().clone()  # type: ignore[no-untyped-call]
            for old in group:
                new = torch.empty(0, dtype=old.dtype, device=old.device)
                old.data = new.set_(moved, old.storage_offset(), old.size(), old.stride())


def _movable(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized
    shared: bool = tensor.device.type == "cpu" and tensor.is_shared()  # type: ignore[no-untyped-call]
    return plain and not (shared or tensor.is_pinned() or tensor.is_inference() or tensor.is_conj() or tensor.is_neg())


def _tensors_on(tensor: Tensor) -> int:
    handle = tensor.untyped_storage()  # counted itself
    count: int = torch._C._storage_Use_Count(handle._cdata)
    return count - 1


def _mark(tensor: Tensor) -> bool:
    try:
        with torch.no_grad():
            torch._lazy_clone(tensor)
    except RuntimeError:  # "Expected storage != nullptr": torch does not own the memory
        return False
    return bearing(tensor)
