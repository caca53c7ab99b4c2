"""Keys and values made from one narrow row: what is stored is the row, and the answer is the model's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvpass
from kvpass.frontend import backend
from kvpass.runtime.program import Program
from kvpass.transforms.branch import either, lazily
from kvpass.transforms.latent import Latent
from tests.property.oracle import compare

HEADS, RANK, NOPE, ROPE, VALUE = 4, 12, 8, 4, 8
KeysAndValues = Callable[["Layer", Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Layer(nn.Module):
    """Multi-head latent attention; ``lift`` makes keys ``[B, H, S, 12]`` and values from a latent and a shared part."""

    def __init__(self, lift: KeysAndValues, by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift, self.by_hand = lift, by_hand
        self.embed, self.out = nn.Embedding(32, 24), nn.Linear(HEADS * VALUE, 32)
        self.q = nn.Linear(24, HEADS * (NOPE + ROPE), bias=False)
        self.down = nn.Linear(24, RANK + ROPE, bias=False)
        self.norm, self.head_norm = nn.RMSNorm(RANK), nn.RMSNorm(NOPE)
        self.up = nn.Linear(RANK, HEADS * (NOPE + VALUE), bias=False)
        self.up_k, self.up_v = nn.Linear(RANK, HEADS * NOPE, bias=False), nn.Linear(RANK, HEADS * VALUE, bias=False)
        self.biased = nn.Linear(RANK, HEADS * (NOPE + VALUE))
        self.matrix = nn.Parameter(torch.randn(RANK, HEADS * (NOPE + VALUE)) * 0.3)
        self.other = nn.Linear(RANK + ROPE, RANK, bias=False)
        self.own = nn.Linear(24, HEADS * ROPE, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.mix(self.embed(ids)))[:, -2:]

    def mix(self, x: Tensor) -> Tensor:
        q = heads(self.q(x))
        row = self.down(x)
        turned = turn(row[..., RANK:])
        k, v = self.lift(self, self.norm(row[..., :RANK]), turned.unsqueeze(1), x)
        q = torch.cat([q[..., :NOPE], turn(q[..., NOPE:])], -1) if self.lift is not rope_first else q
        if self.by_hand:
            length = x.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool).tril()
            scores = torch.tanh(q @ k.transpose(-2, -1) * 0.3) * 3.0
            made = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        else:
            made = sdpa(q, k, v, is_causal=True, scale=0.3)
        return made.transpose(1, 2).flatten(2)


class Deep(Layer):
    """So many layers that what is traced of one stands for all."""

    def __init__(self) -> None:
        super().__init__(joint)
        self.layers = nn.ModuleList(Layer(joint) for _ in range(6))
        self.back = nn.ModuleList(nn.Linear(HEADS * VALUE, 24) for _ in self.layers)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer, back in zip(self.layers, self.back, strict=True):
            x = x + back(layer.mix(x))  # type: ignore[operator]
        return self.out(self.mix(x))[:, -2:]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def turn(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[-2])[:, None] * 0.1
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def with_shared(k: Tensor, shared: Tensor) -> Tensor:
    return torch.cat([k, shared.expand(-1, HEADS, -1, -1)], -1)


def joint(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = heads(layer.up(c)).split([NOPE, VALUE], -1)
    return with_shared(k, shared), v


def separate(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return with_shared(heads(layer.up_k(c)), shared), heads(layer.up_v(c))


def halves(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = layer.up(c).chunk(2, -1)
    return with_shared(heads(k), shared), heads(v)


def transposed(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = heads(c @ layer.matrix).split([NOPE, VALUE], -1)
    return with_shared(k, shared), v


def rope_first(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = heads(layer.up(c)).split([NOPE, VALUE], -1)
    return torch.cat([shared.repeat(1, HEADS, 1, 1), k], -1), v


def written(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are written into uninitialised memory, part by part."""
    k, v = heads(layer.up(c)).split([NOPE, VALUE], -1)
    keys = c.new_empty(*k.shape[:-1], NOPE + ROPE)
    keys[..., :NOPE] = k
    keys[..., NOPE:] = shared
    return keys, v


SPELLINGS = [joint, separate, halves, transposed, rope_first, written]


