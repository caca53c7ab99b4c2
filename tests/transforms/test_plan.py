"""What the cut stores, and what it is called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvpass
from kvpass.frontend import backend
from kvpass.runtime.program import Program

Forward = Callable[["Layer", Tensor], Tensor]


class Layer(nn.Module):
    """One attention over 4 query heads and 2 key/value heads of size 8; ``forward`` is given."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.embed, self.out = nn.Embedding(16, 32), nn.Linear(32, 16)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.function(self, self.embed(ids))[:, -1:])


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def grouped(layer: Layer, x: Tensor) -> Tensor:
    k, v = heads(layer.k(x), 2), heads(layer.v(x), 2)
    return merged(sdpa(heads(layer.q(x), 4), k, v, is_causal=True, enable_gqa=True))


def repeated(layer: Layer, x: Tensor) -> Tensor:
    k, v = (heads(w(x), 2).repeat_interleave(2, dim=1) for w in (layer.k, layer.v))
    return merged(sdpa(heads(layer.q(x), 4), k, v, is_causal=True))


def in_double(layer: Layer, x: Tensor) -> Tensor:
    k, v = (heads(w(x), 2).repeat_interleave(2, dim=1).double() for w in (layer.k, layer.v))
    return merged(sdpa(heads(layer.q(x), 4).double(), k, v, is_causal=True)).float()


def shared(layer: Layer, x: Tensor) -> Tensor:
    """Keys are values."""
    k = heads(layer.k(x), 2)
    return merged(sdpa(heads(layer.q(x), 4), k, k, is_causal=True, enable_gqa=True))


def latent(layer: Layer, x: Tensor) -> Tensor:
    """Keys and values of 64 entries each are functions of a row of 8, without a product in between."""
    c = layer.k(x)[..., :8]
    k, v = c.repeat(1, 1, 8).unflatten(-1, (4, 16)).transpose(1, 2), c.sin().repeat(1, 1, 4).unflatten(-1, (4, 8))
    return merged(sdpa(heads(layer.q(x).repeat(1, 1, 2), 4), k, v.transpose(1, 2), is_causal=True))


def program(function: Forward, change: Callable[[Layer], Any] = lambda layer: None, batch: int = 1) -> Program:
    torch._dynamo.reset()
    layer = Layer(function).eval()
    with torch.no_grad():
        change(layer)
        cache = kvpass.Cache(capacity="8MiB")
        ids = torch.randint(0, 16, (batch, 9))
        torch.testing.assert_close(kvpass.compile(layer, cache=cache)(ids), layer(ids))
    made = backend.records()[-1].program
    assert made is not None
    return made


def names(made: Program) -> list[bytes]:
    assert made._bound is not None
    return sorted(slot.identity for slot in made._bound.table.slots)


@pytest.mark.parametrize(
    ("function", "least"),
    [(grouped, 2 * 16 * 4), (repeated, 2 * 16 * 4), (in_double, 2 * 16 * 4), (shared, 16 * 4), (latent, 8 * 4)],
)
def test_fewest_bytes_per_row(function: Forward, least: int) -> None:
    made = program(function)
    assert made.incremental is not None
    # The embedding of a token is nearer to the inputs, and 32 * 4 bytes.
    assert made.incremental.plan.bytes_per_row == min(least, 32 * 4)


def test_heads_stand_before_rows() -> None:
    made = program(grouped)
    assert made.incremental is not None
    assert {(slot.before, slot.after) for slot in made.incremental.plan.slots} <= {((2,), (8,)), ((), (32,))}


def test_equal_computations_have_one_name() -> None:
    assert names(program(latent)) == names(program(latent, batch=3))


@pytest.mark.parametrize("weight", ["embed.weight", "k.weight", "k.bias"])
def test_a_weight_behind_the_rows_is_in_their_name(weight: str) -> None:
    def change(layer: Layer) -> None:
        layer.get_parameter(weight)[0] += 1.0

    assert set(names(program(latent))).isdisjoint(names(program(latent, change)))


