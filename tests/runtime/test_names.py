"""What a stored value is called: graphs of other sizes call the same rows the same, and other rows never."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvpass

Before = Callable[[Tensor, Tensor], Tensor]


class Model(nn.Module):
    """One layer behind something that is made of the size of the batch."""

    def __init__(self, before: Before) -> None:
        super().__init__()
        self.before, self.embed, self.out = before, nn.Embedding(16, 8), nn.Linear(8, 16)
        self.start = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.before(self.embed(ids), self.start).unsqueeze(1)
        return self.out(sdpa(x, x, x, is_causal=True)[:, 0])


def shifted(x: Tensor, first: Tensor) -> Tensor:
    return x + torch.cat([first, x[:, :-1]], 1)


SHARED: dict[str, Before] = {
    "new zeros": lambda x, start: shifted(x, x.new_zeros(x.shape[0], 1, 8)),
    "zeros like": lambda x, start: shifted(x, torch.zeros_like(x[:, :1])),
    "expanded": lambda x, start: shifted(x, start.expand(x.shape[0], -1, -1)),
    "computed": lambda x, start: shifted(x, start.expand(x.shape[0], 1, 8).sin() @ torch.ones(8, 8)),
}


def computed_for(before: Before, *batches: int) -> list[int]:
    """Rows that the first call of a batch of each size computes, over one cache, by a graph for this size alone."""
    torch.manual_seed(0)
    model = Model(before).eval()
    ids = torch.randint(0, 16, (max(batches), 12))
    cache, computed = kvpass.Cache("8MiB", page_size=4), list[int]()
    for batch in batches:
        torch._dynamo.reset()
        fast = kvpass.compile(model, cache=cache, tiers="eager")
        with torch.no_grad():
            for rows in (11, 12):
                earlier = cache.stats().rows_computed
                torch.testing.assert_close(fast(ids[:batch, :rows]), model(ids[:batch, :rows]))
                if rows == 11:
                    computed.append(cache.stats().rows_computed - earlier)
    return computed


@pytest.mark.parametrize("name", SHARED)
def test_the_size_of_the_batch_is_in_no_name(name: str) -> None:
    computed = computed_for(SHARED[name], 3, 2)
    assert computed == [33, 2]  # the last row of each


OTHERS: dict[str, Before] = {
    "summed over the copies": lambda x, start: x + start.expand(x.shape[0], 1, 8).sum(0),
    "copies beside each other": lambda x, start: x + start.expand(x.shape[0], 1, 8).flatten().sum(),
    "both in one": lambda x, start: (lambda y: shifted(x, y) + y.sum(0))(start.expand(x.shape[0], 1, 8)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_number_of_copies_that_rows_are_made_of_is_in_the_name(name: str) -> None:
    """Each graph has a batch of fixed size, and rows of one are not those of the other."""
    computed = computed_for(OTHERS[name], 3, 2)
    assert computed == [33, 22]


UNEVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "cumsum": lambda y: y.cumsum(0),
    "cumprod": lambda y: y.cumprod(0),
    "logcumsumexp": lambda y: y.logcumsumexp(0),
    "cummax": lambda y: y.cummax(0).indices.float(),
    "triu": lambda y: y.squeeze(1).triu().unsqueeze(1),
    "diff": lambda y: torch.diff(y, dim=0, prepend=y.new_zeros(1, 1, 8)),
    "layer norm": lambda y: nn.functional.layer_norm(y, y.shape, torch.arange(8.0 * y.shape[0]).view(y.shape)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("name", UNEVEN)
def test_copies_that_an_op_makes_different_differ_by_the_place_in_the_batch(name: str, dynamic: bool) -> None:
    """A text that comes back at another place is another row."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model(lambda x, start: shifted(x, UNEVEN[name](start.expand(x.shape[0], 1, 8)))).eval()
    options = {"cache": kvpass.Cache("8MiB", page_size=4), "tiers": "eager"}
    compiled = torch.compile(model, backend="kvpass", dynamic=True, options=options)
    fast = compiled if dynamic else kvpass.compile(model, **options)
    ids = torch.randint(0, 16, (2, 12))
    with torch.no_grad():
        for given in (ids[:, :9], ids[:, :10], ids.flip(0)[:, :11], ids[:1].expand(2, -1)[:, :11].contiguous()):
            torch.testing.assert_close(fast(given), model(given))
