"""Outputs that the caller gets in full: no copy of old rows, and nobody sees what another one writes."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import kvpass
from kvpass.runtime.lent import Lender
from tests.cache.test_broken_off import stopped


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).unsqueeze(1)
        return self.out(nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)).squeeze(1)


def test_every_result_is_the_callers_own() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    fast = kvpass.compile(model, cache=kvpass.Cache(capacity="8MiB", page_size=4))
    ids = torch.randint(0, 16, (1, 40))
    with torch.no_grad():
        results = []
        for length in (5, 6, 6, 9, 17, 12, 40, 7):
            result = fast(ids[:, :length].contiguous())
            want = model(ids[:, :length])
            torch.testing.assert_close(result, want)
            assert result.is_contiguous()
            assert result.stride() == want.stride()
            results.append((result, want))
        for result, _ in results[::2]:
            result.fill_(77.0)
        for result, want in results[1::2]:
            torch.testing.assert_close(result, want)
        torch.testing.assert_close(fast(ids), model(ids))
        other = ids.clone()
        other[0, 3] = (other[0, 3] + 1) % 16
        torch.testing.assert_close(fast(other), model(other))
        torch.testing.assert_close(fast(ids), model(ids))


class Behind(Model):
    """The logits are a slice of what is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(3, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.prefix.expand(ids.shape[0], -1, -1), self.embed(ids)], 1).unsqueeze(1)
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.out(y.squeeze(1)[:, 3:])


class Sliced(Behind):
    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.prefix.expand(ids.shape[0], -1, -1), self.embed(ids)], 1).unsqueeze(1)
        return self.out(nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1))[:, 3:]


@pytest.mark.parametrize("tiers", ["eager", "compiled"])
@pytest.mark.parametrize("kind", [Behind, Sliced])
def test_results_have_no_holes_where_the_models_have_none(kind: type[Model], tiers: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = kind().eval()
    fast = kvpass.compile(model, cache=kvpass.Cache(capacity="8MiB", page_size=4), tiers=tiers)
    ids = torch.randint(0, 16, (2, 20))
    with torch.no_grad():
        for length in (5, 6, 7, 12, 9, 20):
            result, want = fast(ids[:, :length].contiguous()), model(ids[:, :length])
            torch.testing.assert_close(result, want)
            assert result.is_contiguous() or not want.is_contiguous()


def test_rows_that_the_lender_has_are_not_copied_again() -> None:
    lender = Lender(axis=1)
    rows = torch.randn(1, 100, 3)
    text = bytes(range(100))
    first = lender.lend(rows[:, :60], b"", text[:60])
    second = lender.lend(rows, b"", text)
    assert torch._C._is_cow_tensor(first)
    assert torch._C._is_cow_tensor(second)
    spoilt = rows.clone()
    spoilt[:, :60] = 0.0  # rows that the lender has are not read again
    assert torch.equal(lender.lend(spoilt, b"", text), rows)
    assert torch.equal(lender.lend(rows[:, :10], b"", text[:10]), rows[:, :10])
    first.zero_()
    assert torch.equal(second, rows)
    assert torch.equal(lender.lend(rows, b"", text), rows)


@pytest.mark.parametrize(("name", "text"), [(b"other", bytes(8)), (b"", bytes([0, 0, 0, 9, 0, 0, 0, 0]))])
def test_another_text_or_context_is_copied_anew(name: bytes, text: bytes) -> None:
    lender = Lender(axis=1)
    old = lender.lend(torch.zeros(1, 8, 2), b"", bytes(8))
    assert torch.equal(lender.lend(torch.ones(1, 8, 2), name, text), torch.ones(1, 8, 2))
    assert torch.equal(old, torch.zeros(1, 8, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_dtypes_and_inference_mode(dtype: torch.dtype) -> None:
    lender = Lender(axis=0)
    rows = (torch.rand(9, 2, 3) > 0.5).to(dtype)
    with torch.inference_mode():
        result = lender.lend(rows[:4], b"", bytes(4))
        assert torch.equal(result, rows[:4])
        result.zero_()
    assert torch.equal(lender.lend(rows, b"", bytes(9)), rows)


@pytest.mark.parametrize("grown", [6, 200], ids=["in place", "in other memory"])
def test_rows_that_an_interrupt_kept_from_being_written_are_not_lent(grown: int) -> None:
    text = bytes(200)
    for at in itertools.count(1):
        first, second = torch.randn(1, 200, 4), torch.randn(1, 200, 4)  # others than memory that was given back holds
        lender = Lender(1)
        lender.lend(first[:, :5], b"first", text[:5])
        if not stopped(lambda: lender.lend(second[:, :grown], b"second", text[:grown]), at, "/runtime/lent.py"):  # noqa: B023
            break
        for rows, name in ((first, b"first"), (second, b"second")):
            assert torch.equal(lender.lend(rows[:, :8], name, text[:8]), rows[:, :8])
        first = torch.randn(1, 200, 4)
        lender = Lender(1)
        lender.lend(first[:, :5], b"first", text[:5])
        stopped(lambda: lender.lend(first[:, :grown], b"first", text[:grown]), at, "/runtime/lent.py")  # noqa: B023
        assert torch.equal(lender.lend(first[:, :8], b"first", text[:8]), first[:, :8])
    assert at > 20
