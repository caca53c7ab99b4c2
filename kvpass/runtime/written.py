"""Whether a storage was written into, through whichever tensor.

A storage that torch has cloned lazily carries a mark, and the first op that asks it for a writable pointer takes the
mark away. With no clone beside it nothing is copied and nothing else changes, so the mark is a detector of writes that
``p.data[3] = 0`` cannot pass by, as it passes by the version counter of ``p``. Memory that torch does not own, such as
numpy's or a mapped file, takes no mark.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Whoever takes a writable pointer only to read (`p.numpy()`, `torch.save`) takes a mark too, and the contents must be
# read again to tell: this often at most.
_FALSE_ALARMS = 3
lock = threading.RLock()
_epochs = itertools.count(1)
bearing: Callable[[Tensor], bool] = torch._C._is_cow_tensor  # type: ignore[attr-defined]


class Storage:
    """What all programs know of one storage."""

    def __init__(self, tensor: Tensor) -> None:
        self.ref = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self.epoch = next(_epochs)  # belongs to this storage only, and changes when it may have been written into
        self.marked = False
        self._alarms = 0
        self.mark(tensor)

    def mark(self, tensor: Tensor) -> None:
        """Notice writes from now on; only for who holds `lock` and has looked since the last one."""
        self.marked = self._alarms < _FALSE_ALARMS and _mark(tensor)

    def look(self, tensor: Tensor) -> None:
        """Begin a new epoch if the mark is gone."""
        with lock:
            if self.marked and not bearing(tensor):
                self.epoch = next(_epochs)
                self.mark(tensor)

    def false_alarm(self) -> None:
        self._alarms += 1


_storages: WeakValueDictionary[int, Storage] = WeakValueDictionary()


def storage(tensor: Tensor) -> Storage:
    """The record of a tensor's storage; it lives as long as somebody holds it."""
    key = tensor.untyped_storage()._cdata
    with lock:
        known = _storages.get(key)
        if known is None or known.ref.expired():  # type: ignore[no-untyped-call]
            known = _storages[key] = Storage(tensor)
        return known


def _mark(tensor: Tensor) -> bool:
    try:
        with torch.no_grad():
            torch._lazy_clone(tensor)
    except RuntimeError:  # "Expected storage != nullptr": torch does not own the memory
        return False
    return bearing(tensor)
