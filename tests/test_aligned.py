"""Contexts that bring something for each row: frames beside a text, so many for each token."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvpass
from kvpass.frontend.api import recording
from tests.coverage.base import SIZE, VOCAB, Decoder, build
from tests.property.oracle import check_same

EACH, BANDS = 4, 3


class Frames(Decoder):
    """Four frames for each token, which a layer sees at once."""

    layers = 2

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Linear(EACH * BANDS, SIZE)

    def enter(self, ids: Tensor, *more: Tensor) -> Tensor:
        return self.embed(ids) + self.heard(*more)

    def heard(self, frames: Tensor) -> Tensor:
        return self.frames(frames.unflatten(1, (-1, EACH)).flatten(2))


class Strided(Frames):
    """A convolution takes four frames at a time, and every second of them is dropped on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Conv1d(BANDS, SIZE, 2, stride=2)

    def heard(self, frames: Tensor) -> Tensor:
        return self.frames(frames.mT)[..., ::2].mT


class Bidirectional(Frames):
    """The encoder sees all frames: with more of them, every row is another one."""

    def heard(self, frames: Tensor) -> Tensor:
        x = super().heard(frames)
        return x + sdpa(x, x, x)


class Concatenated(Frames):
    """What is heard stands behind the features, and is masked where nothing was said."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(2 * SIZE, SIZE)

    def enter(self, ids: Tensor, *more: Tensor) -> Tensor:
        heard = self.heard(*more)
        loud = (more[0].unflatten(1, (-1, EACH)).abs().amax((2, 3)) > 1.5)[..., None]
        return self.both(torch.cat([self.embed(ids), heard.masked_fill(~loud, 0)], -1))


class Ahead(Frames):
    """What is heard two rows ahead is heard in time: the text waits for it."""

    def heard(self, frames: Tensor) -> Tensor:
        return nn.functional.pad(super().heard(frames)[:, 2:], (0, 0, 0, 2))


class Chosen(Frames):
    """What is heard decides which keys are seen; nothing of it is added."""

    def enter(self, ids: Tensor, *more: Tensor) -> Tensor:
        return self.embed(ids)

    def seen(self, x: Tensor, layer: int, *more: Tensor) -> Tensor:
        loud = self.heard(*more)[..., 0] > 0
        index = torch.arange(x.shape[1])
        causal = index[None, :] <= index[:, None]
        return (causal & (loud[:, None, :] | (index[None, :] == index[:, None])))[:, None]


class Noisy(Frames):
    """Noise is added to what is heard: in every call another one."""

    def heard(self, frames: Tensor) -> Tensor:
        x = super().heard(frames)
        return x + torch.rand_like(x)


class Later(Frames):
    """A fault: rows see what later ones of the context's are, and that is made of the text as well."""

    def enter(self, ids: Tensor, *more: Tensor) -> Tensor:
        x = super().enter(ids, *more)
        return x + x.flip(1) / 2


def calls(batch: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    """Grows, branches, becomes shorter, and is heard otherwise from some frame on, and from the first."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (batch, 24), generator=generator)
    frames = torch.randn(batch, 24 * EACH, BANDS, generator=generator)
    for rows in (7, 8, 13, 14):
        yield ids[:, :rows].clone(), frames[:, : rows * EACH].clone()
    branch = ids.clone()
    branch[:, 5] = (branch[:, 5] + 1) % VOCAB
    yield branch[:, :15].clone(), frames[:, : 15 * EACH].clone()
    yield ids[:, :9].clone(), frames[:, : 9 * EACH].clone()
    other = frames.clone()
    other[:, 6 * EACH + 1] += 1
    yield ids[:, :16].clone(), other[:, : 16 * EACH].clone()
    yield ids[:, :20].clone(), frames.flip(0)[:, : 20 * EACH].clone()
    yield ids[:, :24].clone(), frames.clone()


def run(kind: type[Decoder], **options: object) -> tuple[list[object], kvpass.Cache]:
    torch._dynamo.reset()
    model, cache = build(kind), kvpass.Cache(capacity="16MiB", page_size=4, poison=True)
    fast = torch.compile(model, backend="kvpass", options={"cache": cache, **options})
    with torch.no_grad(), recording() as records:
        for batch in (2, 3):
            for ids, frames in calls(batch):
                check_same(fast, model, [ids, frames])
    return [record.refusal for record in records if record.captured is None or record.captured.seq.free_symbols], cache


PROVEN = (Frames, Strided, Concatenated, Ahead, Chosen)


@pytest.mark.parametrize("kind", PROVEN, ids=lambda kind: kind.__name__)
def test_rows_of_a_context_are_rows(kind: type[Decoder]) -> None:
    refusals, cache = run(kind)
    assert refusals[-1] is None, refusals
    assert cache.stats().rows_reused > 60


def test_rows_that_more_frames_change_are_not_found() -> None:
    refusals, cache = run(Bidirectional)
    assert refusals[-1] is None, refusals
    assert cache.stats().rows_reused == 0


def test_noise_is_not_remembered() -> None:
    torch._dynamo.reset()
    model = build(Noisy)
    fast = kvpass.compile(model)
    ids, frames = next(calls())
    with recording() as records, torch.no_grad():
        torch.testing.assert_close(*((torch.manual_seed(k), f(ids, frames))[1] for k in (1,) for f in (fast, model)))
        torch.testing.assert_close(*((torch.manual_seed(k), f(ids, frames))[1] for k in (2,) for f in (fast, model)))
    assert records[-1].refusal is not None


def test_a_fault_is_refused() -> None:
    refusals, cache = run(Later)
    assert "KV202" in str(refusals[-1])
    assert cache.stats().rows_reused == 0


@torch.no_grad()
def test_the_encoder_runs_once_for_each_sound_and_anew_for_other_weights() -> None:
    torch._dynamo.reset()
    model = build(Frames)
    fast = kvpass.compile(model, verify=False)
    generator = torch.Generator().manual_seed(0)
    ids, frames = torch.randint(0, VOCAB, (2, 12), generator=generator), torch.randn(2, 12 * EACH, BANDS)
    with recording() as records:
        for text in (ids, ids.flip(1), ids):
            check_same(fast, model, [text, frames])
    program = records[-1].program
    assert program is not None
    assert program.remembered is not None
    assert program.remembered.computed == 1
    model.frames.weight.mul_(2)
    check_same(fast, model, [ids, frames])
    frames[1, 3] += 1
    check_same(fast, model, [ids, frames])
    assert program.remembered.computed == 2


def test_the_report_says_what_is_known_by_what() -> None:
    with torch.no_grad():
        text = str(kvpass.explain(build(Frames), *next(calls())))
    assert "context: what it brings for each row is part of that row's key" in text
    assert "what the context brings for each row" in text
