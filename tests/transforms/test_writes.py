"""Writes into parts of a tensor, and other spellings of joins: proven, and equal to what they spell."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import kvpass
from tests.property.oracle import compare

SIZE, VOCAB = 8, 17


def halves(x: Tensor) -> Tensor:
    """Every entry of an uninitialised tensor is written."""
    out = x.new_empty(x.shape)
    out[..., :3] = x[..., 5:]
    out[..., 3:] = x[..., :5] * 2
    return out


def overwritten(x: Tensor) -> Tensor:
    """The second write covers the end of the first and the start of what was there."""
    out = x.clone()
    out[..., 1:5] = x[..., 4:]
    out[..., 3:-1] = x[..., :4] * 2
    return out


def by_turns(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 1::2] = x[..., ::2]
    out[..., ::2] = -x[..., 1::2]
    return out


def some_by_steps(x: Tensor) -> Tensor:
    """What is not written stays; the steps end before the axis does, and at its end."""
    out = x * 2
    out[..., 1:6:3] = x[..., :2]
    out[..., 2::5] = x[..., 3:5]
    return out


def rows_moved(x: Tensor) -> Tensor:
    """A token shift, written into zeros."""
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, :-1]
    return x + out


def one_entry(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[..., -2] = x[..., 0]
    out[..., 1] = 1.5
    return out


def where_a_mask_says(x: Tensor) -> Tensor:
    """The same vector into every row of a kind; with an axis of one entry; a number by a mask of the last axis."""
    out = x.clone()
    out[x[..., 0] > 0.3] = torch.arange(SIZE, dtype=x.dtype)
    out[x[..., 1] > 0.8] = x.new_full((1, SIZE), 2.0)
    out[..., torch.arange(SIZE) % 3 == 1] = -1.0
    return out


def broadcast(x: Tensor) -> Tensor:
    scale, y = torch.broadcast_tensors(torch.arange(SIZE) / SIZE, x)
    return y * scale


def first_rows(x: Tensor) -> Tensor:
    """A number, a vector, a row for each of two rows, and what a turn would bring to the front."""
    out = x.clone()
    out[:, 0] = 0.5
    out[:, 1:2] = torch.arange(SIZE, dtype=x.dtype)
    out[:, 3:5] = x.new_tensor([[1.0], [2.0]])
    turned = x.roll(1, 1)
    turned[:, :2] = -1.0
    return out + turned


class Written(nn.Module):
    """The keys go through one of the functions above."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.write = write
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.embed, self.head = nn.Embedding(VOCAB, SIZE), nn.Linear(SIZE, VOCAB)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = scaled_dot_product_attention(x[:, None], self.write(x)[:, None], x[:, None], is_causal=True)
        return self.head(x + y[:, 0])


@pytest.mark.parametrize(
    "write",
    [halves, overwritten, by_turns, some_by_steps, rows_moved, one_entry, first_rows, where_a_mask_says, broadcast],
    ids=lambda f: f.__name__,
)
def test_a_write_is_a_join(write: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    model = Written(write)
    ids = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        report = kvpass.explain(model, ids)
        assert report.proven, str(report)
        assert len(report.attention) == 1
        fast = kvpass.compile(model, cache=kvpass.Cache(capacity="16MiB", page_size=4, poison=True))
        for rows in (7, 8, 9, 20):
            compare(fast(ids[:, :rows]), model(ids[:, :rows]))


def test_last_row_of_an_axis_of_unknown_length() -> None:
    """Refused, and no defect."""

    def last_row(x: Tensor) -> Tensor:
        out = x.clone()
        out[:, -1] = 0.5
        return out

    torch._dynamo.reset()
    with torch.no_grad():
        report = kvpass.explain(Written(last_row), torch.zeros(2, 9, dtype=torch.long))
    assert [refusal.code for refusal in report.refusals] == ["KV201"]