def biased(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = heads(layer.biased(c)).split([NOPE, VALUE], -1)
    return with_shared(k, shared), v


def normed(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = heads(layer.up(c)).split([NOPE, VALUE], -1)
    return with_shared(layer.head_norm(k), shared), v


def two_latents(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = heads(layer.up_k(c)), heads(layer.up_v(c.relu()))
    return with_shared(k, shared), v


def own_parts(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = heads(layer.up(c)).split([NOPE, VALUE], -1)
    return torch.cat([k, heads(layer.own(x))], -1), v


def shifted_heads(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The heads of the keys stand in another order."""
    k, v = heads(layer.up(c)).split([NOPE, VALUE], -1)
    return with_shared(torch.cat([k[:, 1:], k[:, :1]], 1), shared), v


def turned_shared(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The shared part is read in another order by one half of the heads."""
    k, v = heads(layer.up(c)).split([NOPE, VALUE], -1)
    half = shared.expand(-1, HEADS // 2, -1, -1)
    swapped = torch.cat([half[..., 2:], half[..., :2]], -1)
    return torch.cat([k, torch.cat([half, swapped], 1)], -1), v


def reordered_shared(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Its halves are exchanged after it was repeated."""
    k, v = heads(layer.up(c)).split([NOPE, VALUE], -1)
    each = shared.expand(-1, HEADS, -1, -1)
    return torch.cat([k, each[..., 2:], each[..., :2]], -1), v


def a_row_back(layer: Layer, c: Tensor, shared: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row has the values of the row before it."""
    k, v = heads(layer.up(c)).split([NOPE, VALUE], -1)
    return with_shared(k, shared), torch.cat([v[:, :, :1], v[:, :, :-1]], 2)


NEAR_MISSES = [biased, normed, two_latents, own_parts, shifted_heads, turned_shared, reordered_shared, a_row_back]


@dataclass
class Compiled:
    layer: Layer
    fast: Callable[[Tensor], Tensor]
    program: Program


def compiled(layer: Layer) -> Compiled:
    torch._dynamo.reset()
    layer.eval()
    fast = kvpass.compile(layer, cache=kvpass.Cache("4MiB", page_size=4, poison=True))
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fast(ids)
    program = backend.records()[-1].program
    assert program is not None
    return Compiled(layer, fast, program)


def same_over_a_history(made: Compiled) -> None:
    ids = torch.randint(0, 32, (3, 90), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:, 5] = 31 - other[:, 5]
    with torch.no_grad():
        for text in (ids[:2, :9], ids[:2, :10], ids[:2, :40], ids[:2, :41], other[:2, :43], ids[:, :88], ids[:, :90]):
            compare(made.fast(text), made.layer(text))


@pytest.mark.parametrize(
    ("lift", "by_hand"),
    [(joint, True), *((lift, False) for lift in SPELLINGS)],
    ids=lambda x: getattr(x, "__name__", "by hand" if x else "sdpa"),
)
def test_the_row_is_stored(lift: KeysAndValues, by_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set[bool]()
    asked = Latent.lifted

    def counted(self: Latent, new: int, rows: int) -> bool:
        answer = asked(self, new, rows)
        taken.add(answer)
        return answer

    monkeypatch.setattr(Latent, "lifted", counted)
    made = compiled(Layer(lift, by_hand))
    assert made.program.incremental is not None
    (slot,) = made.program.incremental.plan.slots
    assert slot.shape == (RANK + ROPE,)
    same_over_a_history(made)
    assert taken == {True, False}


def test_the_rows_of_many_layers_are_stored() -> None:
    made = compiled(Deep())
    assert made.program.incremental is not None
    assert [slot.shape for slot in made.program.incremental.plan.slots] == [(RANK + ROPE,)] * 7
    same_over_a_history(made)


@pytest.mark.parametrize("lift", NEAR_MISSES, ids=lambda f: f.__name__)
def test_what_is_no_projection_of_one_row_is_stored_as_it_is(lift: KeysAndValues) -> None:
    made = compiled(Layer(lift))
    assert made.program.incremental is not None
    assert not made.program.incremental.latents
    same_over_a_history(made)


def test_the_costs_are_said() -> None:
    layer = Layer(joint)
    report = kvpass.explain(layer.eval(), torch.randint(0, 32, (2, 9)))
    (attention,) = report.attention
    assert attention.latent is not None
    assert attention.latent.stored
    assert (attention.latent.size, attention.latent.latent_bytes) == (RANK + ROPE, 4 * (RANK + ROPE))
    assert attention.latent.bytes == 4 * HEADS * (NOPE + ROPE + VALUE)
    assert "keys and values are made from 16 numbers a row" in str(report)
    assert attention.lowering.count("C++") == 2


def test_many_new_rows_are_lifted() -> None:
    made = compiled(Layer(joint))
    assert made.program.incremental is not None
    (latent,) = made.program.incremental.latents.values()
    assert latent.turn is not None
    assert [latent.lifted(new, 10**6) for new in (1, latent.turn - 1, latent.turn)] == [False, False, True]
    assert latent.lifted(100, 100)  # an empty cache: nothing is made twice


def test_only_what_is_taken_is_computed() -> None:
    calls = []

    def costly(name: str) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            calls.append(name)
            return x + 1

        function.__name__ = name
        return function

    def bound(*args: object) -> Tensor:
        return either(lambda new, rows: new > rows, *args)  # type: ignore[arg-type]

    bound.function, bound.static = either, (lambda new, rows: new > rows,)  # type: ignore[attr-defined]
    graph = fx.Graph()
    x, new, rows = (graph.placeholder(name) for name in ("x", "new", "rows"))
    both = graph.call_function(costly("both"), (x,))
    ways = [graph.call_function(costly(name), (both,)) for name in ("yes", "no")]
    ways[1] = graph.call_function(torch.mul, (ways[1], 10))
    graph.output((graph.call_function(bound, (new, rows, *ways)), both))
    module = fx.GraphModule(nn.Module(), graph)
    lazy = lazily(module)
    for new_rows, name in ((2, "yes"), (0, "no")):
        want = module(torch.ones(1), new_rows, 1)
        calls.clear()
        assert [y.item() for y in lazy(torch.ones(1), new_rows, 1)] == [y.item() for y in want]
        assert calls == ["both", name]
