"""Where a row stands in the text."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.coverage.base import DEPTH, HEADS, MAX_ROWS, NEG_INF, SIZE, Decoder, grid


def angles(position: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    angle = position[..., None].float() * inverse
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def frequencies(base: float, size: int = DEPTH) -> Tensor:
    return base ** -(torch.arange(0, size, 2).float() / size)


class Rotary(Decoder):
    """Rotation by halves."""

    layers = 1
    turned = DEPTH  # entries of a head that are turned

    def inverse(self, layer: int, rows: int) -> Tensor:
        return frequencies(100.0, self.turned)

    def positions(self, x: Tensor, *more: Any) -> Tensor:
        return torch.arange(x.shape[1])

    factor = 1.0

    def project(self, x: Tensor, layer: int, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, layer)
        cos, sin = angles(self.positions(x, *more), self.inverse(layer, x.shape[1]))
        cos, sin = cos * self.factor, sin * self.factor
        if cos.dim() == 3:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        n = self.turned
        q, k = (
            torch.cat((turn(y[..., :n], cos, sin), y[..., n:]), -1) if n < DEPTH else turn(y, cos, sin) for y in (q, k)
        )
        return q, k, v


class PartialRotary(Rotary):
    """A half of each head is turned."""

    turned = DEPTH // 2


class WholeRotary(Rotary):
    """All of a head is turned, and joined with its rest, which has no entries; keys come out before they turn."""

    def forward(self, ids: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        q, k, v = Decoder.project(self, x, 0)
        cos, sin = angles(self.positions(x), self.inverse(0, x.shape[1]))
        p, r = (torch.cat((y[..., :0], turn(y, cos, sin), y[..., DEPTH:]), -1) for y in (q, k))
        scores = (p @ r.mT * DEPTH**-0.5).masked_fill(~self.seen(x, 0), NEG_INF)
        return self.head(x + self.merge(scores.softmax(-1) @ v, 0)), k


class ComplexRotary(Decoder):
    """Pairs of neighbours as complex numbers, from a table of `polar`."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(MAX_ROWS).float(), frequencies(100.0))
        self.register_buffer("table", torch.polar(torch.ones_like(angle), angle), persistent=False)

    def project(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, layer)
        table = self.table[: x.shape[1]]
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2)) * table).flatten(-2)
            for y in (q, k)
        )
        return q, k, v


class BasesOfLayers(Rotary):
    """Another base in every layer."""

    layers = 2

    def inverse(self, layer: int, rows: int) -> Tensor:
        return frequencies((100.0, 5000.0)[layer])


class LinearScaling(Rotary):
    """Positions divided by a factor."""

    def inverse(self, layer: int, rows: int) -> Tensor:
        return frequencies(100.0) / 4.0


class FixedNtk(Rotary):
    """A base stretched by a fixed factor."""

    def inverse(self, layer: int, rows: int) -> Tensor:
        return frequencies(100.0 * 4.0 ** (DEPTH / (DEPTH - 2)))


