"""What the caller gets."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.coverage.base import SIZE, VOCAB, Decoder
from tests.coverage.masks import PaddedLeftFinite


class LastRow(Decoder):
    """One row of logits."""

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        return self.head(x[:, -1])


class LastThree(Decoder):
    """The last rows, as `num_logits_to_keep` has it."""

    tail = 3

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        return self.head(x[:, slice(-3, None), :])


class EveryLayer(Decoder):
    """Hidden states of every layer, in a tuple, and logits of the last row."""

    layers = 3

    def forward(self, ids: Tensor, *more: Any) -> Any:
        states = [self.embed(ids)]
        for layer in range(self.layers):
            states.append(states[-1] + self.mix(states[-1], layer))
        return self.head(states[-1][:, -1:]), tuple(states)


class Several(Decoder):
    """A dictionary of a list, a number, nothing, and one value twice."""

    batches = True

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        logits = self.head(x)
        return {"logits": logits, "again": [logits, x[:, -1]], "size": SIZE, "nothing": None, "best": logits.argmax(-1)}


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None
    loss: Tensor | None = None


class Dataclass(Decoder):
    """An object of the model's own."""

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        return Answer(self.head(x[:, -2:]), x)

    tail = 2


class Reward(Decoder):
    """One number for each text: of the last row that is not padding."""

    batches = True

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        last = more[0].sum(-1) - 1
        return self.head(x)[torch.arange(x.shape[0]), last, 0]

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return ((torch.arange(ids.shape[1]) < 8 + torch.arange(ids.shape[0])[:, None]).long(),)


class Classifier(Decoder):
    """Classes of the last token that is not the padding token, as transformers finds it."""

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        real = (ids != 3).to(torch.int32)
        last = (torch.arange(ids.shape[-1], dtype=torch.int32) * real).argmax(-1)
        return self.head(x)[torch.arange(x.shape[0]), last]


class Gathered(Reward):
    """The hidden state is gathered before the head."""

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        last = more[0].sum(-1) - 1
        row = x.gather(1, last[:, None, None].expand(-1, 1, SIZE)).squeeze(1)
        return self.head(row)


class RewardOfPaddedLeft(PaddedLeftFinite):
    """The last row that is not padding, where padding leaves rows without a key: those are never read."""

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        last = (torch.arange(x.shape[1]) * more[0]).argmax(-1)
        row = x.gather(1, last[:, None, None].expand(-1, 1, SIZE)).squeeze(1)
        return self.head(row), self.head(x)[torch.arange(x.shape[0]), last]

    def meaningful(self, ids: Tensor) -> Tensor | None:
        return None


class MeanAtTheEnd(Decoder):
    """An embedding of the text: a mean over its rows, after the last layer."""

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        return x.mean(1)


class MaskedMean(Reward):
    """A mean over the rows that are not padding."""

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        weights = more[0].unsqueeze(-1).to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


class LogProbabilities(Decoder):
    """The log-probability of each token that came."""

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        logits = self.head(x)[:, :-1].log_softmax(-1)
        return logits.gather(-1, ids[:, 1:, None]).squeeze(-1)


class Loss(Decoder):
    """`labels=`: a loss over the shifted rows, beside the logits."""

    refused = "KV201"

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        logits = self.head(x)
        shifted = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), more[0][:, 1:].reshape(-1))
        return Answer(logits, None, shifted)

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return (ids.clone().masked_fill(ids == 3, -100),)


OUTPUTS = (
    LastRow,
    LastThree,
    EveryLayer,
    Several,
    Dataclass,
    Reward,
    Classifier,
    Gathered,
    RewardOfPaddedLeft,
    MeanAtTheEnd,
    MaskedMean,
    LogProbabilities,
    Loss,
)
