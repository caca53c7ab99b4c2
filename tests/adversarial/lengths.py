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
