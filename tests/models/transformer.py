"""A causal Transformer as its author would write it: no cache, no thought of one."""

import torch
from torch import Tensor, nn

from tests.models import masks
from tests.models.config import LAST_K, MAX_ROWS, Config
from tests.models.layers import Block, make_norm
from tests.models.positions import sinusoid_table, sinusoids

Answer = Tensor | tuple[Tensor, Tensor] | dict[str, Tensor]


class Transformer(nn.Module):
    """`forward(ids)`, and what else `config.inputs` and `config.mask_from` ask of the caller."""

    mask: Tensor
    table: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.size)
        if config.position in ("learned", "learned_slice"):
            self.learned = nn.Embedding(MAX_ROWS, config.size)
        if config.position == "sinusoid_buffer":
            self.register_buffer("table", sinusoid_table(config.size), persistent=False)
        if config.mask_from == "buffer":
            self.register_buffer("mask", masks.table(config, MAX_ROWS), persistent=False)
        if config.mask_from == "buffer_float":
            self.register_buffer("mask", masks.table(config, MAX_ROWS).float()[None, None], persistent=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config, config.size)
        self.head = nn.Linear(config.size, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(
        self,
        ids: Tensor,
        position: Tensor | None = None,
        attention_mask: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Answer:
        x = ids if self.config.inputs == "embeds" else self.embed(ids)
        if position is None:
            position = torch.arange(x.shape[1], device=x.device)
        x = self.add_positions(x, position)
        full, narrow = self.make_masks(x, attention_mask, allowed)
        for index, block in enumerate(self.blocks):
            x = block(x, full if self.config.alternate and index % 2 else narrow, position)
        return self.answer(self.norm(x))

    def add_positions(self, x: Tensor, position: Tensor) -> Tensor:
        match self.config.position:
            case "learned":
                return x + self.learned(position)
            case "learned_slice":
                return x + self.learned.weight[: x.shape[1]]
            case "sinusoid_buffer":
                return x + self.table[: x.shape[1], :].to(x.dtype)
            case "sinusoid_computed":
                return x + sinusoids(position, x.shape[-1]).to(x.dtype)
            case _:
                return x

    def make_masks(self, x: Tensor, padding: Tensor | None, passed_in: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = x.shape[1]
        if passed_in is not None:
            narrow = passed_in
        elif self.config.mask_from == "buffer":
            narrow = self.mask[:rows, :rows]
        elif self.config.mask_from == "buffer_float":
            narrow = self.mask[0, 0, :rows, :rows] != 0
        else:
            narrow = masks.in_graph(self.config, rows, x.device)
        full = torch.ones_like(narrow).tril() if self.config.alternate else narrow
        if padding is not None:
            keys = padding[:, None, None, :].bool()
            full, narrow = full & keys, narrow & keys
        return full, narrow

    def answer(self, x: Tensor) -> Answer:
        match self.config.output:
            case "last":
                return self.head(x[:, -1])
            case "last_k":
                return self.head(x[:, -LAST_K:, :])
            case "tuple":
                return self.head(x), x
            case "dict":
                return {"logits": self.head(x), "hidden": x}
            case _:
                return self.head(x)


def build(config: Config) -> Transformer:
    """The model of `config`, with weights large enough that every key matters, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Transformer(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".q." in name or ".k." in name or "qkv" in name:
                    parameter.mul_(2.0)
    return model.to(config.torch_dtype).eval()
