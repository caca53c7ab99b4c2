"""What becomes of the scores, the weights and the values."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from tests.coverage.base import DEPTH, HEADS, MAX_ROWS, NEG_INF, SIZE, Decoder, grid


class SoftCap(Decoder):
    """Scores between -4 and 4."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        scores = 4 * torch.tanh(q @ k.mT * DEPTH**-0.5 / 4)
        return self.merge(scores.masked_fill(~self.seen(x, layer), NEG_INF).softmax(-1) @ v, layer)


class LearnedSink(Decoder):
    """A learned score that has no value."""

    batches = True

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.tensor([0.3, -0.2]))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        scores = (q @ k.mT * DEPTH**-0.5).masked_fill(~self.seen(x, layer), NEG_INF)
        sink = self.sink.view(1, HEADS, 1, 1).expand(*scores.shape[:3], 1)
        return self.merge(torch.cat((scores, sink), -1).softmax(-1)[..., :-1] @ v, layer)


class SinkOfEveryRow(LearnedSink):
    """The same, repeated for every row before it gets an axis of its own; first among the columns."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        scores = (q @ k.mT * DEPTH**-0.5).masked_fill(~self.seen(x, layer), NEG_INF)
        sink = self.sink[None, :, None].expand(*scores.shape[:3])[..., None]
        return self.merge(torch.cat((sink, scores), -1).softmax(-1)[..., 1:] @ v, layer)


class SoftmaxOffByOne(Decoder):
    """`exp(s) / (1 + sum exp(s))`: a sink of zero."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        scores = (q @ k.mT * DEPTH**-0.5).masked_fill(~self.seen(x, layer), NEG_INF)
        zero = torch.zeros_like(scores[..., :1])
        return self.merge(torch.cat((zero, scores), -1).softmax(-1)[..., 1:] @ v, layer)


class NormalisedHeads(Decoder):
    """Queries and keys are normalised head by head, and scaled by a learned number per head."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.5, 3.0]))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        q, k = rms_norm(q, (DEPTH,)), nn.functional.normalize(k, dim=-1)
        scores = q @ k.mT * self.gain.view(HEADS, 1, 1)
        return self.merge(scores.masked_fill(~self.seen(x, layer), NEG_INF).softmax(-1) @ v, layer)


class TemperatureOfPosition(Decoder):
    """Queries are scaled by the logarithm of their own position."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        position = torch.arange(x.shape[1])
        heat = torch.log1p(torch.floor((position.float() + 1.0) / 4)) * 0.5 + 1.0
        return self.merge(scaled_dot_product_attention(q * heat.view(1, 1, -1, 1), k, v, is_causal=True), layer)


class SharpenedScores(Decoder):
    """The scores of a row are divided by the square root of how many keys it has."""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        scores = q @ k.mT / torch.sqrt(i + 1.0)
        return self.merge(scores.masked_fill(j > i, NEG_INF).softmax(-1) @ v, layer)


class Sigmoid(Decoder):
    """Each weight by itself."""

    kernels = 0

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        scores = (q @ k.mT * DEPTH**-0.5 - 1.0).masked_fill(~self.seen(x, layer), NEG_INF)
        return self.merge(torch.sigmoid(scores) @ v, layer)


class Relu(Decoder):
    """Squared, and divided by how many keys there are."""

    kernels = 0

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        weights = torch.relu((q @ k.mT).masked_fill(j > i, NEG_INF)).square() / (i + 1)
        return self.merge(weights @ v, layer)


class Linear(Decoder):
    """Linear attention in its quadratic form: a product of features, times a triangle, over its sum."""

    kernels = 0

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        weights = torch.tril(torch.einsum("bhid,bhjd->bhij", q, k))
        return self.merge((weights @ v) / weights.sum(-1, keepdim=True), layer)


class Retention(Decoder):
    """RetNet: a power of the distance, zero above the diagonal."""

    kernels = 0

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        decay = torch.where(j <= i, torch.tensor([0.9, 0.7]).view(HEADS, 1, 1) ** (i - j).float(), 0.0)
        y = (q @ k.mT * decay) @ v
        return self.merge(
            nn.functional.group_norm(y.transpose(1, 2).reshape(-1, SIZE), HEADS)
            .view_as(x)
            .view(*x.shape[:2], HEADS, DEPTH)
            .transpose(1, 2),
            layer,
        )


