"""What a row is known by: everything that it can depend on, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvpass


class Model(nn.Module):
    """Ids and a mask over the sequence, a style that the batch shares, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.style, self.out = nn.Embedding(16, 8), nn.Linear(3, 8), nn.Linear(8, 16)

    def forward(self, ids: Tensor, mask: Tensor, style: Tensor, factor: int) -> Tensor:
        x = (self.embed(ids) + self.style(style)).unsqueeze(1) * factor
        keep = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
        return self.out(sdpa(x, x, x, attn_mask=keep)[:, 0, -1:])


def reused_after(change: Callable[[dict[str, Any]], None]) -> int:
    """Rows that a second call finds after its arguments were changed."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model().eval()
    cache = kvpass.Cache(capacity="8MiB", page_size=4)
    fast = torch.compile(model, backend="kvpass", dynamic=True, options={"cache": cache})
    args = {"ids": torch.randint(0, 16, (1, 12)), "mask": torch.ones(1, 12, dtype=torch.long)}
    args |= {"style": torch.randn(3), "factor": 2}
    with torch.no_grad():
        fast(**args)
        before = cache.stats().rows_reused
        change(args)
        torch.testing.assert_close(fast(**args), model(**args))
    return cache.stats().rows_reused - before


def put(name: str, place: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(args: dict[str, Any]) -> None:
        args[name] = args[name].clone()
        args[name][place] = value

    return change


def replace(name: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def change(args: dict[str, Any]) -> None:
        args[name] = value(args[name])

    return change


def test_the_same_call_finds_all_but_the_last_row() -> None:
    assert reused_after(lambda args: None) == 11


def test_memory_layout_is_no_part_of_a_key() -> None:
    assert reused_after(replace("ids", lambda x: torch.cat([x, x], dim=1)[:, :12])) == 11
    assert reused_after(replace("mask", lambda x: x.repeat(1, 2)[:, ::2])) == 11


def test_every_sequence_input_is_part_of_it_from_its_row_on() -> None:
    assert reused_after(put("ids", (0, 9), 15)) in (9, 11)  # 11: the token was 15 already
    assert reused_after(put("mask", (0, 9), 0)) == 9


def test_context_and_numbers_are_part_of_every_row() -> None:
    assert reused_after(put("style", 0, 9.0)) == 0
    assert reused_after(replace("factor", lambda x: x + 1)) == 0


class Answered(Model):
    """The answer alone reads a bias of each text, one of the batch, and a temperature."""

    def forward(self, ids: Tensor, bias: Tensor, shared: Tensor, heat: Tensor, own: Tensor) -> Tensor:
        x = (self.embed(ids) + self.style(own)[:, None]).unsqueeze(1)
        logits = self.out(sdpa(x, x, x, is_causal=True)[:, 0, -1])
        return (logits + self.out(self.style(bias)) + shared) / heat


def test_what_the_answer_alone_reads_is_no_part_of_a_row() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, ids, cache = Answered().eval(), torch.randint(0, 16, (2, 12)), kvpass.Cache("8MiB", page_size=4)
    fast = torch.compile(model, backend="kvpass", dynamic=True, options={"cache": cache})
    args = {"bias": torch.randn(2, 3), "shared": torch.randn(16), "heat": torch.tensor(0.5), "own": torch.randn(2, 3)}
    with torch.no_grad():
        fast(ids, **args)
        for name in ("bias", "shared", "heat", "own"):
            args[name] = torch.rand_like(args[name]) + 0.5
            before = cache.stats().rows_computed
            torch.testing.assert_close(fast(ids, **args), model(ids, **args))
            assert cache.stats().rows_computed - before == (24 if name == "own" else 2), name


class Scaled(Model):
    """A number for each text, on the rows; or for each pair of texts, on the answer to every row."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        x = self.embed(ids).unsqueeze(1)
        if not self.pairs:
            x = x * scale[:, None, None, None]
        y = self.out(sdpa(x, x, x, is_causal=True)[:, 0])
        return y[..., :1] * (scale[:, None] * scale)[:, None] if self.pairs else y


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("pairs", [False, True], ids=["of each text", "of pairs"])
def test_a_number_of_each_text(pairs: bool, dtype: torch.dtype, dynamic: bool) -> None:
    """What a text is known by is its own number, and a row with entries of other texts is not kept."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, ids, cache = Scaled(pairs).eval(), torch.randint(0, 16, (3, 12)), kvpass.Cache("8MiB", page_size=4)
    options = {"cache": cache, "tiers": "eager"}
    compiled = torch.compile(model, backend="kvpass", dynamic=True, options=options)
    fast = compiled if dynamic else kvpass.compile(model, **options)
    scales = [torch.tensor(s).to(dtype) for s in ([1, 2, 3], [1, 2, 3], [1, 5, 3], [1, 5, 3])]
    with torch.no_grad():
        for rows, scale in zip((9, 10, 11, 12), scales, strict=True):
            before = cache.stats().rows_computed
            given = ids[:, :rows].contiguous()
            torch.testing.assert_close(fast(given, scale), model(given, scale))
    assert cache.stats().rows_computed - before == 3
