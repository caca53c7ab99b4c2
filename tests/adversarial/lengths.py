"""An earlier row does not depend on later tokens, but on how many there are."""

import math

import torch
from torch import Tensor, nn

from tests.adversarial.base import MAX_ROWS, SIZE, Model, grid


class LogLength(Model):
    """Hidden states are scaled by the logarithm of the length, taken by Python."""

    def mix(self, x: Tensor) -> Tensor:
        return x * math.log(x.shape[1])


class LogLengthInTheGraph(Model):
    """The same, computed by the graph."""

    def mix(self, x: Tensor) -> Tensor:
        return x * torch.ones_like(x[0, :, 0]).sum().log()


class DividedByLength(Model):
    """The length as a Python number."""

    def mix(self, x: Tensor) -> Tensor:
        return x / x.shape[1]


class LengthInTheScale(Model):
    """Scores are divided by the square root of the number of keys."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        scores = scores * 3 / math.sqrt(x.shape[1])
        return self.merge(scores.masked_fill(j > i, float("-inf")).softmax(-1) @ v)


class PositionsFromTheEnd(Model):
    """Positions counted backwards from the last row."""

    def mix(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1]) - x.shape[1]
        return x * position[:, None] / 8


class RelativePositions(Model):
    """Positions between 0 and 1."""

    def mix(self, x: Tensor) -> Tensor:
        return x + torch.linspace(0, 1, x.shape[1])[:, None]


class TableFromTheEnd(Model):
    """A table of learned positions, its last entry for the last row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(MAX_ROWS, SIZE)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.table.weight[MAX_ROWS - x.shape[1] :]


class ParityOfLength(Model):
    """The sign of the length's parity."""

    def mix(self, x: Tensor) -> Tensor:
        return x * (x.shape[1] % 2)


class MeanOfPositions(Model):
    """Positions centred around their mean, which grows with the text."""

    def mix(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], dtype=x.dtype)
        return x * (position - position.mean())[:, None] / 8


class WindowOfHalf(Model):
    """Causal, in a window as long as half of the text."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, (j <= i) & (j > i - 1 - x.shape[1] // 2))


class DynamicNtk(Model):
    """Rotary positions whose base grows with the text, beyond its switch at six rows."""

    def mix(self, x: Tensor) -> Tensor:
        rows, size = x.shape[1], SIZE // 2
        base = 100.0 * ((2.0 * rows / 6) - 1.0) ** (size / (size - 2)) if rows > 6 else 100.0
        angle = torch.arange(rows)[:, None] / base ** (torch.arange(0, size, 2) / size)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        q, k, v = self.project(x)
        q, k = (y * cos + torch.cat((-y[..., size // 2 :], y[..., : size // 2]), -1) * sin for y in (q, k))
        i, j = grid(x)
        return self.merge((q @ k.mT).masked_fill(j > i, float("-inf")).softmax(-1) @ v)


class LogLengthScaling(Model):
    """Queries are scaled by the logarithm of how long the text is, in the graph."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        scale = torch.log(torch.tensor(1.0) * x.shape[1])
        return self.merge((scores * scale).masked_fill(j > i, float("-inf")).softmax(-1) @ v)


class DistanceFromTheEnd(Model):
    """A bias that grows towards the last row, by another slope for each key: no softmax forgets it."""

    def bias(self, x: Tensor) -> Tensor:
        distance = torch.arange(1 - x.shape[1], 1)
        return distance * torch.arange(x.shape[1]).float().cos()

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        return self.merge((scores + self.bias(x) / 4).masked_fill(j > i, float("-inf")).softmax(-1) @ v)


class DistanceThatSaturates(DistanceFromTheEnd):
    """Distances to the last row, but not below minus five."""

    def bias(self, x: Tensor) -> Tensor:
        return torch.arange(1 - x.shape[1], 1).clamp(min=-5) * torch.tensor([0.5, 0.25]).view(2, 1, 1)


class DistanceAsFactor(DistanceFromTheEnd):
    """Scores times the distance to the last row."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        scores = scores * torch.arange(1 - x.shape[1], 1) / 8
        return self.merge(scores.masked_fill(j > i, float("-inf")).softmax(-1) @ v)


class DistanceBesideAScale(DistanceFromTheEnd):
    """A bias that a softmax forgets, beside a scale by the length that it does not."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        q, k, v = self.project(x)
        bias = (torch.arange(1 - x.shape[1], 1) * torch.tensor([0.5, 0.25]).view(2, 1, 1)).masked_fill(
            j > i, float("-inf")
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=x.shape[1] / 8)
        return self.merge(y)


class DistanceUnmasked(DistanceFromTheEnd):
    """What is masked is brought back, and does not move with the length as the rest does."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        odd = (j % 2 == 1).expand(x.shape[1], x.shape[1])
        bias = torch.arange(1 - x.shape[1], 1) * torch.tensor([0.5, 0.25]).view(2, 1, 1)
        scores = (scores + bias).masked_fill(odd, -1e4) + 1e4 * odd
        return self.merge(scores.masked_fill(j > i, float("-inf")).softmax(-1) @ v)
