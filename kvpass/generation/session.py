"""A text that grows, branches and goes back, row by row through the cache.

A session holds ids and asks the compiled model for the whole text; the cache finds the rows that it has. What a session
computed a later call finds, and the other way round, since both are the same call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from kvpass import errors
from kvpass.frontend.api import mark_growing
from kvpass.generation.arguments import Arguments, integer, integers


class Session:
    """One or more texts of one length. `open` makes it; use it in a ``with`` block or call `close`.

    A session that is closed raises `InputError` when it is used.
    """

    def __init__(self, forward: Callable[..., Any], ids: Tensor, name: str | None, given: Arguments) -> None:
        self._forward, self._name, self._given = forward, name, given
        self._ids: Tensor | None = ids
        self._said: Tensor | None = self._logits(ids, given)

    @property
    def ids(self) -> Tensor:
        """``[B, T]``, all tokens so far."""
        if self._ids is None:
            raise errors.InputError("this session is closed")
        return self._ids

    @property
    def logits(self) -> Tensor:
        """What the model says of the last rows, ``[B, R, V]``; after `rewind` it is asked again when this is read."""
        return self.held().clone()

    def held(self) -> Tensor:
        """The same, and the session's own: not to be written into."""
        ids = self.ids
        if self._said is None:
            self._said = self._logits(ids, self._given)
        return self._said

    @property
    def length(self) -> int:
        """``T``, rows of each text."""
        return self.ids.shape[1]

    def extend(self, ids: Tensor | Sequence[int] | int, **kwargs: Any) -> Tensor:
        """Append tokens, and compute their rows alone.

        Args:
            ids: ``[B, N]``; ``[N]`` or one number are for all texts alike.
            **kwargs: replace those that the session was opened with, from now on: a mask that has grown, for one.

        Returns:
            Logits ``[B, N, V]`` of the new rows; fewer, where the model returns only its last ones.

        Raises:
            InputError: there is no new row, or what it is given are no whole numbers.
        """
        held = self.ids
        new = _texts(integers(ids, "tokens").to(held.device, held.dtype))
        if new.shape[0] not in (1, held.shape[0]) or not new.shape[1]:
            raise errors.InputError(f"tokens of shape {tuple(new.shape)} cannot follow {held.shape[0]} texts")
        longer = torch.cat([held, new.expand(held.shape[0], -1)], dim=1)
        given = self._given.replaced(kwargs, longer.shape[1], new.shape[1])
        logits = self._logits(longer, given)[:, -new.shape[1] :]  # raises before anything has changed
        self._ids, self._given, self._said = longer, given, logits
        return logits.clone()

    def rewind(self, rows: int, **kwargs: Any) -> Self:
        """Forget the last rows; what the cache holds of them stays there.

        Args:
            **kwargs: as in `extend`. Those that have grown with the text are cut where nothing is said of them.

        Raises:
            InputError: fewer than one row would be left, or nothing says whether an argument has an entry for each row.
        """
        back = integer(rows, "rows")
        left = self.length - back
        if not 0 < left <= self.length:
            raise errors.InputError(f"{back} rows back from {self.length}: at least one stays")
        if back or kwargs:
            given = self._given.cut(kwargs, left, back) if back else self._given.replaced(kwargs, left)
            self._ids, self._said, self._given = self.ids[:, :left], None, given
        return self

    def fork(self, k: int) -> Session:
        """A session with ``k`` copies of each text, side by side; this one stays as it is.

        Raises:
            InputError: there is to be no copy, or nothing says whether an argument has an entry for each text
                (``per_text`` of `open`).
        """
        return self._picked(torch.arange(self.ids.shape[0]).repeat_interleave(integer(k, "k", 1)))

    def reorder(self, rows: Tensor | Sequence[int]) -> Self:
        """Texts by their numbers, in the order given; any may come several times or not at all.

        Raises:
            InputError: there is no text of such a number; as in `fork`.
        """
        count, chosen = self.ids.shape[0], integers(rows, "numbers of texts").long()
        if chosen.dim() != 1 or not chosen.numel() or not bool(((chosen >= 0) & (chosen < count)).all()):
            raise errors.InputError(f"of {count} texts one at least is chosen by its number, and not by {rows}")
        other = self._picked(chosen)
        self._ids, self._said, self._given = other.ids, other._said, other._given
        return self

    def close(self) -> None:
        """Let go of everything; the rows stay in the cache."""
        self._ids, self._given, self._said = None, Arguments({}, 0), None

    def _picked(self, rows: Tensor) -> Session:
        rows = rows.to(self.ids.device)
        other = object.__new__(Session)
        other._forward, other._name, other._given = self._forward, self._name, self._given.picked(rows)
        other._ids, other._said = self.ids[rows], None if self._said is None else self._said[rows]
        return other

    def _logits(self, ids: Tensor, given: Arguments) -> Tensor:
        kwargs = given.values
        mark_growing(ids, kwargs)
        with torch.no_grad():
            if self._name is None:
                return logits_of(self._forward(ids, **kwargs))
            return logits_of(self._forward(**{self._name: ids}, **kwargs))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._ids is None:
            return "<kvpass.Session, closed>"
        return f"<kvpass.Session {self._ids.shape[0]} x {self._ids.shape[1]} rows>"


