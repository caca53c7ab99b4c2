"""Keys and values that are no rows, in one softmax with those of the rows: before them, behind them, of an encoder."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

import kvpass
from kvpass.frontend.api import recording
from tests.coverage import VOCAB, Decoder, build
from tests.coverage.base import DEPTH, HEADS, NEG_INF, SIZE
from tests.property.oracle import check_same

MEMORY = 3


class Memory(Decoder):
    """Learnt keys and values in each layer (prefix tuning), before those of the rows."""

    layers = 2
    kernels = 2
    behind = False

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(self.layers, 2, HEADS, MEMORY, DEPTH))

    def remembered(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        """`[2, B, HEADS, M, DEPTH]`"""
        return self.memory[layer, :, None].expand(-1, x.shape[0], -1, -1, -1)

    def joined(self, rows: Tensor, memory: Tensor, axis: int) -> Tensor:
        return torch.cat([rows, memory] if self.behind else [memory, rows], axis)

    def mask(self, x: Tensor, memory: Tensor) -> Tensor:
        s = x.shape[1]
        seen = torch.ones(s, s, dtype=torch.bool).tril()
        return self.joined(seen, torch.ones(s, memory.shape[3], dtype=torch.bool), 1)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        memory = self.remembered(x, layer, *more)
        k, v = self.joined(k, memory[0], 2), self.joined(v, memory[1], 2)
        return self.merge(self.attend(q, k, v, self.mask(x, memory)), layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Behind(Memory):
    behind = True


class Padded(Memory):
    """The mask is padded; scores by hand."""

    def mask(self, x: Tensor, memory: Tensor) -> Tensor:
        s = x.shape[1]
        beside = (0, memory.shape[3]) if self.behind else (memory.shape[3], 0)
        return pad(torch.full((s, s), NEG_INF).triu(1), beside)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * DEPTH**-0.5 + mask).softmax(-1) @ v


class PaddedBehind(Padded):
    behind = True


class Window(Behind):
    """The memory is always seen, of the rows the last four."""

    def mask(self, x: Tensor, memory: Tensor) -> Tensor:
        s = x.shape[1]
        seen = torch.ones(s, s, dtype=torch.bool).tril().triu(-3)
        return torch.cat([seen, torch.ones(s, memory.shape[3], dtype=torch.bool)], 1)


class Encoded(Behind):
    """The caller gives what is remembered: keys of an encoder in the softmax of the text."""

    def remembered(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        return torch.stack([more[0] * self.memory[layer, k] for k in range(2)])

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        first = torch.Generator().manual_seed(int(ids[0, 0]))
        return (torch.randn(ids.shape[0], HEADS, MEMORY, DEPTH, generator=first),)


class Convolved(Memory):
    """Before it rows are padded by a join as well, by another number: of the two only the keys hold rows."""

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        x = self.embed(ids)
        padded = torch.cat([x.new_zeros(x.shape[0], 2, SIZE), x], 1)
        return x + padded[:, 1:-1] / 2 - padded[:, :-2] / 3


class Zero(Memory):
    """Keys and values are padded with a row of zeros, which every row sees."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        s = x.shape[1]
        hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
        k, v, hidden = pad(k, (0, 0, 1, 0)), pad(v, (0, 0, 1, 0)), pad(hidden, (1, 0), value=False)
        return self.merge((q @ k.mT * DEPTH**-0.5).masked_fill(hidden, NEG_INF).softmax(-1) @ v, layer)


class Module(Decoder):
    """`nn.MultiheadAttention` with a learnt key and value behind the rows."""

    kernels = 1
    options: ClassVar[dict[str, bool]] = {"add_bias_kv": True}
    weights = False

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, HEADS, batch_first=True, **self.options)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        s = x.shape[1]
        hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
        y: Tensor = self.attention(x, x, x, attn_mask=hidden, need_weights=self.weights)[0]
        return y


class ModuleWeights(Module):
    weights = True


class ModuleZero(Module):
    options: ClassVar[dict[str, bool]] = {"add_zero_attn": True}


class ModuleBoth(Module):
    options: ClassVar[dict[str, bool]] = {"add_bias_kv": True, "add_zero_attn": True}


class Apart(Memory):
    """What is learnt has a softmax of its own, behind a gate (LLaMA-Adapter)."""

    kernels = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.mT * DEPTH**-0.5
        ours = scores[..., MEMORY:].masked_fill(~mask[:, MEMORY:], NEG_INF)
        return torch.cat([scores[..., :MEMORY].softmax(-1).tanh(), ours.softmax(-1)], -1) @ v