class Yarn(Rotary):
    """Frequencies blended between scaled and not, and a factor on both."""

    factor = 0.1 * math.log(4.0) + 1.0

    def inverse(self, layer: int, rows: int) -> Tensor:
        plain = frequencies(100.0)
        ramp = ((torch.arange(DEPTH // 2).float() - 1) / 2).clamp(0, 1)
        return plain / 4.0 * ramp + plain * (1 - ramp)


class LongRope(Rotary):
    """Long factors from 200 rows on: below the switch the short ones hold."""

    def inverse(self, layer: int, rows: int) -> Tensor:
        factors = torch.tensor([1.0, 1.5, 2.0, 4.0]) if rows > 200 else torch.tensor([1.0, 1.1, 1.2, 1.3])
        return frequencies(100.0) / factors


class CountedPositions(Decoder):
    """`position_ids` from a running sum over the padding mask, padded on the left."""

    batches = True

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(MAX_ROWS, SIZE)

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        (mask,) = more
        position = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
        return self.embed(ids) + self.table(position)

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        i, j = grid(x)
        own = i == j  # so that a padded row is no NaN
        return (j <= i) & more[0][:, None, None, :].bool() | own

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return (left_padding(ids),)


def left_padding(ids: Tensor) -> Tensor:
    return (torch.arange(ids.shape[1]) >= torch.arange(ids.shape[0])[:, None]).long()


class OffsetOfTwo(CountedPositions):
    """OPT: positions begin at two, and a padded row has the position one."""

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        (mask,) = more
        position = (torch.cumsum(mask, dim=1) * mask - 1).long()
        return self.embed(ids) + self.table(position + 2)


class GivenPositions(Rotary):
    """`position_ids` are an argument."""

    batches = True

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer, *more)
        i, j = grid(x)
        return self.merge((q @ k.mT * DEPTH**-0.5).masked_fill(j > i, NEG_INF).softmax(-1) @ v, layer)

    def positions(self, x: Tensor, *more: Any) -> Tensor:
        return more[0]

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return (torch.arange(ids.shape[1]).expand(*ids.shape) + 5,)


class Biased(Decoder):
    """A bias is added to the scores."""

    def bias(self, x: Tensor, *more: Any) -> Tensor:
        raise NotImplementedError

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        scores = q @ k.mT * DEPTH**-0.5 + self.bias(x, *more)
        return self.merge(scores.masked_fill(~self.seen(x, layer, *more), NEG_INF).softmax(-1) @ v, layer)


class AlibiByDistance(Biased):
    """`-slope * |i - j|`."""

    def bias(self, x: Tensor, *more: Any) -> Tensor:
        i, j = grid(x)
        slopes = 2.0 ** -torch.arange(1, HEADS + 1)
        return -(i - j).abs() * slopes[:, None, None]


class AlibiByKey(Biased):
    """`slope * j`: a softmax does not notice what is the same for all keys of a row."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1), persistent=False)

    def bias(self, x: Tensor, *more: Any) -> Tensor:
        return self.slopes.view(1, HEADS, 1, 1) * torch.arange(x.shape[1]).view(1, 1, 1, -1)


class AlibiOfPadding(Biased):
    """Bloom: positions of the keys are counted over the padding mask, heads and texts are one axis, `baddbmm`."""

    batches = True

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (y.reshape(b * HEADS, s, DEPTH) for y in self.project(x, layer))
        (mask,) = more
        position = ((mask.cumsum(-1) - 1) * mask)[:, None, :]
        slopes = torch.tensor([0.5, 0.25])
        bias = (slopes[..., None] * position).reshape(b * HEADS, 1, s)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=DEPTH**-0.5).view(b, HEADS, s, s)
        i, j = grid(x)
        hidden = (j > i) | ~mask[:, None, None, :].bool() & (i != j)
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        return self.merge((weights.view(b * HEADS, s, s) @ v).view(b, HEADS, s, DEPTH), layer)

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return (left_padding(ids),)


class AlibiTable(Biased):
    """A registered table of biases and masks, cut to the text and passed to SDPA."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        i, j = torch.arange(MAX_ROWS)[:, None], torch.arange(MAX_ROWS)
        slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
        self.register_buffer("table", (slopes[:, None, None] * (j - i)).masked_fill(j > i, NEG_INF), persistent=False)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        s = x.shape[1]
        return self.merge(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.table[:, :s, :s]), layer)


class AlibiFromTheEnd(Biased):
    """MPT: distances to the last row, another constant for each length, which a softmax does not notice."""

    def bias(self, x: Tensor, *more: Any) -> Tensor:
        distance = torch.arange(1 - x.shape[1], 1).view(1, 1, 1, -1)
        return distance * torch.tensor([0.5, 0.25]).view(1, HEADS, 1, 1)


class T5Buckets(Biased):
    """Buckets of distances: exact ones, then logarithmic ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, HEADS)

    def bias(self, x: Tensor, *more: Any) -> Tensor:
        i, j = grid(x)
        distance = -torch.min(j - i, torch.zeros_like(j - i))
        large = 4 + (torch.log(distance.float() / 4) / math.log(16 / 4) * 4).to(torch.long)
        large = torch.min(large, torch.full_like(large, 7))
        return self.table(torch.where(distance < 4, distance, large)).permute(2, 0, 1).unsqueeze(0)


class Shaw(Decoder):
    """Vectors of clipped distances join the keys and the values."""

    def __init__(self) -> None:
        super().__init__()
        self.of_keys, self.of_values = nn.Embedding(5, DEPTH), nn.Embedding(5, DEPTH)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        distance = (j - i).clamp(-4, 0) + 4
        scores = q @ k.mT + torch.einsum("bhid,ijd->bhij", q, self.of_keys(distance))
        weights = (scores * DEPTH**-0.5).masked_fill(j > i, NEG_INF).softmax(-1)
        return self.merge(weights @ v + torch.einsum("bhij,ijd->bhid", weights, self.of_values(distance)), layer)

    kernels = 0


class ShawOfKeys(Decoder):
    """Vectors of clipped distances join the keys alone."""

    def __init__(self) -> None:
        super().__init__()
        self.of_keys = nn.Embedding(5, DEPTH)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        scores = q @ k.mT + torch.einsum("bhid,ijd->bhij", q, self.of_keys((j - i).clamp(-4, 0) + 4))
        return self.merge((scores * DEPTH**-0.5).masked_fill(j > i, NEG_INF).softmax(-1) @ v, layer)


class TransformerXl(Decoder):
    """Content and position, each with a bias of its own; the positions are gathered by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.content, self.place = (
            nn.Parameter(torch.randn(HEADS, 1, DEPTH)),
            nn.Parameter(torch.randn(HEADS, 1, DEPTH)),
        )
        self.of_places = nn.Linear(SIZE, SIZE, bias=False)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        s = x.shape[1]
        i, j = grid(x)
        angle = torch.outer(torch.arange(s).float(), frequencies(100.0, SIZE))
        places = self.of_places(torch.cat((angle.sin(), angle.cos()), -1)).view(s, HEADS, DEPTH)
        of_places = torch.einsum("bhid,jhd->bhij", q + self.place, places)
        distance = (i - j).clamp(min=0).expand(*of_places.shape)
        scores = (q + self.content) @ k.mT + of_places.gather(-1, distance)
        return self.merge((scores * DEPTH**-0.5).masked_fill(j > i, NEG_INF).softmax(-1) @ v, layer)


class RelativeShift(TransformerXl):
    """The same, counted from the end, and the scores shifted by a view, as Dai et al. wrote it."""

    bytes_per_row = 3 * SIZE * 4  # keys, values, and the vector of a distance

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        s = x.shape[1]
        i, j = grid(x)
        angle = torch.outer(self.distances(s), frequencies(100.0, SIZE))
        places = self.of_places(torch.cat((angle.sin(), angle.cos()), -1)).view(-1, HEADS, DEPTH)
        shifted = self.shift(torch.einsum("bhid,jhd->bhij", q + self.place, places))
        scores = (q + self.content) @ k.mT + shifted
        return self.merge((scores * DEPTH**-0.5).masked_fill(j > i, NEG_INF).softmax(-1) @ v, layer)

    def distances(self, s: int) -> Tensor:
        return torch.arange(s - 1, -1, -1.0)

    def shift(self, x: Tensor) -> Tensor:
        b, h, s, _ = x.shape
        return nn.functional.pad(x, (1, 0)).view(b, h, s + 1, s)[:, :, 1:].view(b, h, s, s)


class RelativeShiftOfBothSides(RelativeShift):
    """With vectors for later keys as well, as Conformers have them; those scores are masked."""

    def distances(self, s: int) -> Tensor:
        return torch.arange(s - 1, -s, -1.0)

    def shift(self, x: Tensor) -> Tensor:
        b, h, s, n = x.shape
        return nn.functional.pad(x, (1, 0)).view(b, h, n + 1, s)[:, :, 1:].view(b, h, s, n)[..., :s]


class MusicTransformer(Decoder):
    """A learned table, cut from its end (Huang et al.)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(MAX_ROWS, DEPTH))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        b, h, s, _ = q.shape
        i, j = grid(x)
        by_distance = q @ self.table[MAX_ROWS - s :].t()
        by_distance = nn.functional.pad(by_distance, (1, 0)).reshape(b, h, s + 1, s)[:, :, 1:]
        scores = (q @ k.mT + by_distance) * DEPTH**-0.5
        return self.merge(scores.masked_fill(j > i, NEG_INF).softmax(-1) @ v, layer)


class Deberta(Decoder):
    """Content to position and position to content, gathered by clipped distance; causal."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(8, SIZE))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        s = x.shape[1]
        of_q, of_k, _ = self.qkv[layer](self.places).view(8, 3, HEADS, DEPTH).permute(1, 2, 0, 3)
        distance = (i - j + 4).clamp(0, 7).expand(*q.shape[:2], s, s)
        to_place = (q @ of_k.mT).gather(-1, distance)
        to_content = (k @ of_q.mT).gather(-1, distance.mT).mT
        scores = (q @ k.mT + to_place + to_content) / math.sqrt(3 * DEPTH)
        return self.merge(scores.masked_fill(j > i, torch.finfo(scores.dtype).min).softmax(-1) @ v, layer)


class RepeatedForTheBatch(Decoder):
    """A table of positions and a bias, repeated for each sequence of a batch of unknown size, and for each row."""

    batches = True

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, MAX_ROWS, SIZE))
        self.bias = nn.Parameter(torch.randn(SIZE))

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        b, s = ids.shape
        return self.embed(ids) + self.table[:, :s].repeat(b, 1, 1) + self.bias.tile((b, s, 1))


