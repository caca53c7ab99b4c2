"""Something besides attention carries a later row to an earlier one."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.adversarial.base import SIZE, Model


class MeanOverTime(Model):
    """Every row gets the mean of all rows."""

    def mix(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=1, keepdim=True)


class MaxOverTime(Model):
    """Every row gets the largest value of each feature."""

    def mix(self, x: Tensor) -> Tensor:
        return x.amax(dim=1, keepdim=True).expand_as(x)


class NormOverTime(Model):
    """Features are normalised along the text."""

    def mix(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True)


class LayerNormOverText(Model):
    """One mean and one variance for the whole text."""

    def mix(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=(1, 2), keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5)


class InstanceNorm(Model):
    """Each feature is normalised over the text."""

    def mix(self, x: Tensor) -> Tensor:
        return functional.instance_norm(x.transpose(1, 2)).transpose(1, 2)


class SoftmaxOverTime(Model):
    """A gate whose weights sum to one over the text."""

    def mix(self, x: Tensor) -> Tensor:
        return x * x.softmax(dim=1)


class StreamsAhead(Model):
    """Two streams on one axis; the second one sees a row too many of the first."""

    seen = 1

    def mix(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        q, k, v = (part.chunk(2, 2) for part in self.project(torch.cat([x, x * 0.5], 1)))
        i = torch.arange(size)
        allowed = torch.cat([i[None] <= i[:, None] + self.seen, i[None] == i[:, None]], 1)
        keys, values = torch.cat(k, 2), torch.cat(v, 2)
        return self.merge(functional.scaled_dot_product_attention(q[1], keys, values, attn_mask=allowed))


class StreamsMixedUp(Model):
    """Two streams on one axis, taken apart as if they took turns."""

    def mix(self, x: Tensor) -> Tensor:
        both = torch.cat([x, x * 0.5], 1)
        return both.view(x.shape[0], x.shape[1], 2, SIZE)[:, :, 0]


class StreamsCutElsewhere(Model):
    """Two streams on one axis, of which a piece of one and a piece of the other are taken."""

    def mix(self, x: Tensor) -> Tensor:
        return torch.cat([x, x * 0.5], 1)[:, 1 : 1 + x.shape[1]]


class NextRow(Model):
    """Every row gets the one after it."""

    def mix(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, 1:], (0, 0, 0, 1))


class NextRowWritten(Model):
    """The row after it, written into zeros."""

    def mix(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :-1] = x[:, 1:]
        return out


class WindowsAhead(Model):
    """Windows over the rows that begin a row too late: the last one of each is the next row."""

    def mix(self, x: Tensor) -> Tensor:
        return functional.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).mean(-1)


class Roll(Model):
    """`roll` by one to the right: the first row gets the last one."""

    def mix(self, x: Tensor) -> Tensor:
        return torch.roll(x, shifts=1, dims=1)


class Flip(Model):
    """The text read backwards."""

    def mix(self, x: Tensor) -> Tensor:
        return x.flip(1)


class CumsumFromTheRight(Model):
    """`flip`, `cumsum`, `flip`: a sum over what comes after."""

    def mix(self, x: Tensor) -> Tensor:
        return x.flip(1).cumsum(1).flip(1) / 8


class RemainderOfSum(Model):
    """The total without what came before: the same sum, without a flip."""

    def mix(self, x: Tensor) -> Tensor:
        return (x.sum(1, keepdim=True) - x.cumsum(1)) / 8


class SortOverTime(Model):
    """Features sorted along the text."""

    def mix(self, x: Tensor) -> Tensor:
        return x.sort(dim=1).values


class TopKOverTime(Model):
    """The two largest of each feature, wherever they stand."""

    def mix(self, x: Tensor) -> Tensor:
        return x.topk(2, dim=1).values.sum(1, keepdim=True).expand_as(x)


class ArgmaxOverTime(Model):
    """The row with the largest first feature, fetched by `gather`."""

    def mix(self, x: Tensor) -> Tensor:
        index = x[..., :1].argmax(dim=1, keepdim=True).expand(-1, 1, SIZE)
        return x.gather(1, index).expand_as(x)


class ArgsortOverTime(Model):
    """Rows in the order of their first feature."""

    def mix(self, x: Tensor) -> Tensor:
        order = x[..., 0].argsort(dim=1)
        return x.gather(1, order[..., None].expand_as(x))


class FourierOverTime(Model):
    """FNet: a Fourier transform along the text."""

    def mix(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=1).real / 4


class SymmetricConvolution(Model):
    """A convolution of width three, padded on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(SIZE, SIZE, 3, padding=1)

    def mix(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class ConvolutionMaskedOneTapShort(Model):
    """A mask takes away all taps that look ahead but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(SIZE, SIZE, 5, padding=2)
        self.register_buffer("taps", (torch.arange(5) < 4).float())

    def mix(self, x: Tensor) -> Tensor:
        weight = self.conv.weight * self.taps
        return nn.functional.conv1d(x.transpose(1, 2), weight, self.conv.bias, padding=2).transpose(1, 2)


class LastRowForAll(Model):
    """Every row gets the last one."""

    def mix(self, x: Tensor) -> Tensor:
        return x[:, -1:].expand_as(x)


class HistogramOfTokens(Model):
    """Every row sees how often each token occurs in the whole text."""

    def forward(self, ids: Tensor) -> Tensor:
        counts = functional.one_hot(ids, 19).sum(1, keepdim=True)
        return self.head(self.embed(ids) + counts.float() @ self.head.weight)


class BackwardRecurrence(Model):
    """A bidirectional GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(SIZE, SIZE // 2, bidirectional=True, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        answer: Tensor = self.gru(x)[0]
        return answer


class RealFourierOverTime(Model):
    """A spectral gate: a real Fourier transform along the text, and back."""

    def mix(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
        return torch.fft.irfft(spectrum * 0.5j, n=x.shape[1], dim=1, norm="ortho")


class FourierOverBoth(Model):
    """FNet as it was published: over the features and over the text."""

    def mix(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x).real / 8


class PoolOverTime(Model):
    """A moving average that looks both ways."""

    def mix(self, x: Tensor) -> Tensor:
        return functional.avg_pool1d(x.transpose(1, 2), 3, stride=1, padding=1).transpose(1, 2)


class TokenMixing(Model):
    """A product over the rows with a matrix of all pairs: every row gets a part of every other one."""

    def mix(self, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        return torch.cos((i[:, None] - i).float()) @ x / 8
