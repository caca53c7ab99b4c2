"""What the adversarial models share: an embedding, one place to do something with the rows, and a head."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB, SIZE, MAX_ROWS = 19, 8, 64

Breaks = Literal["future", "length", "batch", "chance", "nothing"]


class Model(nn.Module):
    """`head(x + mix(x))`. The docstring of a subclass says why it is not (or, for a near miss, why it is) causal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.qkv = nn.Linear(SIZE, 3 * SIZE)
        self.head = nn.Linear(SIZE, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.mix(x))

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of two heads, `[B, 2, S, SIZE / 2]` each."""
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 6, SIZE // 2).transpose(1, 2).chunk(3, dim=1)
        return q, k, v

    def merge(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(2)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `[B, 2, S, S]` without a mask, and the values."""
        q, k, v = self.project(x)
        return q @ k.transpose(-2, -1) / 2.0, v

    def attend(self, x: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.merge(functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed))


def grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Query index `[S, 1]` and key index `[1, S]`."""
    index = torch.arange(x.shape[1], device=x.device)
    return index[:, None], index[None, :]


@dataclass(frozen=True)
class Case:
    """One adversarial model and what is expected of it.

    Args:
        breaks: what shows that the model is not a causal function of each text by itself; "nothing" where it is one.
        codes: of the refusal; several where more than one reason is a fair answer.
    """

    model: type[Model]
    breaks: Breaks
    codes: frozenset[str] = field(default_factory=frozenset)

    @property
    def name(self) -> str:
        return self.model.__name__

    def build(self) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = self.model()
            with torch.no_grad():
                model.qkv.weight.mul_(3.0)
        return model.eval()
