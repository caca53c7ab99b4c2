"""Encoder and decoder, and a prefix of the context: the same answers, and the encoder once for each input."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvpass
from kvpass.frontend.api import recording
from kvpass.frontend.backend import Record
from kvpass.runtime.keys import Keys
from kvpass.runtime.remembered import Remembered
from tests.encoders import T5, Bart, Mixing, Placeholders, Prefix, Whisper
from tests.encoders.models import PLACEHOLDER, VOCAB, split
from tests.property.oracle import Mismatch, compare
from tests.zoo.encoders import not_hoisted

Call = tuple[Tensor, ...]


def texts(rows: int, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (batch, 30), generator=generator)[:, :rows].contiguous()


def read(length: int, batch: int = 2, seed: int = 1) -> Call:
    """Tokens and where they are none: the second text of two is shorter."""
    kept = torch.ones(batch, length, dtype=torch.long)
    kept[1::2, -2:] = 0
    return texts(length, batch, seed), kept


def heard(length: int, batch: int = 2, seed: int = 1) -> Call:
    return (torch.randn(batch, length, 5, generator=torch.Generator().manual_seed(seed)),)


def history(encoded: Callable[..., Call]) -> Iterator[Call]:
    """Another text, another encoder input, the first one again, another length of it, another batch: 4 inputs."""
    one, two = encoded(8), encoded(8, seed=2)
    yield *one, texts(6)
    yield *one, texts(7)
    yield *one, texts(11)
    yield *two, texts(11)
    yield *one, texts(12)
    yield *(x.flip(0) for x in one), texts(12)
    yield *encoded(10), texts(9)
    yield *encoded(10), texts(12)
    yield *encoded(10), texts(10, seed=5)


def hidden() -> Iterator[Call]:
    """The second text is not there at all: a finite mask makes a mean of it, and a bool mask nothing."""
    tokens, kept = read(8)
    kept[1] = 0
    for rows in (6, 7, 11):
        yield tokens, kept, texts(rows)


def run(model: nn.Module, calls: Iterator[Call], **options: Any) -> tuple[list[Record], kvpass.Cache]:
    """Compare compiled and plain answers.

    Raises:
        Mismatch: one differs.
    """
    torch._dynamo.reset()
    cache = kvpass.Cache(capacity="16MiB", page_size=4, poison=True)
    fast = kvpass.compile(model, cache=cache, **options)
    with recording() as records, torch.no_grad():
        for number, call in enumerate(calls):
            want = model(*(x.clone() for x in call))
            compare(fast(*call), want, what=f"call {number}")
    return records, cache


def made(kind: Callable[..., nn.Module], *args: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args).eval()


@pytest.mark.parametrize(
    ("model", "encoded"),
    [(T5, read), (Bart, read), (Whisper, heard), (Mixing, heard)],
    ids=["t5", "bart", "whisper", "mixing"],
)
def test_encoder_and_decoder(model: Callable[[], nn.Module], encoded: Callable[..., Call]) -> None:
    records, cache = run(made(model), history(encoded))
    assert [str(r.refusal) for r in records if r.refusal is not None] == []
    programs = [r.program for r in records if r.program is not None]
    assert not_hoisted(programs, inputs=4) == ""
    assert all(entry.lowering.startswith("C++") for entry in kvpass.Report.of(records).attention)
    assert len(kvpass.Report.of(records[-1:]).attention) >= 3
    assert cache.stats().rows_reused >= 40


@pytest.mark.parametrize("model", [T5, Bart])
def test_encoder_that_reads_nothing(model: Callable[[], nn.Module]) -> None:
    records, _ = run(made(model), hidden(), verify=False)
    assert [str(r.refusal) for r in records if r.refusal is not None] == []


class Shared(nn.Module):
    """Keys and values that all sequences share: of weights, and of a context without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kept = nn.Embedding(VOCAB, 16), nn.Parameter(torch.randn(1, 2, 5, 8))

    def forward(self, given: Tensor, ids: Tensor) -> Tensor:
        x = split(self.embed(ids))
        y = sdpa(x, x, x, is_causal=True) + sdpa(x, self.kept, self.kept)
        return y + sdpa(x, given.expand(1, 2, -1, -1), given.expand(1, 2, -1, -1))


def test_keys_that_all_sequences_share() -> None:
    given = torch.randn(7, 8, generator=torch.Generator().manual_seed(6))
    records, _ = run(made(Shared), ((given, texts(rows, 3)) for rows in (5, 6, 9)), verify=False)
    assert [str(r.refusal) for r in records if r.refusal is not None] == []


