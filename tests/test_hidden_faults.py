"""Models that were answered wrongly once, each by another claim of the analysis that was false.

The check at compile time is off, so that it hides nothing. A model may be refused; its answers may not differ.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, softplus

import kvpass
from tests.coverage.base import DEPTH, Decoder, build, grid
from tests.property.oracle import check_same
from tests.test_coverage import texts

SIZE = 16


def lengths(most: int = 2) -> Iterator[Tensor]:
    """Texts that grow, are cut and branch, side by side, exchanged, and in batches of other sizes."""
    ids, other = texts(20), texts(13, seed=1)
    yield from (ids[:, :9], ids[:, :10], ids[:, :15], ids[:, :6], ids, ids.flip(0))
    if most > 2:
        yield from (torch.cat((other, ids[:, :13])), torch.cat((ids, ids.flip(0), ids)), ids[:1], ids[1:])


class Texts(Decoder):
    """What is added to every row is made of the number of texts."""

    how = ""

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        x, count, table = super().enter(ids), ids.shape[0], self.head.weight.T  # [SIZE, VOCAB]
        made = {
            "full": lambda: torch.full((), count, dtype=x.dtype),
            "arange": lambda: torch.arange(count - 1, count).to(x.dtype),
            "ones": lambda: torch.ones(count + 1).sum(),
            "entry": lambda: table[0, count],
            "slice": lambda: table[0, count:][:1],
            "mean": lambda: table[0, : count + 1].mean(),
        }
        return x * (1 + made[self.how]())


class Between(Decoder):
    """Something stands between two masks."""

    how = ""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        score = q @ k.mT * DEPTH**-0.5
        window = torch.where(i - j < 3, 0.0, -1e4)
        score = {
            "halved": lambda: (score + window) * 0.01,
            "where": lambda: torch.where(i - j < 3, score, -1e4) * 0.01,
            "clamped": lambda: (score + window).clamp(min=-2),
            "raised": lambda: score + window + 2e4,
            "padded": lambda: (score + (1 - more[0][:, None, None].float()) * -1e4) / 1e3,
        }[self.how]()
        return self.merge(score.masked_fill(j > i, -torch.inf).softmax(-1) @ v, layer)


class Padded(Decoder):
    """Left padding by a finite number, of which rows are read that keep no key."""

    how = ""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        seen = (j <= i) & more[0][:, None, None].bool()
        return self.merge(torch.where(seen, q @ k.mT * DEPTH**-0.5, -1e9).softmax(-1) @ v, layer)

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Tensor:
        rows = torch.arange(x.shape[1])
        added = {
            "slice": lambda: x[:, :1],
            "select": lambda: x[:, 0][:, None],
            "index": lambda: x[:, torch.zeros_like(rows)],
            "half": lambda: x[:, rows // 2],
            "attention": lambda: scaled_dot_product_attention(x, x, x, is_causal=True)[:, -1:],
        }[self.how]()
        return super().leave(x + added, ids, *more)


class Additive(Decoder):
    """A mask of floats from outside, ``[B, 1, 1, S]`` or ``[B, S]``."""

    how = ""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        score, mask = q @ k.mT * DEPTH**-0.5, more[0]
        score = {
            "equal": lambda: score.masked_fill((j > i) | (mask == -torch.inf), -1e9),
            "scaled": lambda: (score + mask * 1e-4).masked_fill(j > i, -torch.inf),
            "below": lambda: score.masked_fill((j > i) | (mask < -1e5), -torch.inf),
            "rows": lambda: torch.where(j <= i, score, -1e9) + mask[:, None, None],
        }[self.how]()
        return self.merge(score.softmax(-1) @ v, layer)

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Tensor:
        return super().leave(x + pad(x, (0, 0, 1, 0))[:, :-1] if self.how == "rows" else x, ids, *more)


class Forms(Decoder):
    """A mask whose closed form is not what the tensor holds."""

    how = ""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        rows, score = torch.arange(x.shape[1]), q @ k.mT * DEPTH**-0.5
        counted = torch.full((x.shape[1],), 0.5).cumsum(0, dtype=torch.long)
        low = torch.where(j <= i, 0.0, -1e4).bfloat16().float()
        seen = {
            "full": lambda: (j <= i) & (i - j < torch.full_like(i, 2.7)),
            "counted": lambda: (j <= i) & ((counted[:, None] > 2) | (i - j < 3)),
            "half": lambda: ~(low <= -1e4) & (i - j < 40),
            "sum": lambda: 0.6 * (j <= i).float() + 0.3 * (i - j < 30).float() >= 0.9,
            "wrapped": lambda: self.places.long()[rows][None] <= self.places.long()[rows][:, None],
        }[self.how]()
        fill = -torch.inf if self.how == "sum" else -1e9
        return self.merge(score.masked_fill(~seen, fill).softmax(-1) @ v, layer)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(250, 314).to(torch.uint8))


class Soft(Decoder):
    """A softplus so wide that a very negative score is not zero."""

    how = ""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        score = torch.where(j <= i, q @ k.mT * DEPTH**-0.5, -1e4)
        return self.merge(softplus(score, beta=1e-4) @ v * 1e-4, layer)


class Tables(Decoder):
    """A table that is cut to the rows of the text, and read at its end."""

    how = ""

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        x, rows = super().enter(ids), ids.shape[1]
        table = torch.linspace(-1, 1, 64 * SIZE).view(64, SIZE)[:, : x.shape[2]]
        added = {
            "last": lambda: table[:rows][-1:],
            "chosen": lambda: table[torch.arange(rows)][-1],
            "middle": lambda: table[torch.arange(rows)][rows // 2],
        }[self.how]()
        return x + added


class Cut(Decoder):
    """Weights of a softmax are cut by a triangle that moves with the length."""

    how = ""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        weights = (q @ k.mT * DEPTH**-0.5).masked_fill(j > i, -torch.inf).softmax(-1)
        weights = weights.tril(10 - x.shape[1]) if self.how == "tril" else weights.triu(6 - x.shape[1])
        return self.merge(weights @ v, layer)


class Behind(Decoder):
    """Keys from the second row on: the first row keeps none."""

    how = ""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        k, v, rows = k[:, :, 1:], v[:, :, 1:], torch.arange(x.shape[1])
        seen = rows[None, :-1] + 1 <= rows[:, None]
        if self.how == "sdpa":
            mask = torch.where(seen, 0.0, -1e9)
            return self.merge(scaled_dot_product_attention(q, k, v, attn_mask=mask), layer)
        return self.merge(torch.where(seen, q @ k.mT * DEPTH**-0.5, -1e9).softmax(-1) @ v, layer)


class Context(Decoder):
    """Keys of a context, of which a row may see none."""

    how = ""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        keys = more[0].unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        seen = torch.arange(5) >= torch.arange(x.shape[1])[:, None]
        fill = -torch.inf if self.how == "infinite" else -1e9
        own = scaled_dot_product_attention(q, k, v, is_causal=True)
        score = (q @ keys.mT).masked_fill(~seen, fill)
        return self.merge(own + score.softmax(-1) @ keys, layer)


class Bias(Decoder):
    """Weights of two rows, and a context of two texts: one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, SIZE))

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        return super().enter(ids) + torch.addmm(more[0], self.left, self.right)[:, None]


