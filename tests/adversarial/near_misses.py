"""Models that look like the adversarial ones and are causal: each has to be proven."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.adversarial.base import MAX_ROWS, SIZE, Model, grid


class MeanOverHeads(Model):
    """A mean, but over heads."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        y = self.attend(x, j <= i).unflatten(-1, (2, SIZE // 2))
        return (y - y.mean(dim=2, keepdim=True)).flatten(2)


class MaxOverFeatures(Model):
    """A maximum, but over features."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x / x.abs().amax(dim=-1, keepdim=True), j <= i)


class SortOverFeatures(Model):
    """A sort, but within one row."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x.sort(dim=-1).values, j <= i)


class RollAndFlipOverFeatures(Model):
    """`roll` and `flip`, but within one row."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x.roll(1, -1).flip(-1), j <= i)


class SoftmaxOverFeatures(Model):
    """A gate that sums to one over the features of one row."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x * x.softmax(-1), j <= i)


class StrictMaskWithSink(Model):
    """`j < i`, so that row 0 sees no key, but every row sees a sink: a learned score beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.tensor([0.3, -0.2]))

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        scores, v = self.scores(x)
        scores = scores.masked_fill(j >= i, float("-inf"))
        sink = self.sink.view(1, 2, 1, 1).expand(x.shape[0], 2, x.shape[1], 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(-1)
        return self.merge(weights[..., :-1] @ v)


class StrictlyLess(Model):
    """`j < i + 1` is `j <= i`."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, j < i + 1)


class NotGreater(Model):
    """`not (j > i)`, and a clause that no key fulfils."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, ~(j > i) | (j < 0))


class TwoSidedWindowCutOff(Model):
    """`|i - j| <= 2`, and causal."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, ((i - j).abs() <= 2) & (j <= i))


class GlobalRowsAndWindow(Model):
    """A window, and the first two rows for everybody (who comes after them)."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, (j <= i) & ((j > i - 3) | (j < 2)))


class LogOfPosition(Model):
    """Scaled by the logarithm of a row's own position, not of the length."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, j <= i) * torch.log1p(i.float())


class PositionOverMaximum(Model):
    """Positions between 0 and 1, by a constant."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x + i / MAX_ROWS, j <= i)


class CausalConvolution(Model):
    """A convolution of width three, padded on the left only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(SIZE, SIZE, 3, groups=SIZE)

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        y = self.conv(functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        return self.attend(y, j <= i)


class ConvolutionCutOff(Model):
    """Padded on both sides, and what looks ahead is cut off, as state-space models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(SIZE, SIZE, 4, groups=SIZE, padding=3, bias=False)

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(functional.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2), j <= i)


class DilatedConvolution(Model):
    """All channels with all, every other row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(SIZE, SIZE, 3, dilation=2)

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        y = self.conv(functional.pad(x.transpose(1, 2), (4, 0))).transpose(1, 2)
        return self.attend(y, j <= i)


class WindowsUnfolded(Model):
    """Each row beside the two before it, weighted and summed."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        y = functional.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).flip(-1) * torch.tensor([0.5, 0.3, 0.2])
        return self.attend(y.sum(-1), j <= i)


class PreviousRow(Model):
    """Every row gets the one before it (RWKV's token shift)."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x + functional.pad(x, (0, 0, 1, -1)), j <= i)


class FirstRowForAll(Model):
    """Every row gets the first one, which comes before all of them."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x, j <= i) + x[:, :1]


class RunningMean(Model):
    """A mean over what came so far."""

    def mix(self, x: Tensor) -> Tensor:
        i, _ = grid(x)
        return x.cumsum(dim=1) / (i + 1)


class ScanByRunningSums(Model):
    """A selective scan without a loop: running products of the gates, and a running sum of what is divided by them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(SIZE, SIZE)

    def mix(self, x: Tensor) -> Tensor:
        kept = (self.gate(x).sigmoid() / 4 + 0.75).cumprod(1)
        return kept * (x / kept).cumsum(1) + x.cummax(1).values + x.logcumsumexp(1)


class KnownStatistics(Model):
    """Batch normalisation with statistics that are known, and a normalisation over groups of features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.groups = nn.BatchNorm1d(SIZE), nn.GroupNorm(2, SIZE)
        self.norm.running_mean += 0.3  # type: ignore[operator]

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        x = self.groups(x.reshape(-1, SIZE)).view_as(x)
        return self.attend(self.norm(x.transpose(1, 2)).transpose(1, 2), j <= i)


class DistanceToTheLastRow(Model):
    """ALiBi by the distance to the last row, from a table that is cut at its end: a softmax forgets the length."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]).view(2, 1, 1))

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        q, k, v = self.project(x)
        table = torch.arange(1 - MAX_ROWS, 1) * self.slopes
        bias = table[:, :, MAX_ROWS - x.shape[1] :].masked_fill(j > i, float("-inf"))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias + 0.5)
        scores = q @ k.mT / 2.0 + table[:, :, -x.shape[1] :]
        return self.merge(y + scores.masked_fill(j > i, torch.finfo(x.dtype).min).softmax(-1) @ v)


class SwitchAtLength(Model):
    """Another scale from twelve rows on: two functions, each causal, whose rows must not be mixed up."""

    def mix(self, x: Tensor) -> Tensor:
        i, j = grid(x)
        return self.attend(x * 3.0 if x.shape[1] > 12 else x, j <= i)


NEAR_MISSES: tuple[type[Model], ...] = (
    MeanOverHeads,
    MaxOverFeatures,
    SortOverFeatures,
    RollAndFlipOverFeatures,
    SoftmaxOverFeatures,
    StrictMaskWithSink,
    StrictlyLess,
    NotGreater,
    TwoSidedWindowCutOff,
    GlobalRowsAndWindow,
    LogOfPosition,
    PositionOverMaximum,
    CausalConvolution,
    ConvolutionCutOff,
    DilatedConvolution,
    WindowsUnfolded,
    PreviousRow,
    FirstRowForAll,
    RunningMean,
    ScanByRunningSums,
    KnownStatistics,
    DistanceToTheLastRow,
    SwitchAtLength,
)