def test_a_weight_after_the_rows_is_not() -> None:
    def change(layer: Layer) -> None:
        layer.q.weight[0] += 1.0
        layer.out.bias[0] += 1.0

    assert names(program(latent)) == names(program(latent, change))


def test_the_order_of_operands_and_arguments_is_in_the_name() -> None:
    def variant(first: float, swap: bool) -> Forward:
        def function(layer: Layer, x: Tensor) -> Tensor:
            a, b = layer.k(x)[..., :8], layer.v(x)[..., :8]
            c = (b - first * a if swap else a - first * b).contiguous()
            k = c.repeat(1, 1, 4).unflatten(-1, (4, 8)).transpose(1, 2)
            return merged(sdpa(heads(layer.q(x), 4), k, k, is_causal=True))

        return function

    found = [names(program(variant(*given)))[0] for given in ((1.0, False), (2.0, False), (1.0, True))]
    assert len(set(found)) == 3


class Padded(nn.Module):
    """Two layers, so that what is stored in the second one depends on the mask of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.k, self.out = nn.Embedding(16, 8), nn.Linear(8, 4), nn.Linear(8, 16)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        place = torch.arange(ids.shape[1])
        batch = torch.arange(ids.shape[0])[:, None, None, None]
        keep = (place[None] <= place[:, None]) & attention_mask.bool()[batch, place[None, None, None]]
        for _ in range(2):
            c = self.k(x).unsqueeze(1)
            x = x + sdpa(c, c, torch.cat([c.sin(), c.cos()], -1), attn_mask=keep).squeeze(1)
        return self.out(x[:, -1:])


def test_one_sequence_and_several_share_their_rows() -> None:
    torch.manual_seed(0)
    model, cache = Padded().eval(), kvpass.Cache(capacity="8MiB")
    ids = torch.randint(0, 16, (3, 20))
    with torch.no_grad():
        for batch in (ids[:1], ids):
            torch._dynamo.reset()
            mask = torch.ones_like(batch)
            mask[0, :2] = 0
            fast = kvpass.compile(model, cache=cache)
            torch.testing.assert_close(fast(batch, mask)[1:], model(batch, mask)[1:])
        made = [record.program for record in backend.records()[-2:]]
    assert made[0] is not None
    assert made[1] is not None
    assert len(names(made[0])) == 2
    assert names(made[0]) == names(made[1])


def keys_as_columns(layer: Layer, x: Tensor) -> Tensor:
    q, k, v = (heads(w(x), n) for w, n in ((layer.q, 4), (layer.k, 2), (layer.v, 2)))
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    scores = q.unflatten(1, (2, 2)) @ k.transpose(-2, -1).unsqueeze(2)
    return merged((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.unsqueeze(2)).flatten(1, 2))


def permuted_in_the_end(layer: Layer, x: Tensor) -> Tensor:
    q, k, v = layer.q(x)[..., :16], layer.k(x), layer.v(x)
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return (torch.einsum("bid,bdj->bij", q, k.permute(0, 2, 1)).masked_fill(~seen, -1e9).softmax(-1) @ v).repeat(
        1, 1, 2
    )


@pytest.mark.parametrize("function", [keys_as_columns, permuted_in_the_end])
@torch.no_grad()
def test_rows_are_stored_as_rows_and_read_where_they_are(function: Forward) -> None:
    torch._dynamo.reset()
    model, ids = Layer(function).eval(), torch.randint(16, (1, 40))
    fast = kvpass.compile(model, cache=kvpass.Cache(page_size=8))
    for length in (9, 10, 17, 40):
        torch.testing.assert_close(fast(ids[:, :length]), model(ids[:, :length]), rtol=1e-4, atol=1e-5)
    made = backend.records()[-1].program
    assert made is not None
    assert made.incremental is not None
    assert all(slot.after for slot in made.incremental.plan.slots)
    (call,) = [n for n in made.incremental.module.graph.nodes if hasattr(n.target, "source")]
    assert [len(rows) for rows in call.args[1:3]] == [3, 3]  # pool, table, run: nothing is gathered
