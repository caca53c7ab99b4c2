"""One compiled model, one cache, a long history of calls: after each call the plain model has the last word."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from tests.models import Config, Tokens, Transformer, make_call
from tests.models.config import LAST_K
from tests.property.oracle import Mismatch, Model, check_same, clone, compare, identical

LONGEST = 40
HELD = 4


class Stats(Protocol):
    """What a session reads from `kvpass.Cache.stats()`."""

    @property
    def rows_computed(self) -> int: ...
    @property
    def bytes_used(self) -> int: ...
    @property
    def bytes_capacity(self) -> int: ...
    @property
    def pages_pinned(self) -> int: ...


class CacheLike(Protocol):
    def stats(self) -> Stats: ...


class NoReuse(AssertionError):
    """The answer was right and too much, or too little, was computed for it."""


class Session:
    """The calls that a user may make, one method each. Every method ends with all answers checked.

    Args:
        counted: the cache is large enough to hold every text, so that the work of a call can be told exactly.
    """

    def __init__(
        self, config: Config, model: Transformer, fast: Model, cache: CacheLike, seed: int, *, counted: bool
    ) -> None:
        self.config, self.model, self.fast, self.cache = config, model, fast, cache
        self.counted = counted
        self.disturbed = False  # weights or answers were written to: more may be known than `known` says
        self.random = random.Random(seed)
        self.text: Tokens = self.tokens(5)
        self.known: list[Tokens] = []
        self.held: list[tuple[Any, Any]] = []
        self.log: list[str] = []

    def tokens(self, count: int) -> Tokens:
        return tuple(self.random.randrange(self.config.vocab) for _ in range(count))

    # --- one call -------------------------------------------------------------------------------------------------

    def call(self, batch: Sequence[Tokens], pads: Sequence[int] | None = None) -> Any:
        """Both models on `batch`; the answer is compared, the work counted, older answers looked at again."""
        self.log.append(f"call({[len(t) for t in batch]}) {batch}" + (f" pads={pads}" if pads else ""))
        call = make_call(self.config, batch, pads)
        before = self.cache.stats().rows_computed
        got = check_same(self.fast, self.model, call.args, call.rows)
        self.check_work(batch, pads, self.cache.stats().rows_computed - before)
        self.check_cache()
        self.check_held()
        self.held = [*self.held[1 - HELD :], (got, clone(got))]
        self.remember(batch, pads)
        return got

    def remember(self, batch: Sequence[Tokens], pads: Sequence[int] | None) -> None:
        # A padded text has another mask, and other keys: it says nothing of the same tokens without padding.
        if self.too_short(batch):
            return
        for row, text in enumerate(batch):
            pad = pads[row] if pads else 0
            self.known.append(tuple(-1 for _ in range(pad)) + text[pad:])

    def too_short(self, batch: Sequence[Tokens]) -> bool:
        """A single row proves nothing (KV102), and of a text shorter than `LAST_K` Dynamo makes a graph of fixed length
        (KV101): both run unrewritten, and nothing is remembered of them.
        """
        return len(batch[0]) < (LAST_K if self.config.output == "last_k" else 2)

    def new_rows(self, text: Tokens) -> int:
        """How many rows of `text` no earlier call has computed."""
        shared = 0
        for other in self.known:
            length = 0
            while length < min(len(text), len(other)) and text[length] == other[length]:
                length += 1
            shared = max(shared, length)
        return len(text) - shared

    def check_work(self, batch: Sequence[Tokens], pads: Sequence[int] | None, computed: int) -> None:
        """Work is proportional to what is new (C2), exactly: neither nothing is remembered, nor too much."""
        if not (self.counted and self.config.provable) or pads or self.too_short(batch):
            return
        new = max(self.new_rows(text) for text in batch)
        # A batch computes from its smallest prefix.
        # Of a text that is known, what the caller gets may be computed again: the last rows.
        again = LAST_K if self.config.output == "last_k" else 1
        least, most = new, max(new, again) * len(batch)
        if self.disturbed:
            least = 0
        if not least <= computed <= most:
            raise NoReuse(f"{computed} rows were computed where {new} of {len(batch[0])} are new (batch {len(batch)})")

    def check_cache(self) -> None:
        stats = self.cache.stats()
        if stats.pages_pinned:
            raise AssertionError(f"{stats.pages_pinned} pages are still pinned after the call")
        if stats.bytes_used > stats.bytes_capacity:
            raise AssertionError(f"{stats.bytes_used} bytes used of {stats.bytes_capacity}")

    def check_held(self) -> None:
        for got, kept in self.held:
            if not identical(got, kept):
                raise Mismatch("an answer given earlier was changed by a later call")

    # --- histories ------------------------------------------------------------------------------------------------

    def grow(self, count: int) -> None:
        """The text as it stands, and `count` tokens more."""
        if len(self.text) + count > LONGEST:
            self.text = self.text[: 2 + self.random.randrange(LONGEST // 2)]
        self.text = self.text + self.tokens(count)
        self.call([self.text])

    def branch(self) -> None:
        """Another token somewhere in the middle, the rest as it was."""
        at = self.random.randrange(len(self.text))
        other = (self.text[at] + 1) % self.config.vocab
        self.text = (*self.text[:at], other, *self.text[at + 1 :])
        self.call([self.text])

    def shrink(self) -> None:
        self.text = self.text[: 2 + self.random.randrange(len(self.text))]
        self.call([self.text])

    def repeat(self) -> None:
        self.call([self.text])

    def fresh(self, count: int) -> None:
        """A text that shares nothing but chance with the others."""
        self.text = self.tokens(count)
        self.call([self.text])

    def go_back(self) -> None:
        """On with any text of the past."""
        past = [text for text in self.known if -1 not in text]
        if past:
            self.text = self.random.choice(past)
        self.grow(2)

    def batch(self, size: int, *, duplicate: bool = False) -> None:
        """Texts of the past and new ones side by side, cut and filled to one length; perhaps one of them twice."""
        length = self.random.randrange(2, LONGEST)
        rows = [self.text, *(self.random.choice([*self.known, self.tokens(length)]) for _ in range(size - 1))]
        texts = [tuple(max(t, 0) for t in row[:length]) for row in rows]
        texts = [text + self.tokens(length - len(text)) for text in texts]
        if duplicate:
            texts[-1] = texts[0]
        self.call(texts)
        self.text = texts[0]

    def grow_batch(self, size: int) -> None:
        """Three steps of decoding, the texts of a batch side by side."""
        texts = [self.text[:20] + self.tokens(2) for _ in range(size)]
        for _ in range(3):
            self.call(texts)
            texts = [text + self.tokens(1) for text in texts]

    def padded_batch(self, size: int) -> None:
        """Texts of several lengths, filled up from the left, and two steps of decoding."""
        if self.config.inputs != "padding":
            self.grow_batch(size)
            return
        pads = [self.random.randrange(6) for _ in range(size)]
        texts = [(0,) * pad + self.tokens(9 - pad) for pad in pads]
        for _ in range(3):
            self.call(texts, pads)
            texts = [text + self.tokens(1) for text in texts]

    # --- disturbances ---------------------------------------------------------------------------------------------

    def mutate(self, how: str) -> None:
        """Change a weight behind the back of the compiled model, and ask the same again."""
        # Noise on matrices: a bias on the keys, or a constant added to a row, does not get through a softmax or a norm.
        names = [name for name, p in self.model.named_parameters() if p.dim() > 1]
        name = self.random.choice(names)
        parameter = self.model.get_parameter(name)
        noise = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(self.log)))
        with torch.no_grad():
            if how == "add":
                parameter.add_(noise)
            elif how == "data":
                parameter.data.neg_()
            elif how == "row":
                parameter.data[self.random.randrange(len(parameter))].neg_()
            elif how == "replace":
                parameter.data = parameter.data.roll(1, 0)
            else:
                state = {key: value.clone() for key, value in self.model.state_dict().items()}
                state[name] = state[name] + noise.to(parameter.dtype)
                self.model.load_state_dict(state)
        self.disturb(f"mutate({how}) {name}")
        self.call([self.text])

    def scribble(self) -> None:
        """Write into a returned answer, and ask the same again."""
        got = self.call([self.text])
        self.disturb("write into that answer")
        self.overwrite(got)
        self.call([self.text])

    def scribble_older(self) -> None:
        """Write into an answer after a newer one was given: the newer one must not change."""
        text = (self.text + self.tokens(3))[:LONGEST]
        older = self.call([text[:-2]])
        newer = self.call([text])
        kept = clone(newer)
        self.disturb("write into the one before the last")
        self.overwrite(older)
        if not identical(newer, kept):
            raise Mismatch("writing into an older answer changed a newer one")
        self.call([text])
        self.call([text[:-2]])

    def overwrite(self, answer: Any) -> None:
        self.held = [pair for pair in self.held if pair[0] is not answer]
        for leaf in pytree.tree_leaves(answer):
            leaf.fill_(7.5)
        self.check_held()

    def disturb(self, what: str) -> None:
        self.log.append(what)
        self.disturbed = True
        self.known.clear()

    def fail(self) -> None:
        """Token ids out of range: the model raises, and the cache is as it was."""
        if self.config.inputs == "embeds":
            self.repeat()
            return
        text = (self.text + self.tokens(2))[-LONGEST:]
        bad = (*text[:-2], self.config.vocab + 5, *text[-1:])
        self.log.append(f"fail {bad}")
        before = self.cache.stats()
        args = make_call(self.config, [bad]).args
        try:
            self.fast(*args)
        except (IndexError, ValueError, RuntimeError):
            pass
        else:
            raise Mismatch("ids out of range were answered; the plain model raises IndexError")
        after = self.cache.stats()
        if after.pages_pinned or (self.counted and before.bytes_used != after.bytes_used):
            raise AssertionError(f"a call that raised changed the cache: {before} to {after}")
        self.call([self.text])

    def two_threads(self) -> None:
        """Two texts with a common start, at the same time."""
        texts = [self.text[:10] + self.tokens(4), self.text[:10] + self.tokens(4)]
        self.log.append(f"two threads {texts}")

        def ask(text: Tokens) -> None:
            with torch.no_grad():
                call = make_call(self.config, [text])
                compare(self.fast(*call.args), self.model(*call.args), call.rows)

        with ThreadPoolExecutor(len(texts)) as pool:
            list(pool.map(ask, texts))
        self.remember(texts, None)
        self.check_cache()
        self.check_held()

    def inference(self) -> None:
        """Under `inference_mode` and back: tensors made there may not be written to outside of it."""
        self.text = (self.text + self.tokens(2))[:LONGEST]
        with torch.inference_mode():
            call = make_call(self.config, [self.text])
            self.log.append(f"inference_mode {self.text}")
            check_same(self.fast, self.model, call.args, call.rows)
        self.remember([self.text], None)
        self.call([self.text])
