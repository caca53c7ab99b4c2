"""Who sees whom."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, scaled_dot_product_attention

from tests.coverage.base import DEPTH, SIZE, Decoder, grid
from tests.coverage.positions import CountedPositions, left_padding


class Dilated(Decoder):
    """Every other key, of the last nine rows."""

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        return (j <= i) & ((i - j) % 2 == 0) & (i - j < 9)


class SinksAndWindow(Decoder):
    """The first two rows, and a window of three."""

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        return (j <= i) & ((j > i - 3) | (j < 2))


class MixedLayers(Decoder):
    """A window, chunks, and all rows, layer by layer."""

    layers = 3

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        return (j <= i) & (j > i - 4, j // 5 == i // 5, j >= 0)[layer]


class Strided(Decoder):
    """Sparse Transformer: a local window, and every fourth row."""

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        return (j <= i) & ((i - j < 4) | ((j + 1) % 4 == 0))


class WindowsOfHeads(Decoder):
    """Each head has its own window."""

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        width = torch.tensor([3, 9])[:, None, None]
        return (j <= i) & (i - j < width)


class Packed(Decoder):
    """Texts side by side, told apart by where `position_ids` begin anew."""

    batches = True

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        (position,) = more
        text = (position.diff(prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        return ((text[:, :, None] == text[:, None, :]) & (j <= i))[:, None]

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return ((torch.arange(ids.shape[1]) % 7).expand(*ids.shape).contiguous(),)


class Documents(Packed):
    """Texts side by side, by their numbers."""

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        (text,) = more
        return ((text[:, :, None] == text[:, None, :]) & (j <= i))[:, None]

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return ((torch.arange(ids.shape[1]) // 6).expand(*ids.shape).contiguous(),)


class PaddedLeft(CountedPositions):
    """`attention_mask`, padded on the left; a row that has no key is one that is padded."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        seen = (j <= i) & more[0][:, None, None, :].bool()
        return self.merge(scaled_dot_product_attention(q, k, v, attn_mask=seen), layer)

    def meaningful(self, ids: Tensor) -> Tensor | None:
        return left_padding(ids).bool()


class PaddedLeftFinite(PaddedLeft):
    """The same, as Hugging Face wrote it for years: a large negative number is added."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        low = torch.finfo(x.dtype).min
        causal = torch.where(j <= i, 0.0, low)
        padding = (1.0 - more[0][:, None, None, :].to(x.dtype)) * low
        mask = causal.masked_fill((padding != 0) & (causal == 0), low)
        return self.merge((q @ k.mT * DEPTH**-0.5 + mask).softmax(-1) @ v, layer)


class PaddedLeftTwice(PaddedLeft):
    """Later keys are hidden by minus infinity, padded ones by a large negative number."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        causal = torch.where(j <= i, 0.0, -torch.inf)
        padding = torch.where(more[0].bool(), 0.0, -1e9)[:, None, None]
        return self.merge(scaled_dot_product_attention(q, k, v, attn_mask=causal + padding), layer)

    def meaningful(self, ids: Tensor) -> Tensor | None:
        return None  # a padded row is the mean of the padded ones up to its own


class PaddedByHand(PaddedLeft):
    """GPT-2 as it was written until 2023: later scores are replaced by a finite number, and padded ones get another."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        low = torch.finfo(x.dtype).min
        score = torch.where(j <= i, q @ k.mT * DEPTH**-0.5, torch.full([], low, dtype=x.dtype))
        padding = (1.0 - more[0][:, None, None].to(x.dtype)) * low
        return self.merge((score + padding).softmax(-1) @ v, layer)


class PaddedWithin(PaddedByHand):
    """The padding first: a padded row is a mean over all keys, later ones among them."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        score = q @ k.mT * DEPTH**-0.5 - (1 - more[0][:, None, None]) * 1e9
        return self.merge(torch.where(j <= i, score, -1e9).softmax(-1) @ v, layer)


