"""Weights that wrap plain tensors, as quantised ones do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kvpass
from kvpass.frontend.api import recording
from tests.property.oracle import check_same

sys.path.append(str(Path(sys.prefix) / "torchao"))  # `make test` puts it there
try:
    import torchao.quantization as ao
finally:
    sys.path.pop()

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
aten = torch.ops.aten
VOCAB, SIZE = 29, 64


class Bytes(Tensor):
    """A matrix as whole numbers, a factor for each output, and a number that is no tensor."""

    def __new__(cls, data: Tensor, scale: Tensor, factor: float) -> Bytes:
        made = Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)  # type: ignore
        made.data_, made.scale_, made.factor = data, scale, factor
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data_", "scale_"], {"factor": self.factor}

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Bytes:
        return cls(parts["data_"], parts["scale_"], **context)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            y = x @ weight.data_.t().to(x.dtype) * weight.scale_ * weight.factor
            return y if not bias or bias[0] is None else y + bias[0]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is aten.detach.default:
            return cls(args[0].data_, args[0].scale_, args[0].factor)
        raise NotImplementedError(f"{function}")

    @staticmethod
    def of(weight: Tensor, factor: float = 1) -> Bytes:
        scale = weight.detach().abs().amax(1) / 127
        return Bytes((weight.detach() / scale[:, None]).round().to(torch.int8), scale / factor, factor)


class Holding(Bytes):
    """One wrapper in another."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.data_, *bias)
        return super().__torch_function__(function, types, args, kwargs)

    @staticmethod
    def of(weight: Tensor, factor: float = 1) -> Bytes:
        inner = Bytes.of(weight, factor)
        return Holding(inner, inner.scale_, factor)


class Decoder(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.qkv = nn.ModuleList(nn.Linear(SIZE, 3 * SIZE) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False) for _ in range(layers))
        self.head = nn.Linear(SIZE, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in qkv(F.layer_norm(x, (SIZE,))).chunk(3, -1))
            x = x + out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(x)


def wrap(model: nn.Module, kind: type[Bytes]) -> None:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for k, layer in enumerate(layers):
        layer.weight = nn.Parameter(kind.of(layer.weight, 2.0**k), requires_grad=False)


WAYS: dict[str, Any] = {
    "own": lambda m: wrap(m, Bytes),
    "nested": lambda m: wrap(m, Holding),
    "int8": lambda m: ao.quantize_(m, ao.Int8WeightOnlyConfig()),
    "int8 groups": lambda m: ao.quantize_(m, ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32))),
    "float8": lambda m: ao.quantize_(m, ao.Float8WeightOnlyConfig()),
}
IDS = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))


def wrapped(way: str, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder().eval().to(dtype)
    WAYS[way](model)
    return model


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_is_proven_cached_and_exact(way: str) -> None:
    torch._dynamo.reset()
    model, cache = wrapped(way), kvpass.Cache("8MiB", page_size=4, poison=True)
    fast = kvpass.compile(model, cache=cache, tiers="compiled")
    branch = IDS.clone()
    branch[:, 4] = (branch[:, 4] + 1) % VOCAB
    with recording() as found:
        for ids in (IDS[:, :9], IDS[:, :10], IDS[:, :14], IDS[:, :6], branch[:, :12], IDS):
            check_same(fast, model, [ids])
    report = kvpass.Report.of(found)
    assert report.proven, str(report)
    assert cache.stats().rows_reused > 0


@torch.no_grad()
def test_bytes_are_multiplied_as_they_stand() -> None:
    """No matrix of floats is made, in a step of one row or of several."""
    torch._dynamo.reset()
    model = wrapped("int8")
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled")
    with recording() as found:
        for length in (9, 10, 13):
            fast(IDS[:, :length])
    steps = found[0].program.steps  # type: ignore[union-attr]
    assert steps is not None
    tapes = [tape for _, tape, _ in steps.describe()]
    assert len(tapes) >= 2
    for tape in tapes:
        assert tape is not None
        floats = [b.made for b in tape.buffers if b.made is not None]
        assert all(SIZE not in value.sizes or value.sizes[-2:] != (SIZE, SIZE) for value in floats)
        assert "int8_t" not in tape.source


@pytest.mark.parametrize("part", ["qdata", "scale"])
@torch.no_grad()
def test_a_change_of_a_part_is_noticed(part: str) -> None:
    torch._dynamo.reset()
    model = wrapped("int8")
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled")
    for length in (9, 10, 11):
        check_same(fast, model, [IDS[:, :length]])
    getattr(model.qkv[1].weight, part)[5:50] *= 2
    before = model(IDS[:, :12])
    check_same(fast, model, [IDS[:, :12]])
    assert not torch.equal(before, Decoder()(IDS[:, :12]))


@torch.no_grad()
def test_a_change_of_what_is_no_tensor_is_noticed() -> None:
    torch._dynamo.reset()
    model = wrapped("own")
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled")
    for factor in (None, 5.0, 3.0, 5.0):
        if factor is not None:
            model.qkv[1].weight.factor = factor
        for length in (9, 10, 11):
            check_same(fast, model, [IDS[:, :length]])


@torch.no_grad()
def test_an_argument_that_is_a_wrapper_is_not_taken_apart() -> None:
    """It is no weight: what it is must be known by its contents, of which its class alone knows how."""
    torch._dynamo.reset()

    class Taking(Decoder):
        def forward(self, ids: Tensor, weight: Tensor) -> Tensor:
            return F.linear(super().forward(ids), weight)

    model, weight = Taking().eval(), Bytes.of(torch.randn(7, VOCAB))
    with recording() as found:
        fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"))
        for length in (9, 10):
            assert torch.equal(fast(IDS[:, :length], weight), model(IDS[:, :length], weight))
    assert found[0].refusal is not None
