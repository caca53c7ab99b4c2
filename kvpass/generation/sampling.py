"""From logits to a token: the filters of the field, and a draw that a seed reproduces.

Temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024) and the repetition penalty (Keskar et al.
2019), in the order in which Hugging Face's `generate` applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpass import errors
from kvpass.generation.arguments import integer

Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        processors: each gets the ids ``[1, T]`` and the scores ``[1, V]`` and returns scores; they run first.

    Raises:
        InputError: a number is out of its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    processors: tuple[Processor, ...] = ()

    def __post_init__(self) -> None:
        positive = {"temperature": self.temperature, "repetition_penalty": self.repetition_penalty}
        for name, value in positive.items():
            if not value > 0:
                raise errors.InputError(f"{name} must be above 0, but it is {value}")
        if self.top_k is not None:
            integer(self.top_k, "top_k", 1)
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0 <= share <= 1:
                raise errors.InputError(f"{name} must be in 0 .. 1, but it is {share}")

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Float32 scores ``[V]`` after every filter; a token that is ruled out has -inf.

        Args:
            ids: ``[T]``, the text. logits: ``[V]``, of its last row.
        """
        scores = logits.float()
        for processor in self.processors:
            scores = processor(ids.unsqueeze(0), scores.unsqueeze(0))[0]
        if self.repetition_penalty != 1:
            seen = scores[ids]
            by = self.repetition_penalty
            scores = scores.scatter(0, ids, torch.where(seen < 0, seen * by, seen / by))
        if not self.do_sample:
            return scores
        scores = scores / self.temperature
        if self.top_k is not None and self.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[-1], -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort()
            low = ordered.softmax(0).cumsum(0) <= 1 - self.top_p
            low[-1] = False
            scores = scores.masked_fill(torch.zeros_like(low).scatter(0, order, low), -torch.inf)
        if self.min_p:
            chance = scores.softmax(0)
            scores = scores.masked_fill(chance < self.min_p * chance.max(), -torch.inf)
        return scores

    def chances(self, ids: Tensor, logits: Tensor) -> Tensor:
        """The distribution ``[V]`` that a token is drawn from, on the host; on one token where nothing is sampled."""
        scores = self.scores(ids, logits).cpu()
        if self.do_sample:
            return scores.softmax(0)
        return torch.zeros_like(scores).index_fill(0, scores.argmax().reshape(1), 1.0)

    def choose(self, ids: Tensor, logits: Tensor, generator: torch.Generator) -> int:
        """One token."""
        scores = self.scores(ids, logits)
        return draw(scores.softmax(0), generator) if self.do_sample else int(scores.argmax())


def draw(chances: Tensor, generator: torch.Generator) -> int:
    """One token of a distribution ``[V]``."""
    return int(torch.multinomial(chances.cpu(), 1, generator=generator))


def generators(count: int, seed: int | None) -> list[torch.Generator]:
    """One for each text, so that what one text draws does not depend on the others."""
    first = int(torch.randint(1 << 62, (1,))) if seed is None else seed
    return [torch.Generator().manual_seed((first * 0x9E3779B97F4A7C15 + row) % (1 << 63)) for row in range(count)]


def _ends_with(end: list[int], tokens: Sequence[int]) -> bool:
    return list(tokens[-len(end) :]) == end


def stops(stop: Any) -> list[Callable[[Sequence[int]], bool]]:
    """Conditions on the tokens that were made: sequences of tokens at their end, or functions of them.

    Raises:
        InputError: a condition is neither.
    """
    made: list[Callable[[Sequence[int]], bool]] = []
    for one in [] if stop is None else [stop] if callable(stop) else stop:
        if callable(one):
            made.append(one)
        elif isinstance(one, (list, tuple)) and one and all(isinstance(token, int) for token in one):
            made.append(partial(_ends_with, list(one)))
        else:
            raise errors.InputError(f"a stop is a function of the tokens or a list of them, not {one!r}")
    return made
