"""One text of a batch changes the answer for another; or chance does."""

import torch
from torch import Tensor
from torch.nn import functional

from tests.adversarial.base import Model


class MeanOverBatch(Model):
    """Every text gets the mean of all texts."""

    def mix(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0, keepdim=True)


class BatchStatistics(Model):
    """Batch normalisation with the statistics of this batch."""

    def mix(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)


class MaxOverBatch(Model):
    """The largest activation of the batch sets the scale for all."""

    def mix(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(dim=(0, 2), keepdim=True)


class AttentionOverBatch(Model):
    """Batch and sequence swapped: row `t` of one text attends to row `t` of the others."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x.transpose(0, 1))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.merge(y).transpose(0, 1)


class SoftmaxOverBatch(Model):
    """A gate that the texts share out among them."""

    def mix(self, x: Tensor) -> Tensor:
        return x * x.softmax(dim=0)


class NeighbourInBatch(Model):
    """Every text gets the rows of the text before it."""

    def mix(self, x: Tensor) -> Tensor:
        return x.roll(1, 0)


class NeighbourJoined(Model):
    """The same, cut out of the texts behind each other."""

    def mix(self, x: Tensor) -> Tensor:
        return torch.cat((x, x))[1 : x.shape[0] + 1]


class CumsumOverBatch(Model):
    """Every text gets the sum of the texts before it."""

    def mix(self, x: Tensor) -> Tensor:
        return x.cumsum(0)


class FirstTextForAll(Model):
    """Every text gets the rows of the first one."""

    def mix(self, x: Tensor) -> Tensor:
        return x[:1].expand_as(x)


class Dropout(Model):
    """Dropout that `eval()` does not turn off."""

    def mix(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5, training=True)


class Noise(Model):
    """Uniform noise."""

    def mix(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class CoinFlips(Model):
    """A causal mask with holes drawn by chance."""

    def mix(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        rows = x.shape[1]
        allowed = torch.bernoulli(torch.full((rows, rows), 0.5)).bool().tril() | torch.eye(rows, dtype=torch.bool)
        return self.merge(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v)