class Differential(Decoder):
    """The difference of two softmaxes weighs the values."""

    batches = True

    kernels = 2

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor([0.4, 0.6]))
        self.second = nn.Linear(SIZE, 2 * SIZE)

    def weights(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return (q @ k.mT * DEPTH**-0.5).masked_fill(~self.seen(x, 0), NEG_INF).softmax(-1)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        r, m = self.second(x).view(*x.shape[:2], 2, HEADS, DEPTH).permute(2, 0, 3, 1, 4)
        weights = self.weights(q, k, x) - self.share.view(HEADS, 1, 1) * self.weights(r, m, x)
        return self.merge(rms_norm(weights @ v, (DEPTH,)) * 0.5, layer)


class DifferentialPairs(Differential):
    """The same, as its authors wrote it: one softmax of all heads, cut in two afterwards."""

    kernels = 1

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.project(x, layer)
        q, k = (y.transpose(1, 2).reshape(b, s, 2 * HEADS, DEPTH // 2).transpose(1, 2) for y in (q, k))
        weights = self.weights(q, k, x).view(b, HEADS, 2, s, s)
        weights = weights[:, :, 0] - self.share.view(HEADS, 1, 1) * weights[:, :, 1]
        return self.merge(torch.matmul(weights, v), layer)


class Gated(Decoder):
    """The result is gated by the rows that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(SIZE, SIZE)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        return super().mix(x, layer) * torch.sigmoid(self.gate(x))


class ValueResidual(Decoder):
    """Values of later layers are mixed with those of the first."""

    layers = 3

    def forward(self, ids: Tensor, *more: Any) -> Any:
        x, first = self.embed(ids), None
        for layer in range(self.layers):
            q, k, v = self.project(x, layer)
            first = v if first is None else first
            x = x + self.merge(scaled_dot_product_attention(q, k, 0.6 * v + 0.4 * first, is_causal=True), layer)
        return self.head(x)


class SharedKeys(Decoder):
    """Every second layer asks the keys and values of the one before."""

    layers = 4
    bytes_per_row = 2 * 2 * SIZE * 4  # two layers, keys and values, float32

    def forward(self, ids: Tensor, *more: Any) -> Any:
        x = self.embed(ids)
        k = v = torch.empty(0)
        for layer in range(self.layers):
            q, own_k, own_v = self.project(x, layer)
            k, v = (own_k, own_v) if layer % 2 == 0 else (k, v)
            x = x + self.merge(scaled_dot_product_attention(q, k, v, is_causal=True), layer)
        return self.head(x)


class KeysAreValues(Decoder):
    """One table is both."""

    bytes_per_row = SIZE * 4

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, _ = self.project(x, layer)
        return self.merge(scaled_dot_product_attention(q, k, k, is_causal=True), layer)


class TalkingHeads(Decoder):
    """Scores and weights are mixed over the heads."""

    kernels = 0

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Parameter(torch.randn(HEADS, HEADS)), nn.Parameter(torch.randn(HEADS, HEADS))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        scores = torch.einsum("bhij,hg->bgij", q @ k.mT * DEPTH**-0.5, self.before)
        weights = scores.masked_fill(~self.seen(x, layer), NEG_INF).softmax(-1)
        return self.merge(torch.einsum("bhij,hg->bgij", weights, self.after) @ v, layer)


class TalkingConvolution(Decoder):
    """Scores of all heads are mixed by a convolution over single points."""

    kernels = 0

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Conv2d(HEADS, HEADS, 1)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        scores = self.talk(q @ k.mT * DEPTH**-0.5)
        return self.merge(scores.masked_fill(~self.seen(x, layer), NEG_INF).softmax(-1) @ v, layer)


class GatedResidual(Decoder):
    """What a layer adds goes through a gated recurrent cell, row by row (GTrXL)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(SIZE, SIZE)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        y = super().mix(x, layer)
        return self.cell(y.flatten(0, 1), x.flatten(0, 1)).view_as(x) - x


class Cosine(Decoder):
    """Keys by distance on the sphere, with a clamped temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.heat = nn.Parameter(torch.full((HEADS, 1, 1), math.log(8.0)))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = (nn.functional.normalize(y, dim=-1) for y in self.project(x, layer))
        scores = q @ k.mT * self.heat.clamp(max=math.log(100.0)).exp()
        return self.merge(scores.masked_fill(~self.seen(x, layer), NEG_INF).softmax(-1) @ v, layer)


class Forgetting(Decoder):
    """Forgetting Transformer: a running sum of log gates is the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(SIZE, HEADS)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        kept = nn.functional.logsigmoid(self.gate(x)).cumsum(1).transpose(1, 2)
        scores = q @ k.mT * DEPTH**-0.5 + kept[..., :, None] - kept[..., None, :]
        return self.merge(scores.masked_fill(~self.seen(x, layer), NEG_INF).softmax(-1) @ v, layer)


class Streams(Decoder):
    """Two streams on one axis (ProphetNet): tokens, and predictions that see tokens before them and themselves."""

    layers = 2
    kernels = 2  # of the tokens; the others are one softmax over rows of two streams

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(MAX_ROWS, SIZE))

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        x = self.embed(ids)
        return torch.cat([x, self.place[: ids.shape[1]].expand_as(x)], 1)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        (q, p), (k, own_k), (v, own_v) = (stacked.chunk(2, 2) for stacked in self.project(x, layer))
        i, j = grid(x[:, : x.shape[1] // 2])
        tokens = (q @ k.mT * DEPTH**-0.5).masked_fill(j > i, NEG_INF).softmax(-1) @ v
        seen = torch.cat([(j < i) | (j == 0), j == i], 1)
        scores = (p @ torch.cat([k, own_k], 2).mT * DEPTH**-0.5).masked_fill(~seen, NEG_INF)
        predicted = scores.softmax(-1) @ torch.cat([v, own_v], 2)
        return self.merge(torch.cat([tokens, predicted], 2), layer)

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        return self.head(x[:, ids.shape[1] :])


class StreamsApart(Streams):
    """Three streams in one attention, which do not see each other; the last two come out, split by sizes."""

    kernels = 2

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        two = super().enter(ids)
        return torch.cat([two, self.embed(ids) * 0.5], 1)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, HEADS, 3, s // 3, DEPTH) for t in self.project(x, layer))
        i, j = grid(x[:, : s // 3])
        y = (q @ k.mT * DEPTH**-0.5).masked_fill(j > i, NEG_INF).softmax(-1) @ v
        return self.merge(y.view(b, HEADS, s, DEPTH), layer)

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        _, others = x.split([ids.shape[1], 2 * ids.shape[1]], 1)
        return self.head(others.unflatten(1, (2, -1)))


class LearnedQueries(Decoder):
    """Learned queries, one copy for each text, attend to each other, and every row to what comes of that (Q-Former)."""

    batches = True

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, HEADS, 3, DEPTH))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        learned = self.queries.expand(x.shape[0], -1, -1, -1)
        memory = scaled_dot_product_attention(learned, learned, learned)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.merge(y + scaled_dot_product_attention(q, memory, memory), layer)


class TwoPlaces(Decoder):
    """Each token makes two places, and a causal mask counts those: the rows of a product are part of an axis."""

    refused = "KV207"

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        b, s, _ = x.shape
        places = x.view(b, s, 2, SIZE // 2).flatten(1, 2)
        y = scaled_dot_product_attention(places, 1.1 * places, 0.7 * places, is_causal=True)
        return y.reshape(b, s, SIZE)


class SmallestFloor(Decoder):
    """The smallest number there is, as a tensor: no integer holds it."""

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        x = super().enter(ids)
        return torch.maximum(x, torch.full(x.shape, torch.finfo(x.dtype).min))


class FiniteWeights(Decoder):
    """Rows are strictly before their own: the first one sees nothing, and its NaN become zeros."""

    kernels = 0

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        weights = (q @ k.mT * DEPTH**-0.5).masked_fill(j >= i, NEG_INF).softmax(-1)
        return self.merge(torch.nan_to_num(weights) @ v, layer)


class Shaped(Decoder):
    """The identity is added to the weights, and the mean over what a row sees is taken off."""

    kernels = 0

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.gamma = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(0.3))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        weights = (q @ k.mT * DEPTH**-0.5).masked_fill(j > i, NEG_INF).softmax(-1)
        mean = torch.ones(len(i), len(i)).tril() / (i + 1)
        return self.merge((self.alpha * torch.eye(len(i)) + weights - self.gamma * mean) @ v, layer)


class BetweenTwo(Decoder):
    """Weights between two softmaxes, and less a part of one."""

    kernels = 0

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        a, b = ((y @ k.mT * DEPTH**-0.5).masked_fill(j > i, NEG_INF).softmax(-1) for y in (q, v))
        return self.merge(torch.lerp(a, torch.sub(a, b, alpha=0.3), 0.4) @ v, layer)


class EightBitKeys(Decoder):
    """Keys as they would be kept in eight bits: what is stored is that."""

    bytes_per_row = SIZE + 4 * SIZE

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        k = k.to(torch.float8_e4m3fn).to(x.dtype)
        return self.merge(scaled_dot_product_attention(q, k, v, is_causal=True), layer)


class ChosenPairs(Decoder):
    """An indexer: features of two rows say whether one sees the other."""

    kernels = 0

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        seen = (v @ q.mT > 0) & (j < i) | (i == j)
        return self.merge((q @ k.mT * DEPTH**-0.5).masked_fill(~seen, NEG_INF).softmax(-1) @ v, layer)


SCORES = (
    Shaped,
    BetweenTwo,
    EightBitKeys,
    ChosenPairs,
    SmallestFloor,
    TwoPlaces,
    SoftCap,
    LearnedSink,
    SinkOfEveryRow,
    SoftmaxOffByOne,
    NormalisedHeads,
    TemperatureOfPosition,
    SharpenedScores,
    Sigmoid,
    Relu,
    Linear,
    Retention,
    Differential,
    DifferentialPairs,
    Gated,
    ValueResidual,
    SharedKeys,
    KeysAreValues,
    TalkingHeads,
    TalkingConvolution,
    GatedResidual,
    Cosine,
    Forgetting,
    Streams,
    StreamsApart,
    FiniteWeights,
)