class FirstRowsWritten(Decoder):
    """Each token with the one before it, by a turn whose first row is written over, and fixed rows in the text."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fixed = nn.Parameter(torch.randn(SIZE)), nn.Parameter(torch.randn(2, SIZE))

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        x = self.embed(ids)
        before = x.roll(1, 1)
        before[:, 0] = self.first
        x = x + before
        x[:, :1] = 0.5
        x[:, 2:4] = self.fixed
        return x


class FloatPositions(Decoder):
    """Sines of positions that are counted in floating point."""

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        angle = torch.outer(torch.arange(0, ids.shape[1], 1.0), frequencies(100.0, SIZE))
        other = torch.outer(torch.arange(0.0, ids.shape[1]), frequencies(30.0, SIZE))
        return self.embed(ids) + torch.cat((angle.sin(), other.cos()), -1)


class HashedTokens(Decoder):
    """Features of the bits of a token."""

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        bits = torch.stack(((ids << 3) % 7, ids >> 1, ids >> (ids % 3)), -1).float()
        return self.embed(ids) + nn.functional.pad(bits, (0, SIZE - 3)) / 4


class SlopesOfPassedPositions(Decoder):
    """ALiBi of positions that the caller passes, beside the lowest number: no integer comes near that."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25]))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        (place,) = more
        far = (place[:, None] - place[:, :, None]).abs()[:, None].float()
        scores = q @ k.mT * DEPTH**-0.5 - self.slopes[:, None, None] * far
        return self.merge(scores.masked_fill(j > i, torch.finfo(x.dtype).min).softmax(-1) @ v, layer)

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return (torch.arange(ids.shape[1]).expand(*ids.shape) * 3,)


class Tempered(Decoder):
    """A temperature that the caller passes, beside a mask of -1e9."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        return self.merge((q @ k.mT / more[0]).masked_fill(j > i, -1e9).softmax(-1) @ v, layer)

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return (torch.tensor(3.5),)


POSITIONS = (
    SlopesOfPassedPositions,
    Tempered,
    PartialRotary,
    WholeRotary,
    ComplexRotary,
    BasesOfLayers,
    LinearScaling,
    FixedNtk,
    Yarn,
    LongRope,
    CountedPositions,
    OffsetOfTwo,
    GivenPositions,
    AlibiByDistance,
    AlibiByKey,
    AlibiOfPadding,
    AlibiTable,
    AlibiFromTheEnd,
    T5Buckets,
    Shaw,
    ShawOfKeys,
    TransformerXl,
    RelativeShift,
    RelativeShiftOfBothSides,
    MusicTransformer,
    Deberta,
    RepeatedForTheBatch,
    FirstRowsWritten,
    HashedTokens,
    FloatPositions,
)
