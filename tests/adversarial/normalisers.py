"""Softmax that is written out almost as it should be: each of these is another function, causal or not."""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from tests.adversarial.base import SIZE, Model, grid

NEG_INF = float("-inf")


def triangle(x: Tensor) -> Tensor:
    i, j = grid(x)
    return (j <= i).to(x.dtype)


# --- not causal ------------------------------------------------------------------------------------------------------


class SumBeforeTheMask(Model):
    """The keys that are masked have gone into the sum."""

    def mix(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        weights = scores.exp()
        return self.merge((weights * triangle(x) / weights.sum(-1, keepdim=True)) @ v)


class EpsilonBesideAllKeys(Model):
    """Divided by the sum once more, after the mask, but beside an epsilon the first sum does not cancel."""

    def mix(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        weights = scores.softmax(-1) * triangle(x)
        return self.merge((weights / (weights.sum(-1, keepdim=True) + 0.05)) @ v)


class MaximumOfMaskedKeys(Model):
    """The largest score of the row is taken off before the mask, and an epsilon makes the difference visible."""

    def mix(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        weights = (scores - scores.amax(-1, keepdim=True)).exp() * triangle(x)
        return self.merge((weights / (weights.sum(-1, keepdim=True) + 0.05)) @ v)


class MaximumOverQueries(Model):
    """What is taken off differs by key, and later queries decide it."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        scores = scores.masked_fill(j > i, NEG_INF)
        return self.merge((scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v)


class LogarithmOfAllKeys(Model):
    """The logarithm of the sum was taken before the mask."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        total = scores.logsumexp(-1, keepdim=True)
        return self.merge((scores.masked_fill(j > i, NEG_INF) - total).exp() @ v)


class ZeroBeforeTheExponential(Model):
    """Scores are multiplied by the triangle before `exp`, which makes ones of the zeros."""

    def mix(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        weights = (scores * triangle(x)).exp()
        return self.merge(weights / weights.sum(-1, keepdim=True) @ v)


class LogarithmOfAHalf(Model):
    """The logarithm of one and a half: a bias, and no mask."""

    def mix(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        return self.merge((scores + (0.5 + 0.5 * triangle(x)).log()).softmax(-1) @ v)


class FloorAboveTheMask(Model):
    """No score is less than -3, the masked ones included."""

    def mix(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        return self.merge((scores + (triangle(x) - 1) * 1e9).clamp(min=-3.0).softmax(-1) @ v)


class MaskOfTheOtherSign(Model):
    """What is taken off hides the past."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        return self.merge((scores - 1e9 * (j < i).to(x.dtype)).softmax(-1) @ v)


class FlexOffByOne(Model):
    """`flex_attention` that sees the next key."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(j <= i + 1, s, NEG_INF)

        return self.merge(flex_attention(q, k, v, score_mod=score))


class EncoderWithoutMask(Model):
    """A layer of PyTorch's that nobody gave a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(SIZE, 2, SIZE, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.layer(x)


# --- causal, and not a softmax ---------------------------------------------------------------------------------------


class EpsilonInTheSum(Model):
    """An epsilon beside the sum."""

    def mix(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        weights = scores.exp() * triangle(x)
        return self.merge((weights / (weights.sum(-1, keepdim=True) + 0.5)) @ v)


class FloorUnderTheSum(Model):
    """A sum that is no less than two, the first product with the values."""

    def mix(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        weights = scores.exp() * triangle(x)
        return self.merge(weights @ v / weights.sum(-1, keepdim=True).clamp(min=2.0))


class DecayedWeights(Model):
    """The factor is no mask: it fades with the distance."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        weights = scores.exp() * triangle(x) * 0.5 ** (i - j).clamp(min=0)
        return self.merge(weights / weights.sum(-1, keepdim=True) @ v)


class SumOfOtherWeights(Model):
    """Divided by the sum of something else."""

    def mix(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        other = (2.0 * scores).exp() * triangle(x)
        return self.merge(scores.exp() * triangle(x) / other.sum(-1, keepdim=True) @ v)


class SumsOfTheKeysRows(Model):
    """The sums stand along the keys: each weight is divided by the sum of the row of its key."""

    def mix(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        weights = scores.exp() * triangle(x)
        return self.merge(weights / weights.sum(-1).unsqueeze(-2) @ v)


class ZeroedFurther(Model):
    """Weights that are set to zero afterwards, and were not zero before."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        weights = scores.masked_fill(j > i, NEG_INF).softmax(-1)
        return self.merge(weights.masked_fill((j > i) | (j < i - 2), 0.0) @ v)


class HeadsTiled(Model):
    """Four query heads over two key heads: `h` reads `h % 2`, not `h // 2`."""

    def mix(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        i, j = grid(x)
        q, k, v = (y.view(b, s, 4, SIZE // 4).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        q, k, v = q.view(b, 2, 2, s, -1), k[:, None, :2], v[:, None, :2]
        weights = (q @ k.mT).masked_fill(j > i, NEG_INF).softmax(-1)
        return self.merge((weights @ v).flatten(1, 2))


class BiasOfHalfTheHeads(Model):
    """Two by two heads, and a bias that differs by one of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([[[[0.9]], [[-0.7]]]]))

    def mix(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        i, j = grid(x)
        q, k, v = (y.view(b, s, 2, 2, SIZE // 4).permute(0, 2, 3, 1, 4) for y in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.mT + self.bias * (i - j)
        weights = scores.masked_fill(j > i, NEG_INF).softmax(-1)
        return (weights @ v).permute(0, 3, 1, 2, 4).flatten(2)


NOT_CAUSAL = (
    SumBeforeTheMask,
    EpsilonBesideAllKeys,
    MaximumOfMaskedKeys,
    MaximumOverQueries,
    LogarithmOfAllKeys,
    ZeroBeforeTheExponential,
    LogarithmOfAHalf,
    FloorAboveTheMask,
    MaskOfTheOtherSign,
    FlexOffByOne,
    EncoderWithoutMask,
)

CAUSAL = (
    EpsilonInTheSum,
    FloorUnderTheSum,
    DecayedWeights,
    SumOfOtherWeights,
    SumsOfTheKeysRows,
    ZeroedFurther,
    HeadsTiled,
    BiasOfHalfTheHeads,
)
