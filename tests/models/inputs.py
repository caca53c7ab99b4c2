"""The arguments of one call: what `Config.inputs` and `Config.mask_from` ask for besides the tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tests.models import masks
from tests.models.config import Config

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """Arguments of a model, and which rows of its answer mean something (`None`: all of them)."""

    args: tuple[Tensor | None, ...]
    rows: Tensor | None = None


@cache
def _embeddings(vocab: int, size: int) -> Tensor:
    return torch.randn(vocab, size, generator=torch.Generator().manual_seed(vocab * size))


def make_call(config: Config, batch: Sequence[Tokens], pads: Sequence[int] | None = None) -> Call:
    """`batch`: texts of one length. `pads`: how many of the first tokens of each text are padding."""
    ids = torch.tensor(batch)
    rows = ids.shape[1]
    x = ids if config.inputs != "embeds" else _embeddings(config.vocab, config.size).to(config.torch_dtype)[ids]
    position = attention = allowed = meaningful = None
    if config.inputs == "positions":
        position = torch.arange(rows).expand(len(batch), rows).contiguous()
    if config.inputs == "padding":
        start = torch.tensor(pads or [0] * len(batch))
        attention = (torch.arange(rows) >= start[:, None]).long()
        meaningful = attention.bool()
    if config.mask_from == "argument":
        allowed = masks.table(config, rows)
    args: tuple[Tensor | None, ...] = (x, position, attention, allowed)
    while args[-1] is None:
        args = args[:-1]
    return Call(args, meaningful)
