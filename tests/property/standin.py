"""Stand-ins for a compiled model, right and wrong in known ways, on which the sessions themselves are tested."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.models import Transformer


@dataclass(frozen=True)
class Counts:
    """The fields of `kvpass.Cache.stats()` that sessions read."""

    rows_computed: int = 0
    bytes_used: int = 0
    bytes_capacity: int = 1 << 30
    pages_pinned: int = 0


class Memo:
    """Answers like the model and keeps the books of a perfect cache: every row of a text that was seen is reused.

    Args:
        forgets: keeps the books of a compiler that never reuses anything.
        shortest: shorter texts are not remembered (`Session.too_short`).
    """

    def __init__(self, model: Callable[..., Any], *, forgets: bool = False, shortest: int = 2) -> None:
        self.model, self.forgets, self.shortest = model, forgets, shortest
        self.seen: set[bytes] = set()
        self.counts = Counts()
        self.weights = self.fingerprint()

    def fingerprint(self) -> float:
        if not isinstance(self.model, torch.nn.Module):
            return 0.0
        return sum(float(p.detach().double().sum()) for p in self.model.parameters())

    def stats(self) -> Counts:
        return self.counts

    def __call__(self, *args: Tensor | None) -> Any:
        answer = self.model(*args)
        if self.fingerprint() != self.weights or self.forgets:
            self.seen.clear()
            self.weights = self.fingerprint()
        texts = args[0]
        assert texts is not None
        mask = args[2] if len(args) > 2 and args[2] is not None else torch.ones(texts.shape[:2])
        length = texts.shape[1]
        keys = [[_key(t[: i + 1], m[: i + 1]) for i in range(length)] for t, m in zip(texts, mask, strict=True)]
        cached = min(sum(key in self.seen for key in row) for row in keys)
        if length >= self.shortest:
            self.seen.update(key for row in keys for key in row)
        self.counts = replace(self.counts, rows_computed=self.counts.rows_computed + length - cached)
        return answer


def _key(text: Tensor, mask: Tensor) -> bytes:
    return repr((text.tolist(), mask.tolist())).encode()


class Aliasing:
    """Answers a repeated question with the very tensor that it gave before."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.kept: dict[str, Any] = {}

    def __call__(self, *args: Tensor | None) -> Any:
        key = repr([None if a is None else a.tolist() for a in args])
        if key not in self.kept:
            self.kept[key] = self.model(*args)
        return self.kept[key]


class SharedBuffer:
    """Gives views of one buffer that it writes again on every call."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.buffer = torch.empty(0)

    def __call__(self, *args: Tensor | None) -> Tensor:
        answer = self.model(*args)
        assert isinstance(answer, Tensor)
        if self.buffer.numel() < answer.numel():
            self.buffer = torch.empty(4 * answer.numel(), dtype=answer.dtype)
        view = self.buffer[: answer.numel()].view(answer.shape)
        return view.copy_(answer)


class Frozen:
    """Computes with the weights as they were at the first call."""

    def __init__(self, model: Transformer) -> None:
        self.model = copy.deepcopy(model)

    def __call__(self, *args: Tensor | None) -> Any:
        return self.model(*args)


class Swallowing:
    """Answers where the model raises."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def __call__(self, *args: Tensor | None) -> Any:
        ids = args[0]
        assert ids is not None
        return self.model(ids.clamp(max=self.model.config.vocab - 1), *args[1:])


class ShiftedMask(Transformer):
    """Every query sees one key of the future."""

    def make_masks(self, x: Tensor, padding: Tensor | None, passed_in: Tensor | None) -> tuple[Tensor, Tensor]:
        full, narrow = super().make_masks(x, padding, passed_in)
        index = torch.arange(x.shape[1])
        future = index[None, :] == index[:, None] + 1
        return full | future, narrow | future


class LostKey(Transformer):
    """From the tenth row on, no query sees the first key that its mask allows."""

    def make_masks(self, x: Tensor, padding: Tensor | None, passed_in: Tensor | None) -> tuple[Tensor, Tensor]:
        return tuple(  # type: ignore[return-value]
            mask
            & ((mask.long().cumsum(-1) != 1) | (torch.arange(x.shape[1])[:, None] < 10) | (mask.sum(-1, True) == 1))
            for mask in super().make_masks(x, padding, passed_in)
        )


class ShiftedPosition(Transformer):
    """Counts the rows after the tenth from one too many."""

    def forward(self, ids: Tensor, position: Tensor | None = None, *rest: Tensor | None) -> Any:
        position = torch.arange(ids.shape[1]) if position is None else position
        return super().forward(ids, position + (position >= 10), *rest)


class SwappedRows(Transformer):
    """Rows four to seven are taken from another page."""

    def forward(self, ids: Tensor, *rest: Tensor | None) -> Any:
        if ids.shape[1] < 12:
            return super().forward(ids, *rest)
        order = torch.cat((torch.arange(4), torch.arange(8, 12), torch.arange(8, ids.shape[1])))
        return super().forward(ids[:, order], *rest)


def like(model: Transformer, kind: type[Transformer]) -> Transformer:
    """`model` with the fault of `kind`, and the same weights: not a copy of them."""
    wrong = kind.__new__(kind)
    wrong.__dict__ = model.__dict__
    return wrong