class PaddedByFloats(PaddedWithin):
    """The same of a mask of floats: ones, and zeros for padding."""

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return (left_padding(ids).float(),)


class PaddedByAddition(PaddedByHand):
    """The caller passes what is added to the scores."""

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        return Decoder.enter(self, ids)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        score = torch.where(j <= i, q @ k.mT * DEPTH**-0.5, -1e9)
        return self.merge((score + more[0]).softmax(-1) @ v, layer)

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return ((1 - left_padding(ids)[:, None, None]).float() * -1e9,)


class PaddedWithFloor(PaddedByHand):
    """Llama as it was: two masks of the lowest number are added, and the sum is given a floor."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        size, low = x.shape[1], torch.finfo(x.dtype).min
        causal, count = torch.full((size, size), low, dtype=x.dtype), torch.arange(size)
        causal = causal.masked_fill(count < (count + 1)[:, None], 0)
        hidden = 1.0 - more[0][:, None, None].expand(-1, 1, size, size).to(x.dtype)
        mask = hidden.masked_fill(hidden.bool(), low) + causal
        score = torch.max(q @ k.mT * DEPTH**-0.5 + mask, torch.tensor(low))
        return self.merge(score.softmax(-1) @ v, layer)


class ScaledBehind(Decoder):
    """Scores are divided after a finite number was filled in, as a well-known lesson has it."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        seen = torch.tril(torch.ones(x.shape[1], x.shape[1]))
        energy = (q @ k.mT).masked_fill(seen == 0, float("-1e20"))
        return self.merge(torch.softmax(energy / DEPTH**0.5, dim=-1) @ v, layer)


class PaddedByComparison(PaddedByHand):
    """transformers from 4.38 to 4.50: padding is where the sum of two masks is zero."""

    layers = 2

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        size, low = x.shape[1], torch.finfo(x.dtype).min
        mask = torch.triu(torch.full((size, size), low), 1)[None, None].expand(x.shape[0], 1, -1, -1).clone()
        mask = mask.masked_fill((mask + more[0][:, None, None]) == 0, low)
        return self.merge((q @ k.mT * DEPTH**-0.5 + mask).softmax(-1) @ v, layer)


class PaddedByMinimum(PaddedByHand):
    """The lower of two masks in one layer, either condition in the other."""

    layers = 2

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        score, keep = q @ k.mT * DEPTH**-0.5, more[0][:, None, None]
        if layer:
            score = score.masked_fill((keep == 0) | (j > i), -1e9)
        else:
            score = score + torch.minimum(torch.where(j <= i, 0.0, -1e9), (1 - keep.float()) * -1e9)
        return self.merge(score.softmax(-1) @ v, layer)


class PaddedByIntegers(PaddedByHand):
    """Flags and a triangle of bytes, bit by bit."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        later = torch.tril(torch.ones(x.shape[1], x.shape[1])).type(torch.ByteTensor)
        seen = more[0][:, None, None] & later
        return self.merge((q @ k.mT * DEPTH**-0.5).masked_fill(seen == 0, -1e9).softmax(-1) @ v, layer)


class WrittenEntry(Decoder):
    """One entry of the mask is written over."""

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        mask[4, 3] = False
        return mask & (j <= i) | torch.eye(x.shape[1], dtype=torch.bool)


class StackedMask(Decoder):
    """Columns for what is cached, of which there is nothing, stacked in front of a triangle."""

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        rows = x.shape[1]
        later = torch.triu(torch.full((rows, rows), float("-inf")), 1)
        return torch.hstack([torch.zeros((rows, 0)), later]) == 0


class PaddedByNothing(Decoder):
    """The same by padding."""

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        return pad(j <= i, (x.shape[1] - j.shape[1], 0, 0, 0), value=True)


class FilledMemory(Decoder):
    """A triangle that is made in memory in which nothing stands."""

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        mask = torch.empty(x.shape[1], x.shape[1])
        mask.fill_(float("-inf"))
        mask.triu_(1)
        return mask == 0


class OtherNames(Decoder):
    """Ops that are other names, or short for others."""

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        angle = torch.ger(torch.arange(ids.shape[1]).float(), torch.linspace(0.1, 1, 8))
        return super().enter(ids) + torch.hstack((angle.sin(), angle.cos()))

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        return torch.less_equal(j, i) & torch.greater(torch.subtract(i, j), -1) & torch.not_equal(torch.negative(i), 1)

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Tensor:
        return torch.tensordot(x, self.head.weight.T, dims=1) + torch.inner(torch.special.erf(x), self.head.weight)


class PassedForEachText(Decoder):
    """A triangle for each text from outside, ``[B, S, S]``; all are alike."""

    batches = True

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        return more[0][:, None]

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        rows = ids.shape[1]
        return (torch.ones(rows, rows, dtype=torch.bool).tril().repeat(ids.shape[0], 1, 1),)


class PassedForEachHead(PassedForEachText):
    """The same as numbers that are added, ``[B, H, S, S]``."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        return self.merge((q @ k.mT * DEPTH**-0.5 + more[0]).softmax(-1) @ v, layer)

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        rows = ids.shape[1]
        return (torch.full((rows, rows), -1e9).triu(1).repeat(ids.shape[0], 2, 1, 1),)


