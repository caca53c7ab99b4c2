"""Arguments of a model's calls, and which of their tensors have an entry for each text, or for each row."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kvpass import errors


def integers(given: Any, what: str) -> Tensor:
    """Numbers of the caller's as a tensor.

    Raises:
        InputError: they are no whole numbers.
    """
    try:
        made = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise errors.InputError(f"{what} are whole numbers in a tensor or a list, not {given!r}: {error}") from error
    if made.numel() and (made.dtype is torch.bool or made.is_floating_point() or made.is_complex()):
        raise errors.InputError(f"{what} are whole numbers, not {made.dtype}")
    return made


def integer(given: Any, name: str, least: int | None = None) -> int:
    """A number of the caller's, or of a tensor with one entry.

    Raises:
        InputError: it is no whole number, or is below ``least``.
    """
    try:
        number = operator.index(given)
    except TypeError as error:
        raise errors.InputError(f"{name} must be a whole number, but it is {given!r}") from error
    if least is not None and number < least:
        raise errors.InputError(f"{name} must be at least {least}, but it is {number}")
    return number


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
    _rows: dict[str, list[tuple[int, ...] | None]] = field(default_factory=dict)  # axes that grow; as above

    @classmethod
    def of(
        cls, values: Mapping[str, Any], batch: int, per_text: Collection[str] | None = None, length: int | None = None
    ) -> Arguments:
        """The arguments of the first call, for all texts, of so many rows.

        Raises:
            InputError: an argument that is said to have an entry for each text has none, or is not there.
        """
        said = None if per_text is None else frozenset([per_text] if isinstance(per_text, str) else per_text)
        for name in (said or frozenset()) - values.keys():
            raise errors.InputError(f"per_text names {name!r}, which is no argument of the model's in this call")
        return cls({}, batch, said).replaced(values, length)

    def replaced(self, values: Mapping[str, Any], length: int | None = None, by: int = 0) -> Arguments:
        """With other values of these names, for texts of so many rows, which are ``by`` more than before.

        A tensor that had no entry for each text before has none now, whatever its size. One that is not replaced has
        none for each row.
        """
        own, rows = dict(self._own), dict(self._rows)
        if by > 0:
            rows = {name: [() for _ in held] for name, held in rows.items()}
        for name, value in values.items():
            found = [self._is_own(name, leaf) for leaf in pytree.tree_leaves(value)]
            held = own.get(name)
            if held is not None and len(held) == len(found) and self.per_text is None:
                found = [False if before is False else now for now, before in zip(found, held, strict=True)]
            own[name] = found
            rows[name] = self._rows_of(name, value, found, length, by)
        return replace(self, values={**self.values, **values}, _own=own, _rows=rows)

    def cut(self, values: Mapping[str, Any], length: int, by: int) -> Arguments:
        """For texts of so many rows, ``by`` less than before: with other values of these names, and the others cut.

        Raises:
            InputError: nothing says whether an argument has an entry for each row.
        """
        kept = {name: self._shorter(name, value, by) for name, value in self.values.items() if name not in values}
        return replace(self.replaced(values, length, -by), values={**kept, **values})

    def _shorter(self, name: str, value: Any, by: int) -> Any:
        def cut(leaf: Any, axes: tuple[int, ...]) -> Any:
            for axis in axes:
                leaf = leaf.narrow(axis, 0, leaf.shape[axis] - by)
            return leaf

        unknown = (
            f"nothing says whether {name} has an entry for each row: say rewind({by}, {name}=...) with what belongs to "
            "the shorter text"
        )
        return _each(value, self._rows[name], cut, unknown)

    def _rows_of(
        self, name: str, value: Any, own: Sequence[bool | None], length: int | None, by: int
    ) -> list[tuple[int, ...] | None]:
        now, before = pytree.tree_leaves(value), pytree.tree_leaves(self.values.get(name))
        if by and len(now) == len(before):
            return [_grown(*((b, a) if by < 0 else (a, b)), abs(by)) for a, b in zip(now, before, strict=True)]
        return [_unknown(leaf, bool(is_own), length) for leaf, is_own in zip(now, own, strict=True)]

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
        unknown = (
            f"{name} has as many entries as there are texts ({self.batch}), and nothing says whether there is one for "
            f"each: say per_text=[{name!r}], or per_text=[] where all texts share it"
        )
        return _each(value, self._own[name], lambda leaf, own: leaf[at.to(leaf.device)] if own else leaf, unknown)

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


T = TypeVar("T")


def _each(value: Any, told: Sequence[T | None], change: Callable[[Any, T], Any], unknown: str) -> Any:
    """Every tensor of an argument, changed by what is known of it.

    Raises:
        InputError: of one nothing is known.
    """
    leaves, spec = pytree.tree_flatten(value)
    for k, known in enumerate(told):
        if known is None:
            raise errors.InputError(unknown)
        leaves[k] = change(leaves[k], known)
    return pytree.tree_unflatten(leaves, spec)


def _unknown(leaf: Any, own: bool, length: int | None) -> tuple[int, ...] | None:
    """None where an axis has as many entries as a text has rows, which may be chance."""
    if not isinstance(leaf, Tensor):
        return ()
    return None if length in leaf.shape[1 if own else 0 :] else ()


def _grown(longer: Any, shorter: Any, by: int) -> tuple[int, ...] | None:
    """The axes along which a tensor has more entries, behind those that it had; None where it has become another."""
    if not isinstance(longer, Tensor) or not isinstance(shorter, Tensor):
        return ()
    if (longer.dim(), longer.dtype) != (shorter.dim(), shorter.dtype):
        return None
    axes = tuple(k for k, size in enumerate(shorter.shape) if longer.shape[k] == size + by)
    begun = longer
    for axis in axes:
        begun = begun.narrow(axis, 0, shorter.shape[axis])
    return axes if not axes or (begun.shape == shorter.shape and torch.equal(begun, shorter.to(begun.device))) else None
