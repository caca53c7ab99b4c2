"""``kvpass demo``: stream a text through kvpass, then time the same decode loop without a cache and with two."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kvpass import demos
from kvpass.errors import InputError
from kvpass.frontend import wait
from kvpass.huggingface import import_transformers
from kvpass.progress import progress, waiting

Forward: TypeAlias = Callable[[Tensor], Tensor]  # ids [1, T] to logits [1, 1 or T, V]


@dataclass
class Track:
    """One way to decode: its forward, the tokens it chose, and the seconds that each step took."""

    name: str
    forward: Forward
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, prompt: Tensor) -> int:
        """Choose one token greedily after ``prompt`` [1, T] and the tokens so far; appends it and returns it."""
        ids = torch.cat([prompt, torch.tensor([self.tokens], dtype=prompt.dtype)], dim=1)
        start = time.perf_counter()
        token = int(self.forward(ids)[0, -1].argmax())
        self.seconds.append(time.perf_counter() - start)
        self.tokens.append(token)
        return token

    @property
    def rate(self) -> float:
        """Tokens per second after the first, which pays for the prompt."""
        return len(self.seconds[1:]) / sum(self.seconds[1:])


def plain(model: Callable[..., Any], kwargs: dict[str, object]) -> Forward:
    """The model as a function of all ids: without a cache if it is the model itself, through kvpass if compiled."""

    def forward(ids: Tensor) -> Tensor:
        output = model(ids, **kwargs)
        logits: Tensor = getattr(output, "logits", output)
        return logits

    return forward


def dynamic_cache(model: nn.Module) -> Forward:
    """The model with Hugging Face's DynamicCache, fed with the ids that it has not seen; for one growing text."""
    past = {_cache_name(model): import_transformers().DynamicCache(config=model.config)}
    seen = 0

    def forward(ids: Tensor) -> Tensor:
        nonlocal seen
        logits: Tensor = model(ids[:, seen:], use_cache=True, logits_to_keep=1, **past).logits
        seen = ids.shape[1]
        return logits

    return forward


def _cache_name(model: nn.Module) -> str:
    """The argument for a cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def take_turns(tracks: Sequence[Track], prompt: Tensor, count: int) -> Iterator[int]:
    """Decode ``count`` tokens on every track, one step of each in turn, so that a busy machine slows all alike.

    Yields the number of tokens that every track has after each round.
    """
    for done in range(1, count + 1):
        for track in tracks:
            track.step(prompt)
        yield done


def difference(tracks: Sequence[Track], decode: Callable[[list[int]], str] = str) -> str | None:
    """One sentence on the first token at which the tracks part, or None if all sequences are equal."""
    first = tracks[0]
    for track in tracks[1:]:
        for place, (a, b) in enumerate(zip(first.tokens, track.tokens, strict=True)):
            if a != b:
                return (
                    f"token {place + 1} differs: {first.name} chose {decode([a])!r} (id {a}), "
                    f"{track.name} chose {decode([b])!r} (id {b})"
                )
    return None


def run(name: str, tokens: int, prompt: str | None = None, backend: str = "kvpass") -> int:
    """The whole demo, on standard output.

    Args:
        name: of `demos.DEMOS`.
        tokens: how many to generate, at least 2, in the stream and on each track of the comparison.
        prompt: text; the registry's own by default.
        backend: of `torch.compile`.

    Returns:
        0 if all ways to decode chose the same tokens, else 1.

    Raises:
        InputError: a package is missing, or the prompt is empty or too long.
    """
    entry = demos.demo(name)
    prompt = entry.prompt if prompt is None else prompt
    with waiting(f"loading {entry.title}"):
        model, tokenizer = entry.load()
    ids = demos.prompt_ids(tokenizer, prompt)
    _check_length(model, ids, tokens)
    fast = torch.compile(model, backend=backend)
    kwargs = dict(entry.kwargs)
    with torch.no_grad():
        with waiting("compiling"):
            warm_up(plain(fast, kwargs), ids)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{entry.title}: {parameters / 1e6:.1f} million parameters, float32, {torch.get_num_threads()} threads")
        _print_refusals(backend)
        print(f"\n> {prompt}\n")
        _stream(Track("kvpass", plain(fast, kwargs)), ids, tokens, tokenizer.decode, demos.stop_ids(model))
        tracks = [Track("without a cache", plain(model, kwargs)), Track("kvpass", plain(fast, kwargs))]
        if entry.own_cache:
            tracks.insert(1, Track("Hugging Face DynamicCache", dynamic_cache(model)))
        _forget(backend)
        _compare(tracks, ids, tokens)
    return _verdict(tracks, tokenizer.decode)


def _check_length(model: nn.Module, ids: Tensor, tokens: int) -> None:
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None) or getattr(model, "block", None)
    if isinstance(limit, int) and ids.shape[1] + tokens > limit:
        raise InputError(f"the prompt has {ids.shape[1]} tokens; with {tokens} more it passes the model's {limit}")


def warm_up(forward: Forward, ids: Tensor) -> None:
    """Two lengths: Dynamo compiles for the first one alone, then for a symbolic one, and then no more."""
    with _hushed():  # that the first one stays unrewritten is no news here
        forward(ids)
        for more in (2, 3):  # the step that the second one asks for is there when the third one has ended
            forward(torch.cat([ids, ids[:, :more]], dim=1))
            wait()


@contextmanager
def _hushed() -> Iterator[None]:
    log = logging.getLogger("kvpass")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _print_refusals(backend: str) -> None:
    """Say so if no graph was rewritten; the demo then shows a plain compiled model."""
    if backend != "kvpass":
        return
    import kvpass

    latest = kvpass.reports()
    if latest and not any(report.proven for report in latest):
        for refusal in latest[-1].refusals:
            print(f"not rewritten: {refusal.code} {refusal.message}")


def _forget(backend: str) -> None:
    """Empty the cache: the comparison must not find the rows of the stream."""
    if backend == "kvpass":
        import kvpass

        kvpass.default_cache().clear()


def _stream(track: Track, ids: Tensor, count: int, decode: Callable[[list[int]], str], stop: frozenset[int]) -> None:
    shown = ""
    for _ in range(count):
        if track.step(ids) in stop:
            track.tokens.pop()
            break
        text = decode(track.tokens)
        if not text.endswith("\ufffd"):  # half of a character whose other bytes are still to come
            print(text.removeprefix(shown), end="", flush=True)
            shown = text
    print("\n")


def _compare(tracks: Sequence[Track], ids: Tensor, count: int) -> None:
    print(f"{ids.shape[1]} tokens of prompt, then {count} greedy tokens each way, one step of each in turn:")
    with progress() as bar:
        task = bar.add_task("comparing", total=count)
        for done in take_turns(tracks, ids, count):
            bar.update(task, completed=done)
    slowest = tracks[0].rate
    for track in tracks:
        ratio = f"{track.rate / slowest:6.1f} times" if track is not tracks[0] else ""
        first = f"first token after {track.seconds[0]:.2f} s"
        print(f"  {track.name:<26}{track.rate:8.1f} tokens/s   {first} {ratio}")


def _verdict(tracks: Sequence[Track], decode: Callable[[list[int]], str]) -> int:
    found = difference(tracks, decode)
    count = {2: "two", 3: "three"}[len(tracks)]
    print(f"the {count} token sequences are {'equal' if found is None else 'NOT equal: ' + found}")
    return 0 if found is None else 1