def test_rows_of_a_mixing_encoder_are_known_by_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence stays, the other one hears something else: the fault is planted, and seen."""
    (sounds,) = heard(8)
    other = torch.cat([sounds[:1], sounds[1:] + 1.0])
    calls = [(sounds, texts(6)), (sounds, texts(7)), (other, texts(7)), (other.flip(0), texts(7).flip(0))]
    records, _ = run(made(Mixing), iter(calls), verify=False)
    program = records[-1].program
    assert program is not None
    assert program.incremental is not None
    assert program.incremental.plan.analyzed.together
    right = Keys.__init__

    def apart(self: Keys, captured: Any, plan: Any = None) -> None:
        right(self, captured, plan)
        self.together = False

    monkeypatch.setattr(Keys, "__init__", apart)
    with pytest.raises(Mismatch):
        run(made(Mixing), iter(calls), verify=False)


def test_encoder_that_runs_again_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Remembered.__init__
    monkeypatch.setattr(Remembered, "__init__", lambda self, capacity: right(self, 0))
    records, _ = run(made(Bart), ((*read(8), texts(rows)) for rows in (6, 7, 11)))
    found = not_hoisted([r.program for r in records if r.program is not None], inputs=1)
    assert found == "the encoder ran 3 times for 1 inputs"


def prefixed() -> Iterator[Call]:
    one, two, wide = heard(6), heard(6, seed=2), heard(9)
    for seen, rows in ((one, 8), (one, 9), (one, 14), (one, 5), (two, 14), (one, 15), (wide, 8), (wide, 9), (one, 16)):
        yield *seen, texts(rows)


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_prefix_on_one_axis_with_the_text(mask: str) -> None:
    records, cache = run(made(Prefix, mask), prefixed())
    assert [str(r.refusal) for r in records if r.refusal is not None] == []
    assert cache.stats().rows_reused >= 2 * (14 + 15 + 10 + 20 + 17 + 21)
    assert not_hoisted([r.program for r in records if r.program is not None], inputs=3) == ""


def test_prefix_that_sees_the_text_is_refused() -> None:
    records, _ = run(made(Prefix, "leaky"), prefixed())
    assert {r.refusal.code for r in records if r.refusal is not None} == {"KV202"}
    assert all(r.program is None for r in records)


def test_prefix_of_another_length_is_another_row() -> None:
    """Without the length of the prefix a row would be the row of another place."""
    records, _ = run(made(Prefix, "causal"), ((*heard(n, seed=3), texts(9)) for n in (6, 9, 6, 5, 9)))
    assert all(r.program is not None for r in records)


def placed(batch: int) -> Iterator[Call]:
    """Three placeholders at first, and two more further on."""
    ids = texts(20, batch)
    ids[:, 2:5] = PLACEHOLDER
    ids[:, 14:16] = PLACEHOLDER
    seen, other = heard(5 * batch, 1), heard(5 * batch, 1, seed=2)
    for features, rows in ((seen, 8), (seen, 9), (seen, 13), (seen, 18), (other, 18), (seen, 19)):
        yield *features, ids[:, :rows].contiguous()


def test_features_in_the_places_of_a_token() -> None:
    records, cache = run(made(Placeholders), placed(1))
    assert [str(r.refusal) for r in records if r.refusal is not None] == []
    assert cache.stats().rows_reused == 8 + 9 + 13 + 18
    assert not_hoisted([r.program for r in records if r.program is not None], inputs=2) == ""


def test_features_counted_through_a_batch_are_refused() -> None:
    records, _ = run(made(Placeholders), placed(2))
    assert {r.refusal.code for r in records if r.refusal is not None} == {"KV204"}


class Embedded(nn.Module):
    """Embeddings are what grows."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Whisper()

    def forward(self, heard: Tensor, embedded: Tensor) -> Tensor:
        memory = self.decoder.encoder(self.decoder.first(heard.transpose(1, 2)).transpose(1, 2), None, False)
        return self.decoder.decoder(embedded, None, True, memory)


def test_embeddings_are_the_sequence() -> None:
    rows = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(4))
    calls = ((*heard(8), rows[:, :n].contiguous()) for n in (6, 7, 11, 9, 12))
    records, cache = run(made(Embedded), calls)
    assert [str(r.refusal) for r in records if r.refusal is not None] == []
    assert cache.stats().rows_reused >= 2 * (6 + 7 + 8 + 11)
