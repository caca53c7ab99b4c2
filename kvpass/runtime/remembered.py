"""Hoisted values of the latest contexts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kvpass.forked import Locked

Values = tuple[Any, ...]


class Remembered(Locked):
    """Values by the contents of the context that they were computed from; the least recently used go first.

    Args:
        capacity: bytes. Values that are larger are computed in every call.

    Attributes:
        computed: how often values were computed.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.computed = 0
        self._held: OrderedDict[bytes, Values] = OrderedDict()

    @property
    def used(self) -> int:
        """Bytes that are kept."""
        return sum(map(_bytes, self._held.values()))

    def get(self, name: bytes, compute: Callable[[], Values], lent: Sequence[Any]) -> Values:
        """The values of a context. One that is a view of an argument (``lent``) is copied: the caller may change it."""
        with self._lock:
            held = self._held.get(name)
            if held is not None:
                self._held.move_to_end(name)
                return held
        theirs = {storage_of(value) for value in lent if isinstance(value, Tensor)}
        values = tuple(v.clone() if isinstance(v, Tensor) and storage_of(v) in theirs else v for v in compute())
        size = _bytes(values)
        with self._lock:
            self.computed += 1
            if size <= self.capacity and name not in self._held:
                self._held[name] = values
                while self.used > self.capacity:
                    self._held.popitem(last=False)
        return values


def storage_of(tensor: Tensor) -> int:
    """The identity of a tensor's storage: two tensors that share it have the same."""
    return int(tensor.untyped_storage()._cdata)


def _bytes(values: Values) -> int:
    return sum(value.untyped_storage().nbytes() for value in values if isinstance(value, Tensor))
