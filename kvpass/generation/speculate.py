"""Speculative decoding: several tokens are proposed, and one call of the model says how many of them stand.

The result has the model's own distribution, whatever the proposals are (the rejection rule of Leviathan et al. 2023 and
Chen et al. 2023); without sampling it is the model's own greedy text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpass import errors
from kvpass.generation.arguments import Arguments
from kvpass.generation.sampling import Sampling, draw
from kvpass.generation.session import Session, compiled, quiet, takes

LONGEST_MATCH = 4  # tokens at the end of a text that are looked for further ahead


Proposals = list[tuple[int, Tensor | None]]
"""Tokens, each with the distribution ``[V]`` that it was drawn from; None where it could have been no other."""


class Draft(Protocol):
    """What proposes tokens."""

    def propose(self, ids: Tensor, count: int, sampling: Sampling, generator: torch.Generator) -> Proposals:
        """At most ``count`` tokens after ``ids`` [T]."""
        ...


class ModelDraft:
    """A smaller model over the same vocabulary, with a cache of its own rows."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self._forward, self._kwargs = compiled(model), quiet(model)
        if takes(model, "logits_to_keep"):
            self._kwargs["logits_to_keep"] = 1

    def propose(self, ids: Tensor, count: int, sampling: Sampling, generator: torch.Generator) -> Proposals:
        made: Proposals = []
        session = Session(self._forward, ids.unsqueeze(0), None, Arguments.of(self._kwargs, 1))
        while True:
            chances = sampling.chances(session.ids[0], session.held()[0, -1])
            made.append((draw(chances, generator), chances))
            if len(made) == count:
                return made
            session.extend(made[-1][0])


class PromptLookup:
    """What followed the last tokens where they stood before in the text (Saxena 2023)."""

    def propose(self, ids: Tensor, count: int, sampling: Sampling, generator: torch.Generator) -> Proposals:
        return [(token, None) for token in _follow(ids, count)]


def _follow(ids: Tensor, count: int) -> list[int]:
    for size in range(min(LONGEST_MATCH, len(ids) - 1), 0, -1):
        windows = ids[:-1].unfold(0, size, 1)
        places = (windows == ids[-size:]).all(1).nonzero().flatten()
        if len(places):
            at = int(places[-1]) + size
            return ids[at : at + count].tolist()
    return []


def draft_of(draft: Any) -> Draft:
    """Raises:
    InputError: it is neither a model nor a way that has a name.
    """
    if draft == "prompt-lookup":
        return PromptLookup()
    if isinstance(draft, str) or not callable(draft):
        raise errors.InputError(f"draft is a model or 'prompt-lookup', not {draft!r}")
    return ModelDraft(draft)


def accept(proposals: Proposals, wanted: list[Tensor], generator: torch.Generator) -> tuple[int, int]:
    """How many proposals stand, and the token after them.

    Args:
        wanted: the model's own distribution ``[V]`` for each proposal, and one more for the token after them all.
    """
    for k, ((token, q), p) in enumerate(zip(proposals, wanted, strict=False)):
        chance = 1.0 if q is None else float(q[token])
        if float(torch.rand((), generator=generator)) * chance < float(p[token]):
            continue
        rest = p.index_fill(0, torch.tensor([token]), 0.0) if q is None else (p - q).clamp(min=0)
        return k, draw(rest if float(rest.sum()) > 0 else p, generator)
    return len(proposals), draw(wanted[-1], generator)
