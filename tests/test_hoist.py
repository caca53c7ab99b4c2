"""What depends on the context alone is computed once per context, and never lent to the caller."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvpass
from kvpass.frontend import backend
from kvpass.runtime.remembered import Remembered


class Model(nn.Module):
    """An encoder of features ``[B, F, 5]`` and a decoder that reads it; the encoder's result is an output too."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.embed, self.encoder, self.out = nn.Embedding(16, 8), nn.Linear(5, 8), nn.Linear(8, 16)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        m = torch.relu(self.encoder(features)).unsqueeze(1)
        m = m + sdpa(m, m, m, is_causal=self.causal)
        x = self.embed(ids).unsqueeze(1)
        x = x + sdpa(x, x, x, is_causal=True)
        x = x + sdpa(self.q(x), self.k(m), self.v(m))
        return self.out(x[:, 0, -1:]), m


@pytest.fixture(params=[False, True], ids=["two-sided encoder", "causal encoder"])
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Model(request.param).eval()


def hoisted_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one entry whenever hoisted values are computed."""
    calls: list[Any] = []
    right = Remembered.get

    def get(self: Remembered, name: bytes, compute: Any, lent: Any) -> Any:
        return right(self, name, lambda: (calls.append(name), compute())[1], lent)

    monkeypatch.setattr(Remembered, "get", get)
    return calls


@torch.no_grad()
def test_once_per_context(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hoisted_calls(monkeypatch)
    cache = kvpass.Cache(capacity="8MiB", page_size=4)
    fast = kvpass.compile(model, cache=cache)
    one, two = torch.randn(1, 7, 5), torch.randn(1, 7, 5)
    ids = torch.randint(0, 16, (1, 30))

    def check(features: Tensor, length: int, computed: int) -> None:
        prompt = ids[:, :length].contiguous()
        got = fast(features, prompt)
        torch.testing.assert_close(got, model(features, prompt))
        assert len(calls) == computed
        got[1].fill_(99.0)  # the caller's own

    check(one, 5, 1)
    check(one, 6, 1)
    check(two, 6, 2)
    check(one, 9, 2)
    check(two.clone(), 9, 2)
    one[0, 3, 2] += 1.0
    check(one, 10, 3)
    model.encoder.weight[0, 0] += 1.0
    check(one, 11, 4)
    program = backend.records()[-1].program
    assert program is not None
    assert program.refusal is None


def test_values_are_bounded_and_views_of_arguments_are_copied() -> None:
    remembered = Remembered(capacity=100)
    given = torch.zeros(5)
    (kept,) = remembered.get(b"view", lambda: (given[1:],), [given])
    given.fill_(1.0)
    assert torch.equal(kept, torch.zeros(4))
    remembered.get(b"large", lambda: (torch.zeros(1000),), [])
    assert remembered.used == 16
    for k in range(5):
        remembered.get(bytes([k]), lambda: (torch.zeros(10),), [])
    assert remembered.used <= 100
    (again,) = remembered.get(bytes([4]), lambda: pytest.fail("it was remembered"), [])
    assert again.shape == (10,)
