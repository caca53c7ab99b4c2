"""Keyword arguments of a model's calls, and which of their tensors have an entry for each text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kvpass import errors


@dataclass(frozen=True)
class Arguments:
    """What every call of a model gets beside the ids.

    Attributes:
        batch: how many texts there are.
        per_text: names of arguments that have an entry for each text, where the caller said which.
    """

    values: dict[str, Any]
    batch: int
    per_text: frozenset[str] | None = None
    _own: dict[str, list[bool | None]] = field(default_factory=dict)  # by tensor; None where nothing says it

    @classmethod
    def of(cls, values: Mapping[str, Any], batch: int, per_text: Collection[str] | None = None) -> Arguments:
        """The arguments of the first call, for all texts.

        Raises:
            InputError: an argument that is said to have an entry for each text has none, or is not there.
        """
        said = None if per_text is None else frozenset([per_text] if isinstance(per_text, str) else per_text)
        for name in (said or frozenset()) - values.keys():
            raise errors.InputError(f"per_text names {name!r}, which is no argument of the model's in this call")
        return cls({}, batch, said).replaced(values)

    def replaced(self, values: Mapping[str, Any]) -> Arguments:
        """With other values of these names.

        A tensor that had no entry for each text before has none now, whatever its size.
        """
        own = dict(self._own)
        for name, value in values.items():
            found = [self._is_own(name, leaf) for leaf in pytree.tree_leaves(value)]
            held = own.get(name)
            if held is not None and len(held) == len(found) and self.per_text is None:
                found = [False if before is False else now for now, before in zip(found, held, strict=True)]
            own[name] = found
        return replace(self, values={**self.values, **values}, _own=own)

    def picked(self, rows: Tensor | Sequence[int]) -> Arguments:
        """For texts by their numbers.

        Raises:
            InputError: no one said whether an argument has an entry for each text.
        """
        at = torch.as_tensor(rows)
        if at.tolist() == list(range(self.batch)):
            return self
        chosen = {name: self._chosen(name, value, at) for name, value in self.values.items()}
        return replace(self, values=chosen, batch=len(at))

    def _chosen(self, name: str, value: Any, at: Tensor) -> Any:
        leaves, spec = pytree.tree_flatten(value)
        for k, own in enumerate(self._own[name]):
            if own is None:
                raise errors.InputError(
                    f"{name} has as many entries as there are texts ({self.batch}), and nothing says whether there is "
                    f"one for each: say per_text=[{name!r}], or per_text=[] where all texts share it"
                )
            if own:
                leaves[k] = leaves[k][at.to(leaves[k].device)]
        return pytree.tree_unflatten(leaves, spec)

    def _is_own(self, name: str, leaf: Any) -> bool | None:
        if not isinstance(leaf, Tensor) or (self.per_text is not None and name not in self.per_text):
            return False
        fits = leaf.dim() > 0 and leaf.shape[0] == self.batch
        if self.per_text is not None:
            if not fits:
                raise errors.InputError(
                    f"{name} of shape {tuple(leaf.shape)} has no entry for each of {self.batch} texts"
                )
            return True
        if not fits or leaf.dim() > 1 or not leaf.is_floating_point():
            return fits
        return None if self.batch > 1 else False  # a scale of each text, or a bias that is as long by chance
