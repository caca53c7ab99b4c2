"""Recurrences that no rule covers: causal, but the state of a row is nowhere a table of rows that could be kept."""

import torch
from torch import Tensor, nn

from tests.adversarial.base import SIZE, Model


class Gates(Model):
    """Two gates of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(SIZE, 2 * SIZE)

    def keep_and_take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep, take = self.gates(x).sigmoid().chunk(2, -1)
        return keep, take


class SelectiveScan(Gates):
    """Mamba: a state for each feature, row by row."""

    def mix(self, x: Tensor) -> Tensor:
        keep, take = self.keep_and_take(x)
        state, rows = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = keep[:, t] * state + take[:, t] * x[:, t]
            rows.append(state)
        return torch.stack(rows, 1)


class WeightedKeyValue(Gates):
    """RWKV: a numerator and a denominator that decay."""

    def mix(self, x: Tensor) -> Tensor:
        key, value = self.keep_and_take(x)
        above = below = torch.zeros_like(x[:, 0])
        rows = []
        for k, v in zip(key.exp().unbind(1), value.unbind(1), strict=True):
            above, below = 0.9 * above + k * v, 0.9 * below + k
            rows.append(above / below)
        return torch.stack(rows, 1)


class GatedDelta(Gates):
    """A matrix that is corrected towards each value by what it answers to the key."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        gate = self.keep_and_take(x)[0].mean(-1)
        state, rows = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
        for t in range(x.shape[1]):
            state = state * gate[:, t, None, None, None]
            error = v[:, :, t] - (k[:, :, t, None] @ state).squeeze(-2)
            state = state + k[:, :, t, :, None] * error[:, :, None] / 4
            rows.append((q[:, :, t, None] @ state).squeeze(-2))
        return self.merge(torch.stack(rows, 2))


class ChunkedState(Gates):
    """The state is handed from chunk to chunk of four rows."""

    def mix(self, x: Tensor) -> Tensor:
        state, chunks = torch.zeros_like(x[:, :1]), []
        for start in range(0, x.shape[1], 4):
            chunk = x[:, start : start + 4].cumsum(1) + state
            state = chunk[:, -1:] / 2
            chunks.append(chunk)
        return torch.cat(chunks, 1)


class Recurrent(Gates):
    """An LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(SIZE, SIZE, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        answer: Tensor = self.lstm(x)[0]
        return answer
