"""The last k rows, for a k that the caller says anew in every call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kvpass
from kvpass.frontend.api import recording
from kvpass.runtime.keys import Keys
from tests.runtime.test_steps import Model

# Rows of the text, and how many of the last ones are asked for.
CALLS = ((24, 3), (25, 2), (30, 3), (33, 5), (34, 4), (20, 3), (21, 6), (40, 7), (41, 2), (41, 9), (43, 9), (44, 9))
AS_NEW = [24, 2, 5, 5, 4, 3, 6, 7, 2, 9, 9, 9]  # what is new, and what is asked for


class Last(Model):
    """Logits of the last rows."""

    def forward(self, ids: Tensor, keep: int = 1) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for norm, mix, out in zip(self.norms, self.mix, self.out, strict=True):
            q, k, v = (part.view(*ids.shape, 4, 8).transpose(1, 2) for part in mix(norm(x)).chunk(3, dim=-1))
            y = self.attend(q, k, v, keep)
            x = x + nn.functional.silu(out(y.transpose(1, 2).flatten(2)))
        return self.end(x, keep)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: int) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def end(self, x: Tensor, keep: int) -> Tensor:
        return self.head(x[:, -keep:])


class Mixed(Last):
    """What becomes of the last rows is of no matter, and how many they are may be a number in it."""

    def end(self, x: Tensor, keep: int) -> Tensor:
        y = x[:, -keep:] + self.place(torch.arange(keep))
        return self.head((y.flip(1) * keep).cumsum(1)).mean(1)


class One(Last):
    """One row, counted from the end."""

    def end(self, x: Tensor, keep: int) -> Tensor:
        return self.head(x[:, -keep])


class Products(Last):
    """Each of the last rows with each."""

    def end(self, x: Tensor, keep: int) -> Tensor:
        y = x[:, -keep:]
        return y @ y.transpose(1, 2)


class Window(Last):
    """The number is a window as well: rows of one number are of no use to another."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: int) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (j > i - keep))


class Times(Last):
    """The number is a factor of the values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: int) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v * keep, is_causal=True)


class Before(Last):
    """Rows that another number of rows follows."""

    def end(self, x: Tensor, keep: int) -> Tensor:
        return self.head(x[:, -2 * keep : -keep])


class First(Last):
    """The first rows."""

    def end(self, x: Tensor, keep: int) -> Tensor:
        return self.head(x[:, :keep])


def history(kind: type[Last], tiers: str = "eager") -> tuple[list[int], kvpass.Report]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, cache = kind(3).eval(), kvpass.Cache("8MiB", page_size=4, poison=True)
    work = []
    with torch.no_grad(), recording() as found:
        for parameter in model.parameters():
            parameter.mul_(2.0)
        fast = kvpass.compile(model, cache=cache, verify=False, tiers=tiers)
        for rows, keep in CALLS:
            ids = torch.arange(rows).view(1, -1) % 23
            before = cache.stats().rows_computed
            expected = model(ids, keep)
            torch.testing.assert_close(fast(ids, keep), expected, rtol=0.0, atol=1e-4 * float(expected.abs().max()))
            work.append(cache.stats().rows_computed - before)
    return work, kvpass.Report.of(found)


@pytest.mark.parametrize(
    ("kind", "tiers"), [(Last, "compiled"), (Mixed, "compiled"), (Mixed, "eager"), (One, "eager"), (Products, "eager")]
)
def test_what_is_new_and_what_is_asked_for_is_computed(kind: type[Last], tiers: str) -> None:
    work, report = history(kind, tiers)
    assert report.proven, str(report)
    assert work == AS_NEW


@pytest.mark.parametrize("kind", [Window, Times])
def test_rows_that_depend_on_the_number_are_another_numbers(kind: type[Last]) -> None:
    work, report = history(kind)
    assert report.proven, str(report)
    assert work == [24, 25, 30, 33, 34, 3, 21, 40, 16, 41, 9, 9]


@pytest.mark.parametrize("kind", [Before, First])
def test_other_rows_are_refused(kind: type[Last]) -> None:
    _, report = history(kind)
    assert {refusal.code for refusal in report.refusals} == {"KV208"}, str(report)


class Heard(Last):
    """Beside the text a context, of which something is made that the number is in and that no row is."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__(layers)
        self.hear = nn.Linear(16, 23)

    def forward(self, ids: Tensor, keep: int = 1, sound: Tensor | None = None) -> Tensor:
        assert sound is not None
        return super().forward(ids, keep) + self.hear(sound * keep).tanh().mean(1, keepdim=True)


def heard() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, cache = Heard().eval(), kvpass.Cache("8MiB", page_size=4, poison=True)
    sound = torch.randn(1, 11, 16)
    with torch.no_grad(), recording() as found:
        fast = kvpass.compile(model, cache=cache, verify=False)
        for rows, keep in CALLS:
            ids = torch.arange(rows).view(1, -1) % 23
            torch.testing.assert_close(fast(ids, keep, sound), model(ids, keep, sound), rtol=1e-4, atol=1e-5)
    program = found[-1].program
    assert program is not None
    assert program.hoisted is not None
    assert program.remembered is not None
    assert program.remembered.computed == len({keep for _, keep in CALLS[1:]})  # the first call has a graph of its own


def test_what_is_made_of_the_context_and_the_number_is_known_by_both() -> None:
    heard()


def test_known_by_the_context_alone_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keys, "hoisting", Keys.context)
    with pytest.raises(AssertionError):
        heard()


def test_the_report_says_how_many() -> None:
    model = Last().eval()
    with torch.no_grad(), recording() as found:
        torch._dynamo.reset()
        fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"))
        for rows, keep in ((20, 3), (21, 4)):
            fast(torch.arange(rows).view(1, -1), keep)
    (record,) = found[-1:]
    assert "rows are computed in every call" in str(kvpass.Report.of([record]))


def test_rows_known_without_the_number_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpass.runtime.keys.ancestry", lambda *nodes: [])
    with pytest.raises(AssertionError):
        history(Times)


def test_fewer_rows_than_are_asked_for_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keys, "last", lambda self, args: 1)
    with pytest.raises((AssertionError, RuntimeError)):
        history(Last)