def open(
    model: Callable[..., Any],
    input_ids: Tensor | Sequence[int],
    /,
    *,
    ids_name: str | None = None,
    per_text: Collection[str] | None = None,
    **kwargs: Any,
) -> Session:
    """Begin a session with a prompt, whose rows are computed where the cache does not have them.

    Args:
        model: compiled with ``backend="kvpass"``; a module that is not is compiled now.
        input_ids: ``[B, T]``, or ``[T]`` for one text.
        ids_name: by which keyword the model takes the ids, ``decoder_input_ids`` for one, beside ``input_ids=`` for its
            encoder; by default they are its first argument.
        per_text: names of keywords whose tensors have an entry for each text, which `Session.fork` and
            `Session.reorder` take along; by default those of whole numbers or of several axes whose first size is
            ``B``.
        **kwargs: of every call of the model; read anew in each.

    Raises:
        InputError: there is no token, or the model returns no logits.
    """
    ids = _texts(integers(input_ids, "tokens"))
    if ids.dim() != 2 or not ids.numel():
        raise errors.InputError(f"a prompt is [B, T] with at least one token, not {tuple(ids.shape)}")
    given = Arguments.of({**quiet(model), **kwargs}, ids.shape[0], per_text, ids.shape[1])
    return Session(compiled(model), ids.clone(), ids_name, given)


def _texts(ids: Tensor) -> Tensor:
    """``[B, N]``, of one text where there is no axis for several."""
    return ids.reshape(1, -1) if ids.dim() < 2 else ids


def compiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model itself where it, or its forward, has been compiled; otherwise compiled now."""
    if not isinstance(model, nn.Module) or isinstance(model, torch._dynamo.OptimizedModule):
        return model
    forward = model.forward
    if hasattr(forward, "_torchdynamo_orig_callable") or hasattr(forward, "get_compiler_config"):
        return model
    made: Callable[..., Any] = torch.compile(model, backend="kvpass")
    return made


def quiet(model: Callable[..., Any]) -> dict[str, Any]:
    """What a model has to be told so that it keeps no cache of its own."""
    return {"use_cache": False} if takes(model, "use_cache") else {}


def takes(model: Callable[..., Any], name: str) -> bool:
    """Whether a model has a keyword."""
    inner = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model
    function = inner.forward if isinstance(inner, nn.Module) else inner
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def logits_of(output: Any) -> Tensor:
    """``[B, R, V]`` of whatever a model returns: a tensor, an object with ``logits``, a mapping or a tuple.

    Raises:
        InputError: there is none.
    """
    found = getattr(output, "logits", output)
    if isinstance(found, Mapping):
        found = found.get("logits")
    elif isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        raise errors.InputError(f"the model returned a {type(output).__name__} without logits [B, T, V]")
    return found if found.dim() == 3 else found.unsqueeze(1)
