"""Who may see whom, in closed form and in the ways that people write it down."""

import torch
from torch import Tensor

from tests.models.config import Config


def closed_form(config: Config, i: Tensor, j: Tensor) -> Tensor:
    """The mask as the mathematics has it: query `i`, key `j`, any shapes that broadcast."""
    seen = j <= i
    if config.mask == "sliding":
        seen = seen & (j > i - config.width)
    elif config.mask == "chunked":
        seen = seen & (j // config.width == i // config.width)
    return seen


def table(config: Config, rows: int) -> Tensor:
    """`[rows, rows]`, what a registered buffer holds and what a caller passes in."""
    index = torch.arange(rows)
    return closed_form(config, index[:, None], index[None, :])


def in_graph(config: Config, rows: int, device: torch.device) -> Tensor:
    """The mask computed by the model itself, from `arange`, `tril`, `triu` or `cumsum`."""
    if config.mask_from == "tril":
        return _from_tril(config, rows, device)
    if config.mask_from == "triu":
        return _from_triu(config, rows, device)
    if config.mask_from == "cumsum":
        index = torch.ones(rows, dtype=torch.long, device=device).cumsum(0) - 1
    else:
        index = torch.arange(rows, device=device)
    return closed_form(config, index.unsqueeze(-1), index.unsqueeze(0))


def _from_tril(config: Config, rows: int, device: torch.device) -> Tensor:
    seen = torch.tril(torch.ones(rows, rows, dtype=torch.bool, device=device))
    if config.mask == "sliding":
        seen = seen & ~torch.tril(torch.ones_like(seen), diagonal=-config.width)
    elif config.mask == "chunked":
        chunk = torch.arange(rows, device=device) // config.width
        seen = seen & torch.eq(chunk[:, None], chunk)
    return seen


def _from_triu(config: Config, rows: int, device: torch.device) -> Tensor:
    hidden = torch.ones(rows, rows, device=device).triu(diagonal=1)
    if config.mask == "sliding":
        hidden = hidden + 1 - torch.ones(rows, rows, device=device).triu(diagonal=1 - config.width)
    elif config.mask == "chunked":
        chunk = torch.arange(rows, device=device).div(config.width, rounding_mode="floor")
        hidden = hidden + (chunk.view(-1, 1) != chunk.view(1, -1)).float()
    return hidden == 0