class PaddedRowsRead(PaddedLeftFinite):
    """Behind it each row reads the one before it: a padded one, which is a mean over all keys, by a token."""

    refused = "KV206"

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Tensor:
        return super().leave(x + self.before(x), ids, *more)

    def before(self, x: Tensor) -> Tensor:
        return pad(x, (0, 0, 1, 0))[:, :-1]


class PaddedRowsReadByTheLast(PaddedRowsRead):
    """All rows, by the last one: that is the only one that is asked for."""

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Tensor:
        return self.head(scaled_dot_product_attention(x, x, x, is_causal=True)[:, -1:])


class PaddedRowsJoined(PaddedRowsRead):
    """The same as a join."""

    def before(self, x: Tensor) -> Tensor:
        return torch.cat((x[:, :1] * 0, x[:, :-1]), 1)


class PaddedRowsSummed(PaddedRowsRead):
    """All rows before it."""

    def before(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class PaddedAbove(PaddedLeft):
    """The same, of a mask of integers that are greater than zero."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        kept = torch.where(more[0] > 0, 0.0, -5.0)[:, None, None]
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1) + kept
        return self.merge((q @ k.mT * DEPTH**-0.5 + mask).softmax(-1) @ v, layer)


class TextsBehindEachOther(Decoder):
    """Every text gets the rows of the one before it, cut out of a join of the batch with itself."""

    batches = True
    refused = "KV204"

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        x = super().enter(ids)
        return x + 0.5 * torch.cat((x, x))[1 : x.shape[0] + 1]


class PaddedRight(Decoder):
    """`attention_mask`, padded on the right: the rows behind it see the text, and nobody sees them."""

    batches = True

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        return (j <= i) & more[0][:, None, None, :].bool()

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return ((torch.arange(ids.shape[1]) < 8 + torch.arange(ids.shape[0])[:, None]).long(),)


class Prefix(Decoder):
    """The first rows of each text, as many as the caller says, are seen by all."""

    batches = True
    shrunk = 12  # the shorter text ends before a prefix does

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        return ((j <= i) | (j < more[0][:, None, None]))[:, None]

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return (4 + 3 * torch.arange(ids.shape[0]),)


class PrefixOfAll(Prefix):
    """One prefix for the whole batch."""

    shrunk = 2

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        return (j <= i) | (j < more[0])

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return (torch.tensor(5),)


class ByTurns(Decoder):
    """Block by block: rows of a block of four see the blocks before it, and of their own what came before."""

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        return (j // 4 < i // 4) | ((j // 4 == i // 4) & (j <= i))


class Grid(Decoder):
    """Row and column numbers of a grid, in matrix order or in that of pictures."""

    layers = 2

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        index = torch.arange(x.shape[1])
        if layer:
            j, i = torch.meshgrid(index, index, indexing="xy")
        else:
            i, j = torch.meshgrid(index, index, indexing="ij")
        return j <= i


class BlockBefore(Decoder):
    """A mean over the block of three rows before a row's own."""

    kernels = 0

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        _, _, v = self.project(x, layer)
        i, j = grid(x)
        weights = ((j < i // 3 * 3) & (j >= i // 3 * 3 - 3)).float()
        return self.merge((weights / weights.sum(-1, keepdim=True).clamp(min=1)) @ v, layer)


class PushedConvolution(Decoder):
    """Convolutions that see the rows before their own only: more is padded than they reach, and the rest cut."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(SIZE, SIZE, taps) for taps in (2, 2, 2, 3))

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        a, b, c, d = self.convs
        x = self.embed(ids).mT
        x = x + a(pad(x, (2, -1)))
        x = x + b(pad(x, (2, 0))[..., :-1])
        x = x + c(pad(x[..., :-1], (2, 0)))
        return (x + d(pad(pad(x, (3, 1))[..., :-2], (0, 0)))).mT


class GroupedConvolution(Decoder):
    """A short convolution of groups of channels, and one that makes two channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.doubled = nn.Conv1d(SIZE, SIZE, 3, groups=4), nn.Conv1d(SIZE, 2 * SIZE, 2, groups=SIZE)

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        x = self.groups(pad(self.embed(ids).mT, (2, 0)))
        return self.doubled(pad(x, (1, 0))).mT.unflatten(-1, (SIZE, 2)).sum(-1)


class MaskedTaps(Decoder):
    """Convolutions over both sides, of which a mask of ones and zeros takes away what looks ahead."""

    kernels = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(SIZE, SIZE, 5, padding=2)
        self.each = nn.Parameter(torch.randn(SIZE, 1, 7) / 4)
        self.register_buffer("behind", torch.arange(5).expand(SIZE, SIZE, 5) < 2)
        self.register_buffer("taps", (torch.arange(7) < 4).float()[None, None])

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        past = conv1d(x.mT, self.conv.weight * self.behind, self.conv.bias, padding=2)
        return (past + conv1d(pad(x.mT, (3, 3)), self.each * self.taps, groups=SIZE)).mT


class FirstIsAlwaysSeen(Decoder):
    """Keys that the tokens choose, and the first one, beside a finite fill: no row is without a key."""

    layers = 2

    def forward(self, ids: Tensor, *more: Any) -> Any:
        return super().forward(ids, ids)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        chosen = ((more[0] < 6) | (j == 0))[:, None, None]
        scores = (q @ k.mT * DEPTH**-0.5).masked_fill(~chosen | (j > i), -1e9)
        return self.merge((scores if layer == 0 else (q @ k.mT).masked_fill(j > i, -1e9)).softmax(-1) @ v, layer)


MASKS = (
    FirstIsAlwaysSeen,
    BlockBefore,
    PushedConvolution,
    MaskedTaps,
    GroupedConvolution,
    Dilated,
    SinksAndWindow,
    MixedLayers,
    Strided,
    WindowsOfHeads,
    Packed,
    Documents,
    PaddedLeft,
    PaddedLeftFinite,
    PaddedLeftTwice,
    PaddedByHand,
    PaddedWithin,
    PaddedByFloats,
    PaddedByAddition,
    PaddedWithFloor,
    ScaledBehind,
    PaddedByComparison,
    PaddedByMinimum,
    PaddedByIntegers,
    WrittenEntry,
    StackedMask,
    PaddedByNothing,
    FilledMemory,
    OtherNames,
    PassedForEachText,
    PassedForEachHead,
    PaddedRowsRead,
    PaddedRowsReadByTheLast,
    PaddedRowsJoined,
    PaddedRowsSummed,
    PaddedAbove,
    TextsBehindEachOther,
    PaddedRight,
    Prefix,
    PrefixOfAll,
    ByTurns,
    Grid,
)