class Beside(Memory):
    """Scores of both are put beside each other, of which some have a finite mask."""

    kernels = 0

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        memory = self.remembered(x, layer)
        ours = (q @ k.mT * DEPTH**-0.5).masked_fill(~self.seen(x, layer), -1e9)
        scores = torch.cat([q @ memory[0].mT, ours], -1)
        return self.merge(scores.softmax(-1) @ torch.cat([memory[1], v], 2), layer)


class Spilled(Beside):
    """A fault: of both scores the ones that are learnt are masked."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        memory = self.remembered(x, layer)
        theirs = (q @ memory[0].mT).masked_fill(torch.arange(MEMORY) > 0, -1e9)
        scores = torch.cat([theirs, q @ k.mT], -1)
        return self.merge(scores.softmax(-1) @ torch.cat([memory[1], v], 2), layer)


class Crossed(Behind):
    """A fault: values are joined in the other order."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        memory = self.remembered(x, layer)
        k, v = torch.cat([k, memory[0]], 2), torch.cat([memory[1], v], 2)
        return self.merge(self.attend(q, k, v, self.mask(x, memory)), layer)


class Itself(Behind):
    """A fault: queries are joined like the keys, and what is behind the rows answers, too."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        joined = self.joined(self.project(x, layer)[1], self.remembered(x, layer)[0], 2)
        y = scaled_dot_product_attention(joined, joined, joined)
        return self.merge(y.sum(2, keepdim=True).expand(-1, -1, x.shape[1], -1), layer)


class Cut(Padded):
    """A fault: of the weights those of the memory are dropped, where they stand at the end."""

    behind = True

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        memory = self.remembered(x, layer)
        scores = q @ self.joined(k, memory[0], 2).mT * DEPTH**-0.5 + self.mask(x, memory)
        return self.merge(scores.softmax(-1)[..., : x.shape[1]] @ v, layer)


class OfTheRows(Behind):
    """A fault: what is remembered is a mean of all rows."""

    def remembered(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        return super().remembered(x, layer) * x.mean((1, 2))[None, :, None, None, None]


class Counted(Behind):
    """A fault: a bias that counts the keys through, memory and rows, from the last one."""

    def mask(self, x: Tensor, memory: Tensor) -> Tensor:
        seen = super().mask(x, memory)
        return torch.where(seen, -torch.arange(seen.shape[1]).float().flip(0), NEG_INF)


def texts(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, rows), generator=torch.Generator().manual_seed(seed))


def reported(kind: type[Decoder]) -> tuple[kvpass.Report, kvpass.Cache]:
    """Rows that grow one by one and in steps, become fewer, branch, and are another text's; without `verify`."""
    torch._dynamo.reset()
    model = build(kind)
    cache = kvpass.Cache(capacity="8MiB", page_size=4, poison=True)
    fast = kvpass.compile(model, cache=cache, verify=False)
    ids = texts(20)
    branched = ids.clone()
    branched[:, 5] = (branched[:, 5] + 1) % VOCAB
    with torch.no_grad(), recording() as found:
        for text in (ids[:, :9], ids[:, :10], ids[:, :14], ids[:, :6], branched[:, :12], ids, texts(13, seed=1)):
            check_same(fast, model, [text, *model.arguments(text)])
    return kvpass.Report.of(found), cache


KERNELS = (Memory, Behind, Padded, PaddedBehind, Window, Encoded, Convolved, Zero)
MODULES = (Module, ModuleWeights, ModuleZero, ModuleBoth)


@pytest.mark.parametrize("kind", [*KERNELS, *MODULES, Apart, Beside], ids=lambda kind: kind.__name__)
def test_is_proven_cached_and_computed_by_kernels(kind: type[Decoder]) -> None:
    report, cache = reported(kind)
    assert report.proven, str(report)
    assert [a.lowering[:3] for a in report.attention] == ["C++"] * kind.kernels * report.graphs, str(report)
    assert cache.stats().rows_reused > 0


@pytest.mark.parametrize("kind", [Crossed, Itself, Cut, OfTheRows, Counted, Spilled], ids=lambda kind: kind.__name__)
def test_a_fault_is_refused(kind: type[Decoder]) -> None:
    report, cache = reported(kind)
    assert not report.proven
    assert cache.stats().rows_reused == 0
