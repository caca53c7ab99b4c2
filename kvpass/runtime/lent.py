"""Outputs that the caller gets in full, without a copy of the rows that it had before.

The rows of the latest text stand in memory that grows at its end. A result is a copy-on-write clone of that memory: the
rows are read where they are, and whoever writes into a result, old or new, writes into a copy of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpass.forked import Locked


class Lender(Locked):
    """The rows of one output for one text at a time.

    Args:
        axis: the sequence axis of the output; the axes before it have size one.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self._name: bytes = b""
        self._text: bytes = b""
        self._room = 0
        self._lent: Tensor | None = None
        self._own: Tensor | None = None

    def lend(self, rows: Tensor, name: bytes, text: bytes) -> Tensor:
        """A tensor of the caller's with these rows.

        Args:
            rows: ``[1, .., S, ..]``, all rows of the output.
            name: what else the rows depend on. ``text``: the keys of the rows, of one size each.
        """
        count = rows.shape[self.axis]
        with self._lock, torch.inference_mode(False), torch.no_grad():
            width = len(text) // count
            if name != self._name or not (text.startswith(self._text) or self._text.startswith(text)):
                self._text = b""
                self._name = name
            if not self._text or count > self._room:
                self._make_room(rows, count + count // 4 + 64)
            held = len(self._text) // width
            if held < count and self._own is not None:
                self._own[held:count] = rows.movedim(self.axis, 0)[held:].flatten(1)
                self._text = text
            whole = self._lent
        assert whole is not None
        clone = torch._lazy_clone(whole)
        return clone[:count].view(rows.shape)

    def _make_room(self, rows: Tensor, room: int) -> None:
        self._text = b""  # first: what is broken off here leaves memory without rows
        size = rows[(0,) * self.axis].shape[1:].numel()
        memory = torch.empty(room * size * rows.dtype.itemsize, dtype=torch.uint8)
        # Two storages over one memory: the one that is lent becomes copy-on-write, the other one stays writable.
        self._own = torch.from_numpy(memory.numpy()).view(rows.dtype).view(room, size)
        self._lent = memory.view(rows.dtype).view(room, size)
        self._room = room
