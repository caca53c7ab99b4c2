"""The decode loop: many prompts, each as long as it is, until each has had enough."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from kvpass import errors
from kvpass.generation.arguments import Arguments, integer, integers
from kvpass.generation.sampling import Processor, Sampling, generators, stops
from kvpass.generation.session import Session, compiled, quiet, takes
from kvpass.generation.speculate import Draft, accept, draft_of


@dataclass(frozen=True)
class Generation:
    """What came of a call of `generate`.

    Attributes:
        tokens: the new tokens of each prompt, an end token included.
        calls: how often the model ran. proposed, accepted: tokens of a draft.
    """

    tokens: list[list[int]]
    calls: int
    proposed: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """The share of a draft's tokens that stood; NaN where there was none."""
        return self.accepted / self.proposed if self.proposed else float("nan")


@dataclass
class _Text:
    """One prompt and what follows it."""

    number: int
    ids: Tensor
    generator: torch.Generator
    made: list[int] = field(default_factory=list)
    done: bool = False


class _Loop:
    """The state of one generation."""

    def __init__(
        self,
        model: Callable[..., Any],
        prompts: list[Tensor],
        count: int,
        sampling: Sampling,
        ends: Sequence[int],
        stop: Any,
        seed: int | None,
        kwargs: dict[str, Any],
        per_text: Collection[str] | None,
    ) -> None:
        self.count = integer(count, "max_new_tokens", 0)
        self.model, self.sampling, self.ends = model, sampling, set(ends)
        self.forward, self.stops = compiled(model), stops(stop)
        self.given = Arguments.of({**quiet(model), **kwargs}, len(prompts), per_text)
        self.texts = [
            _Text(number, ids, own)
            for number, (ids, own) in enumerate(zip(prompts, generators(len(prompts), seed), strict=True))
        ]
        self.calls = self.proposed = self.accepted = 0

    def run(self) -> Iterator[tuple[int, int]]:
        """The number of a prompt and its next token, as they come.

        Texts of one length are a batch. The shortest ones go first, so that they catch up with the others: no row is
        padded, and each text is what it would be alone.
        """
        last = takes(self.model, "logits_to_keep") and "logits_to_keep" not in self.given.values
        given = self.given.replaced({"logits_to_keep": 1} if last else {})
        session: Session | None = None
        held: list[int] = []
        while waiting := [text for text in self.texts if not text.done and len(text.made) < self.count]:
            least = min(len(text.ids) for text in waiting)
            now = [text for text in waiting if len(text.ids) == least]
            ids = torch.stack([text.ids for text in now])
            numbers = [text.number for text in now]
            if session is not None and numbers == held and session.length == least - 1:
                session.extend(ids[:, -1:])
            else:
                session, held = Session(self.forward, ids, None, given.picked(numbers)), numbers
            self.calls += 1
            for text, logits in zip(now, session.held()[:, -1], strict=True):
                token = self.sampling.choose(text.ids, logits, text.generator)
                self._append(text, token)
                yield text.number, token

    def speculate(self, draft: Draft, ahead: int) -> Iterator[tuple[int, int]]:
        """The same, one text after the other, with the proposals of a draft."""
        for text in self.texts:
            while not text.done and len(text.made) < self.count:
                yield from self._checked(text, draft, ahead)

    def _checked(self, text: _Text, draft: Draft, ahead: int) -> Iterator[tuple[int, int]]:
        """Propose, ask the model once, and take what stands."""
        left = min(ahead, self.count - len(text.made) - 1)
        proposals = draft.propose(text.ids, left, self.sampling, text.generator) if left else []
        ids = torch.cat([text.ids, text.ids.new_tensor([token for token, _ in proposals])])
        session = Session(self.forward, ids.unsqueeze(0), None, self.given.picked([text.number]))
        self.calls += 1
        rows = session.held()[0, -(len(proposals) + 1) :]
        if len(rows) <= len(proposals):
            raise errors.InputError("the model returns its last row only: a draft needs the rows of all its tokens")
        wanted = [self.sampling.chances(ids[: len(text.ids) + k], logits) for k, logits in enumerate(rows)]
        stand, after = accept(proposals, wanted, text.generator)
        self.proposed += len(proposals)
        self.accepted += stand
        for token in [*(token for token, _ in proposals[:stand]), after]:
            self._append(text, token)
            yield text.number, token
            if text.done:
                return

    def _append(self, text: _Text, token: int) -> None:
        text.made.append(token)
        text.ids = torch.cat([text.ids, text.ids.new_tensor([token])])
        text.done = token in self.ends or any(stop(text.made) for stop in self.stops)


def _prompts(given: Any, mask: Any) -> list[Tensor]:
    """Each prompt as ``[T]``; columns that a mask leaves out are padding.

    Raises:
        InputError: there is none, or one has no token.
    """
    if isinstance(given, Tensor):
        rows = list(integers(given.reshape(1, -1) if given.dim() < 2 else given, "tokens"))
    elif isinstance(given, (list, tuple)) and given and not isinstance(given[0], int):
        rows = [integers(row, "tokens") for row in given]
    else:
        rows = [integers(given, "tokens")]
    if mask is not None:
        rows = [row[keep.bool()] for row, keep in zip(rows, torch.as_tensor(mask).reshape(len(rows), -1), strict=True)]
    if not rows:
        raise errors.InputError("there is no prompt to continue")
    for row in rows:
        if row.dim() != 1 or not row.numel():
            raise errors.InputError(f"a prompt is a row of at least one token, not {row.dtype}{tuple(row.shape)}")
    return [row.long() for row in rows]


