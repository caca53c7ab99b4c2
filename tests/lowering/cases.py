"""Attentions for testing kernels: a spec, inputs of a shape, and the answer in twice the precision."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvpass.ir import Attention, Layout
from kvpass.kernels import reference
from kvpass.kernels.text import parse

CAUSAL = "j <= i"
MASKS = {
    "causal": CAUSAL,
    "window": "(j <= i) & (j > i - 40)",
    "short_window": "(j <= i) & (j > i - 3)",
    "chunks": "(j <= i) & Eq(floor(j/48), floor(i/48))",
    "sinks_and_window": "(j < 4) & (j <= i) | (j <= i) & (j > i - 40)",
    "dilated": "(j <= i) & Eq(Mod(i - j, 3), 0)",
    "by_head": "(j <= i) & (j >= i - 9*h)",
    "padding": "(j <= i) & Ne(pad(b, j), 0)",
    "documents": "(j <= i) & Eq(pad(b, j), pad(b, i))",
    "strict": "j < i",
    "all": "True",
    "none": "False",
}
SCORES = {
    "plain": ("score", ""),
    "soft_cap": ("30.0*tanh(score/30)", ""),
    "alibi": ("score - 2**(-h - 1)*(i - j)", ""),
    "alibi_read": ("score + slope(b, h, i, j)*(j - i)", "h"),
    "bias": ("score + bias(b, h, i, j)", "hij"),
    "bias_by_batch": ("2*score + bias(b, h, i, j)", "bj"),
    "bias_by_row": ("score*bias(b, h, i, j)", "bhi"),
    "steps": ("score + Piecewise((1.5, i - j < 7), (-0.25*floor((i - j)/8), True))", ""),
    "gaussian": ("score + exp(-Abs(i - j)/5)", ""),
}


@dataclass(frozen=True)
class Shape:
    """``B``, new rows ``N``, cached rows ``P``."""

    batch: int = 2
    new: int = 1
    cached: int = 65
    page_size: int = 64
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        return self.new + self.cached


def attention(
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    value_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    mask: str = "causal",
    score: str = "plain",
    **more: Any,
) -> Attention:
    """A spec by the names of its mask and score."""
    expression, axes = SCORES[score]
    word = str(dtype).removeprefix("torch.")
    name = expression.split("(b,")[0].split()[-1].split("*")[-1] if axes else ""
    lines = [
        f"attention heads={heads} kv_heads={kv_heads} head_size={head_size} value_size={value_size or head_size} "
        f"dtype={word} scale={head_size**-0.5!r}",
        *([f"read {name}: {word if dtype.is_floating_point else 'float32'}[{', '.join(axes)}]"] if axes else []),
        *(["read pad: int64[]"] if "pad(" in MASKS[mask] else []),
        f"score = {expression}",
        f"support = {MASKS[mask]}",
    ]
    return replace(parse("\n".join(lines)), **more)


def scattered(x: Tensor, table: Tensor, pages: int, page_size: int) -> Tensor:
    """``[B, K, S, D]`` in the pages ``table`` ``[B, pages]`` of a pool ``[K, pages, page_size, D]`` of NaN."""
    batch, heads, rows, depth = x.shape
    pool = torch.full((heads, pages, page_size, depth), torch.nan, dtype=x.dtype)
    for b in range(batch):
        place = table[b].long()[:, None] * page_size + torch.arange(page_size)
        pool.flatten(1, 2)[:, place.flatten()[:rows]] = x[b]
    return pool


@dataclass
class Inputs:
    """Queries, keys and values in random pages whose unused rows are NaN, and what the spec reads."""

    spec: Attention
    shape: Shape
    seed: int = 0
    query: Tensor = field(init=False)
    key: Tensor = field(init=False)
    value: Tensor = field(init=False)
    reads: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        spec, shape = self.spec, self.shape
        generator = torch.Generator().manual_seed(self.seed)
        self.generator = generator

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(spec.dtype)

        rows, batch = shape.rows, shape.batch
        self.query = normal(batch, shape.new, spec.heads, spec.head_size).transpose(1, 2)
        self.key = normal(batch, spec.kv_heads, rows, spec.head_size)
        self.value = normal(batch, spec.kv_heads, rows, spec.value_size)
        sizes = {"b": batch, "h": spec.heads, "i": shape.new, "j": rows}
        self.reads = [
            normal(*(sizes[letter] for letter in read.axes)).to(read.dtype)
            if read.dtype.is_floating_point
            else torch.randint(0, 3, (batch, rows), generator=generator)
            for read in spec.reads
        ]

    def pages(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, K, S, D]`` as a pool ``[K, pages, page_size, D]`` and a block table ``[B, pages]`` int32."""
        batch, each = self.shape.batch, -(-self.shape.rows // self.shape.page_size)
        pages = batch * each + 3
        table = torch.randperm(pages, generator=self.generator)[: batch * each].view(batch, each)
        return scattered(x, table, pages, self.shape.page_size), table.int()

    def expected(self, dtype: torch.dtype) -> Tensor:
        """By the reference, in a precision of choice; reads as they are."""
        spec = replace(self.spec, dtype=dtype, softmax_dtype=None)
        axes = {"b": 0, "h": 1, "i": 2, "j": 3}
        names, loads, leaves, leaf_names = [], [], [], []
        for read, tensor in zip(spec.reads, self.reads, strict=True):
            if read.dtype.is_floating_point:
                size = [1, 1, 1, 1]
                for k, letter in enumerate(read.axes):
                    size[axes[letter]] = tensor.shape[k]
                loads.append(tensor.to(dtype).reshape(size))
                names.append(read.name)
            else:
                leaves.append(tensor)
                leaf_names.append(read.name)
        mask = reference.visible(
            spec.support,
            self.query.device,
            spec.heads,
            self.shape.cached,
            self.shape.rows,
            tuple(leaf_names),
            tuple(leaves),
        )
        query, key, value = self.query.to(dtype), self.key.to(dtype), self.value.to(dtype)
        return reference.attention(spec, query, key, value, mask, self.shape.cached, tuple(names), tuple(loads))


POOL = Layout(before=1, outside=True, factor=1)


def assert_as_good_as_plain(found: Tensor, inputs: Inputs) -> None:
    """The error is at most twice that of plain PyTorch in the same dtype, both against float64."""
    exact = inputs.expected(torch.float64)
    plain = inputs.expected(inputs.spec.dtype)
    assert torch.equal(found.isnan(), exact.isnan())
    nothing = torch.zeros((), dtype=torch.float64)
    error = torch.where(exact.isnan(), nothing, found.double() - exact).abs().max().item()
    allowed = torch.where(exact.isnan(), nothing, plain.double() - exact).abs().max().item()
    floor = 4 * torch.finfo(inputs.spec.dtype).eps
    assert error <= 2 * allowed + floor, f"{error:.2e} where plain PyTorch has {allowed:.2e}"
