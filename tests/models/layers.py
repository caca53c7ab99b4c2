"""The parts of a Transformer block, each in the variants that `Config` names."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models.attention import SCORED
from tests.models.config import Config
from tests.models.positions import alibi, frequencies, rotary_half, rotary_interleaved
from tests.spellings import SPELLINGS


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-5)).to(x.dtype)


def make_norm(config: Config, size: int) -> nn.Module:
    match config.norm:
        case "layernorm":
            return nn.LayerNorm(size, bias=config.bias)
        case "rmsnorm":
            return nn.RMSNorm(size, eps=1e-5)
        case "rms_by_hand":
            return RMSNorm(size)


class Mlp(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.kind = config.mlp
        self.merged = config.merged_rows
        hidden = 2 * config.size + 1
        self.up = nn.Linear(config.size, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, config.size, bias=config.bias)
        if self.kind == "swiglu":
            self.gate = nn.Linear(config.size, hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.body(x.reshape(-1, x.shape[-1])).view(x.shape)
        return self.body(x)

    def body(self, x: Tensor) -> Tensor:
        match self.kind:
            case "swiglu":
                return self.down(functional.silu(self.gate(x)) * self.up(x))
            case "relu":
                return self.down(self.up(x).relu())
            case "squared_relu":
                return self.down(torch.square(functional.relu(self.up(x))))
            case "gelu_tanh":
                return self.down(functional.gelu(self.up(x), approximate="tanh"))
            case _:
                return self.down(functional.gelu(self.up(x)))


class Attention(nn.Module):
    slopes: Tensor
    inverse: Tensor

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config = config
        self.spelling = config.spellings[layer]
        self.kv_size = config.kv_heads * config.head_size
        if config.fused_qkv:
            self.qkv = nn.Linear(config.size, config.size + 2 * self.kv_size, bias=config.bias)
        else:
            self.q = nn.Linear(config.size, config.size, bias=config.bias)
            self.k = nn.Linear(config.size, self.kv_size, bias=config.bias)
            self.v = nn.Linear(config.size, self.kv_size, bias=config.bias)
        self.out = nn.Linear(config.size, config.size, bias=config.bias)
        if config.qk_norm:
            self.q_norm = make_norm(config, config.head_size)
            self.k_norm = make_norm(config, config.head_size)
        self.register_buffer("slopes", 0.5 ** torch.arange(1.0, config.heads + 1), persistent=False)
        self.register_buffer("inverse", frequencies(config.head_size), persistent=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.config.fused_qkv:
            q, k, v = self.qkv(x).split([self.config.size, self.kv_size, self.kv_size], dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        b, s, _ = x.shape
        d = self.config.head_size
        return (
            q.view(b, s, -1, d).transpose(1, 2),
            k.view(b, s, -1, d).transpose(1, 2),
            v.view(b, s, -1, d).transpose(1, 2),
        )

    def forward(self, x: Tensor, allowed: Tensor, position: Tensor) -> Tensor:
        config = self.config
        q, k, v = self.project(x)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.position == "rotary_half":
            q, k = rotary_half(q, position, self.inverse), rotary_half(k, position, self.inverse)
        elif config.position == "rotary_interleaved":
            q, k = rotary_interleaved(q, position, self.inverse), rotary_interleaved(k, position, self.inverse)
        scale = config.head_size**-0.5
        if config.scored:
            bias = alibi(self.slopes, x.shape[1]) if config.position == "alibi" else None
            y = SCORED[self.spelling](q, k, v, allowed, scale, bias, config.soft_cap)
        else:
            y = SPELLINGS[self.spelling](q, k, v, allowed, scale)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config = config
        self.attention = Attention(config, layer)
        self.norm1 = make_norm(config, config.size)
        if config.mlp != "none":
            self.mlp = Mlp(config)
            self.norm2 = make_norm(config, config.size)

    def forward(self, x: Tensor, allowed: Tensor, position: Tensor) -> Tensor:
        if self.config.mlp == "none":
            return x + self.attention(self.norm1(x), allowed, position)
        if self.config.parallel:
            y = self.norm1(x)
            return x + self.attention(y, allowed, position) + self.mlp(y)
        if self.config.prenorm:
            x = x + self.attention(self.norm1(x), allowed, position)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, allowed, position))
        return self.norm2(x + self.mlp(x))