def _ends(given: Any) -> list[int]:
    return [] if given is None else integers(given, "end tokens").reshape(-1).tolist()


def _processors(given: Any) -> tuple[Processor, ...]:
    several = tuple(given) if isinstance(given, Iterable) else (given,)
    for one in several:
        if not callable(one):
            raise errors.InputError(f"logits_processor is a function of ids and scores, or several, not {one!r}")
    return several


def _is_streamer(given: Any) -> bool:
    return callable(getattr(given, "put", None)) and callable(getattr(given, "end", None))


def generate(
    model: Callable[..., Any],
    input_ids: Any,
    max_new_tokens: int = 128,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    pad_token_id: int | None = None,
    stop: Any = None,
    seed: int | None = None,
    streamer: Any = None,
    logits_processor: Processor | Iterable[Processor] = (),
    attention_mask: Tensor | None = None,
    draft: Any = None,
    k: int = 4,
    details: bool = False,
    per_text: Collection[str] | None = None,
    **model_kwargs: Any,
) -> Any:
    """Continue prompts.

    Each text is what it would be alone: prompts of several lengths are not padded, a text that is done leaves the
    batch, and every text draws from a generator of its own.

    Args:
        model: compiled with ``backend="kvpass"``; a module that is not is compiled now.
        input_ids: ``[B, T]`` or ``[T]``, or a list of prompts of any lengths.
        eos_token_id: one token or several that end a text; they are part of it.
        pad_token_id: fills the rows of texts that ended early; by default the end token, or 0.
        stop: a function of the new tokens, or lists of tokens, any of which ends a text.
        seed: reproduces a call; texts differ by their place in the batch.
        streamer: gets the prompt, then each token (`put`, `end`), as transformers' do; for one prompt.
        logits_processor: a function of ids ``[1, T]`` and scores ``[1, V]``, or several; transformers' are.
        attention_mask: ``[B, T]``, zero where ``input_ids`` is padded; padding is cut off.
        draft: a smaller model, or "prompt-lookup": proposes ``k`` tokens at a time.
        details: return a `Generation` instead.
        per_text: names of ``model_kwargs`` whose tensors have an entry for each prompt; by default tensors of whole
            numbers, or of several axes, with as many entries as there are prompts.
        **model_kwargs: of every call of the model.

    Returns:
        ``[B, T + N]`` where ``input_ids`` is a tensor and nothing was cut off; otherwise a list of ``[T + N]``.

    Raises:
        InputError: an argument is out of its range, or there is nothing to continue.
    """
    if streamer is not None and not _is_streamer(streamer):
        raise errors.InputError(f"a streamer has methods put and end, not {streamer!r}")
    loop, tokens = _begun(
        model, input_ids, max_new_tokens, do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, eos_token_id=eos_token_id, stop=stop, seed=seed,
        logits_processor=logits_processor, attention_mask=attention_mask, draft=draft, k=k, per_text=per_text,
        **model_kwargs,
    )  # fmt: skip
    if streamer is not None:
        streamer.put(_only(loop, "a streamer").unsqueeze(0))
    for _, token in tokens:
        if streamer is not None:
            streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    if details:
        return Generation([text.made for text in loop.texts], loop.calls, loop.proposed, loop.accepted)
    texts = [text.ids for text in loop.texts]
    if not isinstance(input_ids, Tensor) or attention_mask is not None:
        return texts
    fill = pad_token_id if pad_token_id is not None else next(iter(_ends(eos_token_id)), 0)
    whole = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=fill)
    return whole.to(input_ids.dtype)


def stream(model: Callable[..., Any], input_ids: Any, max_new_tokens: int = 128, **options: Any) -> Iterator[int]:
    """The tokens that follow one prompt, as they come.

    Args:
        **options: those of `generate`, but for ``streamer`` and ``details``.

    Raises:
        InputError: an argument is out of its range, or there is more than one prompt.
    """
    loop, tokens = _begun(model, input_ids, max_new_tokens, **options)
    _only(loop, "a stream")
    return (token for _, token in tokens)


def _begun(
    model: Callable[..., Any],
    input_ids: Any,
    count: int,
    *,
    eos_token_id: Any = None,
    stop: Any = None,
    seed: int | None = None,
    logits_processor: Any = (),
    attention_mask: Any = None,
    draft: Any = None,
    k: int = 4,
    per_text: Collection[str] | None = None,
    **options: Any,
) -> tuple[_Loop, Iterator[tuple[int, int]]]:
    """A loop, and the number of a prompt with its next token, as they come."""
    chosen = {f.name: options.pop(f.name) for f in fields(Sampling) if f.name in options}
    sampling = Sampling(**chosen, processors=_processors(logits_processor))
    prompts = _prompts(input_ids, attention_mask)
    first = None if seed is None else integer(seed, "seed")
    loop = _Loop(model, prompts, count, sampling, _ends(eos_token_id), stop, first, options, per_text)
    if draft is None:
        return loop, loop.run()
    return loop, loop.speculate(draft_of(draft), integer(k, "k", 1))


def _only(loop: _Loop, who: str) -> Tensor:
    if len(loop.texts) != 1:
        raise errors.InputError(f"{who} follows one prompt, not {len(loop.texts)}")
    return loop.texts[0].ids
