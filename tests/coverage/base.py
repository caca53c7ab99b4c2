"""What the models of the coverage table share: an embedding, layers that mix the rows, and a head."""

from typing import Any

import torch
from torch import Tensor, nn

VOCAB, SIZE, HEADS, DEPTH, MAX_ROWS = 23, 16, 2, 8, 64
NEG_INF = float("-inf")


class Decoder(nn.Module):
    """`head(x + mix(x) + ..)`. A subclass says in its docstring what it covers, and overrides one place."""

    layers = 1
    kernels: int | None = None  # softmax attentions that must run on a generated kernel; None: one for each layer
    tail = 1  # rows that are computed again where the text is known
    batches = False  # also asked for a batch of another size, which is another compilation
    shrunk: int | None = None  # rows that are computed where the text becomes shorter; None: the tail
    bytes_per_row: int | None = None
    refused = ""  # the code; such a model runs as it was written

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.qkv = nn.ModuleList(nn.Linear(SIZE, 3 * SIZE) for _ in range(self.layers))
        self.out = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(self.layers))
        self.head = nn.Linear(SIZE, VOCAB)

    def forward(self, ids: Tensor, *more: Any) -> Any:
        x = self.enter(ids, *more)
        for layer in range(self.layers):
            x = x + self.mix(x, layer, *more)
        return self.leave(x, ids, *more)

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        return self.embed(ids)

    def leave(self, x: Tensor, ids: Tensor, *more: Any) -> Any:
        return self.head(x)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        scores = (q @ k.mT * DEPTH**-0.5).masked_fill(~self.seen(x, layer, *more), NEG_INF)
        return self.merge(scores.softmax(-1) @ v, layer)

    def seen(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        """True where row `i` sees row `j`, `[.., S, S]`."""
        i, j = grid(x)
        return j <= i

    def project(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `[B, HEADS, S, DEPTH]`."""
        b, s, _ = x.shape
        q, k, v = self.qkv[layer](x).view(b, s, 3, HEADS, DEPTH).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, y: Tensor, layer: int) -> Tensor:
        return self.out[layer](y.transpose(1, 2).flatten(2))

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        """What the caller passes besides the tokens; a function of them, so that a longer text has longer ones."""
        return ()

    def meaningful(self, ids: Tensor) -> Tensor | None:
        """Bool `[B, S]`, where the answer means something; None: everywhere."""
        return None


def grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Query index `[S, 1]` and key index `[1, S]`."""
    index = torch.arange(x.shape[1], device=x.device)
    return index[:, None], index[None, :]


def build(model: type[Decoder]) -> Decoder:
    """The model with weights so large that every key matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = model()
        with torch.no_grad():
            for layer in made.qkv:
                layer.weight.mul_(2.5)
    return made.eval()
