"""Attention that sees a little of the future, each in one small place."""

import torch
from torch import Tensor
from torch.nn import functional

from tests.adversarial.base import MAX_ROWS, SIZE, Model, grid


class OffByOneMask(Model):
    """`j <= i + 1`: every query sees the next key."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, j <= i + 1)


class TriangleFromDiagonalOne(Model):
    """The same by `tril(diagonal=1)`."""

    def mix(self, x: Tensor) -> Tensor:
        rows = x.shape[1]
        scores, v = self.scores(x)
        mask = torch.tril(torch.ones(rows, rows), diagonal=1)
        return self.merge(scores.masked_fill(mask == 0, float("-inf")).softmax(-1) @ v)


class Bidirectional(Model):
    """No mask at all."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.merge(functional.scaled_dot_product_attention(q, k, v))


class PrefixLm(Model):
    """The first four rows see each other, in both directions."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, (j <= i) | (j < 4))


class TwoSidedWindow(Model):
    """A window that reaches as far forward as it reaches back."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, (i - j).abs() <= 2)


class BlockCausal(Model):
    """Causal between blocks of four rows, both ways within one."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, j // 4 <= i // 4)


class ReversedMask(Model):
    """`j >= i`: the causal mask of a text read backwards."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, j >= i)


class TransposedTriangle(Model):
    """A buffer with the right triangle, used transposed."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(MAX_ROWS, MAX_ROWS, dtype=torch.bool).tril())

    def mix(self, x: Tensor) -> Tensor:
        rows = x.shape[1]
        return self.attend(x, self.mask[:rows, :rows].t())


class FlippedEntry(Model):
    """A buffer that is a triangle but for one entry: row 3 sees row 7."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        mask = torch.ones(MAX_ROWS, MAX_ROWS, dtype=torch.bool).tril()
        mask[3, 7] = True
        self.register_buffer("mask", mask)

    def mix(self, x: Tensor) -> Tensor:
        rows = x.shape[1]
        return self.attend(x, self.mask[:rows, :rows])


class OneLayerForgets(Model):
    """The first layer is causal, the second is not."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        x = x + self.merge(functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        q, k, v = self.project(x)
        return self.merge(functional.scaled_dot_product_attention(q, k, v, is_causal=False))


class OneHeadForgets(Model):
    """One head is causal, the other is not."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        head = torch.arange(2)[:, None, None]
        return self.attend(x, (j <= i) | (head == 1))


class WrongSoftmaxAxis(Model):
    """The mask is right, but each key's weights are normalised over the queries, the later ones included."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        return self.merge(scores.masked_fill(j > i, -1e4).softmax(dim=-2) @ v)


class MaskAfterSoftmax(Model):
    """Weights of future keys are set to zero after they have gone into the sum."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        return self.merge((scores.softmax(-1) * (j <= i)) @ v)


class FilledWithZero(Model):
    """Masked with 0 instead of -inf: a future key weighs as much as an indifferent one."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        return self.merge(scores.masked_fill(j > i, 0.0).softmax(-1) @ v)


class FilledWithMinusFive(Model):
    """A fill so small that `exp` of it still counts."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        return self.merge(torch.where(j <= i, scores, -5.0).softmax(-1) @ v)


class EmptiedRow(Model):
    """`j < i` with a finite fill: row 0 keeps no key, so it weighs all rows alike, the future ones included."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        return self.merge(scores.masked_fill(j >= i, -1e9).softmax(-1) @ v)


class MaxOverAllScores(Model):
    """The largest score of the whole matrix is taken off, and an epsilon makes the difference visible."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        weights = torch.exp(scores - scores.amax(dim=(-2, -1), keepdim=True)) * (j <= i)
        return self.merge(weights / (weights.sum(-1, keepdim=True) + 0.05) @ v)


class ScoresScaledByRow(Model):
    """Scores are divided by the largest of their row before the mask is applied."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        scores = scores / scores.abs().amax(-1, keepdim=True)
        return self.merge(scores.masked_fill(j > i, float("-inf")).softmax(-1) @ v)


class ShiftedKeys(Model):
    """The mask is causal, but the keys have been moved by one row."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        k, v = torch.roll(k, -1, dims=2), torch.roll(v, -1, dims=2)
        return self.merge(functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class LinearAttention(Model):
    """`q (k^T v)` without a mask: one state, summed over all rows."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.merge(q.softmax(-1) @ (k.exp().transpose(-2, -1) @ v) / SIZE)


class PrefixOfTokens(Model):
    """A prefix that is told by the tokens themselves, as pictures in a text are: its rows see each other."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        i, j = grid(x)
        picture = ids > 9
        seen = (j <= i) | (picture[:, :, None] & picture[:, None, :])
        return self.head(x + self.attend(x, seen[:, None]))


class PackedByPositionAlone(Model):
    """Texts side by side, causal by positions that are data: nothing says that a later row has a later position."""

    def forward(self, ids: Tensor) -> Tensor:
        x, position = self.embed(ids), ids % 7
        text = (position == 0).cumsum(-1)
        seen = (text[:, :, None] == text[:, None, :]) & (position[:, None, :] <= position[:, :, None])
        return self.head(x + self.attend(x, seen[:, None]))
