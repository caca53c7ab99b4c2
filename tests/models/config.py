"""`Config`: one line that says which model a test built.

It is frozen and flat, so that hypothesis can draw and shrink it, and its `repr` names only what differs from the
defaults: paste it into `build(...)` to get the model that failed.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch

Position = Literal[
    "learned",
    "learned_slice",
    "sinusoid_buffer",
    "sinusoid_computed",
    "rotary_half",
    "rotary_interleaved",
    "alibi",
    "none",
]
Norm = Literal["layernorm", "rms_by_hand", "rmsnorm"]
Mlp = Literal["relu", "gelu", "gelu_tanh", "swiglu", "squared_relu", "none"]
Mask = Literal["causal", "sliding", "chunked"]
MaskFrom = Literal["buffer", "buffer_float", "arange", "tril", "triu", "cumsum", "argument"]
Output = Literal["all", "last", "last_k", "tuple", "dict"]
Inputs = Literal["ids", "positions", "padding", "embeds"]
Dtype = Literal["float32", "float64", "bfloat16"]

POSITIONS: tuple[Position, ...] = (
    "learned",
    "learned_slice",
    "sinusoid_buffer",
    "sinusoid_computed",
    "rotary_half",
    "rotary_interleaved",
    "alibi",
    "none",
)
NORMS: tuple[Norm, ...] = ("layernorm", "rms_by_hand", "rmsnorm")
MLPS: tuple[Mlp, ...] = ("relu", "gelu", "gelu_tanh", "swiglu", "squared_relu", "none")
MASKS: tuple[Mask, ...] = ("causal", "sliding", "chunked")
MASK_SOURCES: tuple[MaskFrom, ...] = ("buffer", "buffer_float", "arange", "tril", "triu", "cumsum", "argument")
OUTPUTS: tuple[Output, ...] = ("all", "last", "last_k", "tuple", "dict")
INPUTS: tuple[Inputs, ...] = ("ids", "positions", "padding", "embeds")

MAX_ROWS = 64
LAST_K = 3


@dataclass(frozen=True)
class Config:
    """What a random causal Transformer is made of.

    `spelling` is a key of `SPELLINGS` or `SCORED`, or several keys of `SPELLINGS` joined by `+`, one for each layer.
    """

    spelling: str = "sdpa_bool_mask"
    position: Position = "learned"
    mask: Mask = "causal"
    mask_from: MaskFrom = "arange"
    width: int = 4  # of the window or of the chunk, in rows
    alternate: bool = False  # every second layer is plainly causal
    layers: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_size: int = 8
    norm: Norm = "layernorm"
    prenorm: bool = True
    parallel: bool = False  # attention and MLP read the same normalised rows
    mlp: Mlp = "gelu"
    bias: bool = True
    fused_qkv: bool = False
    merged_rows: bool = False  # linear layers see [B * S, C]
    qk_norm: bool = False
    soft_cap: float | None = None
    tied: bool = False
    output: Output = "all"
    inputs: Inputs = "ids"
    dtype: Dtype = "float32"
    vocab: int = 23
    seed: int = 0

    @property
    def size(self) -> int:
        """The width of the residual stream."""
        return self.heads * self.head_size

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def spellings(self) -> list[str]:
        """The spelling of each layer."""
        names = self.spelling.split("+")
        return [names[layer % len(names)] for layer in range(self.layers)]

    @property
    def scored(self) -> bool:
        """The scores get a bias or a soft cap, so the spelling comes from `SCORED`."""
        return self.position == "alibi" or self.soft_cap is not None

    @property
    def provable(self) -> bool:
        """Nothing says what a mask holds that the caller passes in: such a model is right, but may run unrewritten."""
        return self.mask_from != "argument"

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Config({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"
