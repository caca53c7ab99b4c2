"""Blocks of rows in a Python loop: one value where every block is the same function of its rows, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

import kvpass
from kvpass.frontend.api import recording
from tests.property.oracle import compare

SIZE, VOCAB = 8, 17

Function = Callable[["Looped", Tensor, int], Tensor]


class Looped(nn.Module):
    """Causal attention, and a function of each of three blocks of rows."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.embed, self.head = nn.Embedding(VOCAB, SIZE), nn.Linear(SIZE, VOCAB)
            self.inner = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3))
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]
        return self.head(torch.cat(self.blocks(y), 1))

    def blocks(self, y: Tensor) -> list[Tensor]:
        return [self.function(self, block, k) for k, block in enumerate(y.chunk(3, 1))]


def layers(m: Looped, x: Tensor, k: int) -> Tensor:
    return layer_norm(m.inner[0](x).relu() + x, (SIZE,)) * torch.arange(1, SIZE + 1)


def shapes(m: Looped, x: Tensor, k: int) -> Tensor:
    """Heads apart, their sums and products, and together again."""
    heads = x.reshape(x.shape[0], x.shape[1], 2, SIZE // 2).permute(0, 2, 1, 3)
    mixed = heads.transpose(1, 2) @ heads.transpose(1, 2).mT
    spread = torch.cat([heads, -heads], 1).sum(1).unsqueeze(-1).expand(-1, -1, -1, 2).flatten(2)
    return spread + mixed.softmax(-1).amax(-1)[..., None].expand(-1, -1, -1, SIZE // 2).flatten(2)


def weights(m: Looped, x: Tensor, k: int) -> Tensor:
    return m.inner[k](x)


def number(m: Looped, x: Tensor, k: int) -> Tensor:
    return x * (k + 1)


def mean_of_the_block(m: Looped, x: Tensor, k: int) -> Tensor:
    return x - x.mean(1, keepdim=True)


def softmax_over_the_block(m: Looped, x: Tensor, k: int) -> Tensor:
    return x.softmax(1)


def pairs_in_the_block(m: Looped, x: Tensor, k: int) -> Tensor:
    return (x @ x.mT) @ x


def causal_in_the_block(m: Looped, x: Tensor, k: int) -> Tensor:
    return scaled_dot_product_attention(x, x, x, is_causal=True)


def places_in_the_block(m: Looped, x: Tensor, k: int) -> Tensor:
    return x + torch.arange(x.shape[1])[:, None]


def turned_around(m: Looped, x: Tensor, k: int) -> Tensor:
    return x.flip(1)


def taken_apart_otherwise(m: Looped, x: Tensor, k: int) -> Tensor:
    """Of one shape before and after, and not between."""
    return x.unflatten(-1, (2, 4) if k == 0 else (4, 2)).transpose(-2, -1).flatten(-2)


def noise(m: Looped, x: Tensor, k: int) -> Tensor:
    return x + torch.rand_like(x)


IDS = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))


def is_proven(model: Looped) -> bool:
    """Without `verify`, which would catch most faults too."""
    torch._dynamo.reset()
    fast = kvpass.compile(model, cache=kvpass.Cache(capacity="16MiB"), verify=False)
    with recording() as found, torch.no_grad():
        fast(IDS)
    return kvpass.Report.of(found).proven


@pytest.mark.filterwarnings("error:Raw SymInt")
@pytest.mark.parametrize("function", [layers, shapes], ids=lambda f: f.__name__)
def test_the_same_function_of_every_block(function: Function) -> None:
    model = Looped(function)
    assert is_proven(model)
    torch._dynamo.reset()
    with torch.no_grad():
        fast = kvpass.compile(model, cache=kvpass.Cache(capacity="16MiB", page_size=4, poison=True), verify=False)
        for rows in (10, 11, 12, 20, 30):
            compare(fast(IDS[:, :rows]), model(IDS[:, :rows]))
        for batch in (3, 4):  # of a symbolic size from the second on
            wider = IDS[:1].expand(batch, -1).contiguous()
            compare(fast(wider), model(wider))


@pytest.mark.parametrize(
    "function",
    [
        weights,
        number,
        mean_of_the_block,
        softmax_over_the_block,
        pairs_in_the_block,
        causal_in_the_block,
        places_in_the_block,
        turned_around,
        taken_apart_otherwise,
        noise,
    ],
    ids=lambda f: f.__name__,
)
def test_anything_else_is_refused(function: Function) -> None:
    assert not is_proven(Looped(function))


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 1), (0, 1, 1)], ids=str)
def test_blocks_in_another_order(order: tuple[int, ...]) -> None:
    class Other(Looped):
        def blocks(self, y: Tensor) -> list[Tensor]:
            blocks = y.chunk(3, 1)
            return [blocks[k].relu() for k in order]

    assert not is_proven(Other(layers))


def test_an_operand_that_stands_twice() -> None:
    """``x + x`` of one block and ``x + y`` of the others are not one function of two values."""

    class Twice(Looped):
        def blocks(self, y: Tensor) -> list[Tensor]:
            (a, *b), (_, *c) = y.chunk(3, 1), (2 * y).chunk(3, 1)
            return [a + a, *(u + v for u, v in zip(b, c, strict=True))]

    assert not is_proven(Twice(layers))


def test_blocks_of_blocks() -> None:
    """Pieces of several splits are not understood, and say so."""

    class Nested(Looped):
        def blocks(self, y: Tensor) -> list[Tensor]:
            return [piece.relu() for half in y.chunk(2, 1) for piece in half.chunk(2, 1)]

    torch._dynamo.reset()
    with torch.no_grad():
        report = kvpass.explain(Nested(layers), IDS)
    assert [refusal.code for refusal in report.refusals] == ["KV201"]