class Diagonal(Decoder):
    """The weight of a row on itself."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        weights = (q @ k.mT * DEPTH**-0.5).masked_fill(j > i, -torch.inf).softmax(-1)
        own = torch.einsum("bhii->bhi", weights)
        return self.merge(v * own[..., None], layer)


def left(ids: Tensor, rows: int) -> Tensor:
    """Flags: so many rows of the first text are padding."""
    return (torch.arange(ids.shape[1]) >= torch.tensor([rows] + [0] * (len(ids) - 1))[:, None]).long()


def sides(ids: Tensor) -> Tensor:
    """A context that goes with the text, wherever that stands."""
    return torch.randn(2, SIZE, generator=torch.Generator().manual_seed(5))[(ids[:, 0] != texts(1)[0, 0]).long()]


def kinds(kind: type[Decoder], *how: str) -> list[tuple[type[Decoder], str]]:
    return [(kind, each) for each in how]


CASES = [
    *kinds(Texts, "full", "arange", "ones", "entry", "slice", "mean"),
    *kinds(Between, "halved", "where", "clamped", "raised", "padded"),
    *kinds(Padded, "slice", "select", "index", "half", "attention"),
    *kinds(Additive, "equal", "scaled", "below", "rows"),
    *kinds(Forms, "full", "counted", "half", "sum", "wrapped"),
    *kinds(Soft, ""),
    *kinds(Tables, "last", "chosen", "middle"),
    *kinds(Cut, "tril", "triu"),
    *kinds(Behind, "softmax", "sdpa"),
    *kinds(Context, "infinite", "finite"),
    *kinds(Bias, ""),
    *kinds(Diagonal, ""),
]


def given(kind: type[Decoder], how: str, ids: Tensor, call: int) -> tuple[list[Tensor], Tensor | None]:
    """Arguments after the tokens, and which rows mean something. Padding begins with the third call."""
    keep = left(ids, 3 if call > 1 else 0)
    if kind is Padded or how == "padded":
        return [keep], keep.bool()
    if kind is Additive:
        low = -1e4 if how in ("scaled", "below") else -torch.inf if how == "equal" else -1e9
        mask = torch.zeros(keep.shape).masked_fill(keep == 0, low)
        return [mask if how == "rows" else mask[:, None, None]], keep.bool() if how in ("equal", "rows") else None
    if kind is Context:
        return [torch.randn(len(ids), 5, SIZE, generator=torch.Generator().manual_seed(7))], None
    return ([sides(ids)], None) if kind is Bias else ([], None)


@pytest.mark.parametrize(("kind", "how"), CASES, ids=lambda x: x.__name__ if isinstance(x, type) else x)
@torch.no_grad()
def test_answers_are_right(kind: type[Decoder], how: str) -> None:
    torch._dynamo.reset()
    model = build(kind)
    model.how = how  # type: ignore[assignment]
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB", page_size=4, poison=True), verify=False, tiers="eager")
    for call, ids in enumerate(lengths(4 if kind is Texts else 2)):
        args, meaningful = given(kind, how, ids, call)
        check_same(fast, model, [ids, *args], meaningful)


class Times(Decoder):
    """Rows no more than a minute apart, by a clock of which float32 knows every other minute."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        seconds = more[0].float()
        seen = (j <= i) & (seconds[:, :, None] - seconds[:, None] < 60)[:, None]
        return self.merge((q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v, layer)


@torch.no_grad()
def test_integers_that_a_float_does_not_hold() -> None:
    torch._dynamo.reset()
    model = build(Times)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB", page_size=4), verify=False, tiers="eager")
    for start in (0, 1_700_000_000):
        for ids in lengths():
            check_same(fast, model, [ids, (start + 45 * torch.arange(ids.shape[1])).expand(len(ids), -1).contiguous()])


class Multiplied(Decoder):
    """Exponentials times a triangle that is stored."""

    triangle: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("triangle", torch.ones(64, 64).tril())

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        rows = x.shape[1]
        weights = (q @ k.mT * DEPTH**-0.5).exp() * self.triangle[:rows, :rows]
        return self.merge(weights / weights.sum(-1, keepdim=True) @ v, layer)


@torch.no_grad()
def test_a_graph_that_was_rewritten_by_what_a_buffer_held() -> None:
    torch._dynamo.reset()
    model = build(Multiplied)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB", page_size=4), verify=False, tiers="eager")
    for triangle in (None, torch.ones(64, 64).tril() * 0.3 + 0.7 * torch.eye(64)):
        if triangle is not None:
            model.triangle.copy_(triangle)
        for ids in lengths():
            check_same(fast, model, [ids])


class Scaled(Decoder):
    """Rows times a whole number, or times one that is not."""

    whole = False

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        factor = torch.full((), 2.7, dtype=torch.long).float() if self.whole else torch.full((), 2.7)
        return super().enter(ids) * factor


@torch.no_grad()
def test_two_models_whose_numbers_are_written_alike() -> None:
    cache = kvpass.Cache("8MiB", page_size=4)
    for whole in (True, False):
        torch._dynamo.reset()
        model = build(Scaled)
        model.whole = whole  # type: ignore[assignment]
        fast = kvpass.compile(model, cache=cache, verify=False, tiers="eager")
        for ids in lengths():
            check_same(fast, model, [ids])


class Lowered(Decoder):
    """How much padding is lowered by stands in a buffer."""

    low: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(-5.0))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        score = torch.where(j <= i, q @ k.mT * DEPTH**-0.5, -1e9)
        return self.merge((score + (1 - more[0][:, None, None].float()) * self.low).softmax(-1) @ v, layer)


@torch.no_grad()
def test_a_number_that_becomes_one_that_masks() -> None:
    """At once, in a call whose flags are none: twos would undo the other mask."""
    torch._dynamo.reset()
    model = build(Lowered)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB", page_size=4), verify=False, tiers="eager")
    for call, ids in enumerate((*lengths(), *lengths())):
        if call == 6:
            model.low.fill_(-1e9)
        kept = torch.ones_like(ids)
        kept[:, 7:8] = 2 if call in (6, 8) else 1
        check_same(fast, model, [ids, kept])


class Pairs(Decoder):
    """Rows of each text against the contexts of all."""

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Tensor:
        return x @ more[0].T


@torch.no_grad()
def test_an_entry_for_each_pair_of_texts() -> None:
    """One text's context changes: the other text's rows have an entry of it."""
    torch._dynamo.reset()
    model, sides = build(Pairs), torch.randn(2, SIZE)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB", page_size=4), verify=False, tiers="eager")
    for call, ids in enumerate((*lengths(), *lengths())):
        check_same(fast, model, [ids, sides if call % 2 else torch.stack((sides[0], -sides[1]))])
