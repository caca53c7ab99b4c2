"""Every refusal can happen: for each one a call that brings it, answered by the model as it was written."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._sympy.functions import CeilToInt, FloorDiv, Mod, OpaqueUnaryFn_log2

import kvpass
from kvpass import errors
from kvpass.frontend import backend, export
from kvpass.ir import holds
from kvpass.kernels import ops
from tests.test_adversarial import CASES

Function = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """Causal attention, after `function` had its way with the rows."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.embed, self.key, self.out = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor, *more: Any) -> Tensor:
        x = self.function(self, self.embed(ids), *more).unsqueeze(1)
        return self.out(sdpa(x, self.key(x), x, is_causal=True)[:, 0, -1:])


def same(model: Model, x: Tensor, *_: Any) -> Tensor:
    return x


def counts(model: Model, x: Tensor) -> Tensor:
    model.calls.add_(1)
    return x


def breaks(model: Model, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


def unknown(model: Model, x: Tensor) -> Tensor:
    return torch.special.bessel_j0(x)


def splits(model: Model, x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).cumsum(1).flatten(1, 2)


def pairs(model: Model, x: Tensor) -> Tensor:
    """What would be stored has two sequence axes."""
    causal = (x @ x.mT).tril()
    return causal @ causal @ x


def cube(model: Model, x: Tensor, given: Tensor) -> Tensor:
    return x + given[0, 0, 0]


def scaled(model: Model, x: Tensor, factor: float) -> Tensor:
    return x * factor


class Rows(nn.Module):
    """No row reads another one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embed(ids)[:, -1:])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def ids(batch: int = 1, rows: int = 10) -> Tensor:
    return torch.arange(batch * rows).reshape(batch, rows) % 16


def code_of(model: nn.Module, *args: Any, dynamic: bool | None = True) -> str:
    """The code of the refusal; the answer is the model's."""
    fast = torch.compile(model, backend="kvpass", dynamic=dynamic)
    torch.testing.assert_close(fast(*args), model(*args), equal_nan=True)
    record = backend.records()[-1]
    refusal = record.refusal or (record.program.refusal if record.program else None)
    assert refusal is not None
    assert refusal.code in str(refusal)
    assert refusal.hint
    return refusal.code


def broken(*_: Any, **__: Any) -> Any:
    raise KeyError("a planted fault")


class Talks(nn.Module):
    """A block in a loop, and a break after each: Dynamo leaves the loop to Python without a word."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(16, 8), nn.ModuleList(blocks)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + sdpa(x, self.key(x), x, is_causal=True)


class Breaks(Block):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


BY_CALL: dict[str, Callable[[], str]] = {
    "KV101": lambda: code_of(Model(same), ids(), dynamic=None),
    "KV102": lambda: code_of(Model(same), ids(rows=1), dynamic=None),
    "KV104": lambda: code_of(Model(breaks), ids()),
    "KV105": lambda: meta(),
    "KV106": lambda: code_of(Model(cube), ids(), torch.zeros(10, 10, 10)),
    "KV107": lambda: code_of(Model(counts), ids()),
    "KV108": lambda: code_of(Model(same), ids(10, 10)),
    "KV111": lambda: code_of(Model(mapped), ids()),
    "KV201": lambda: code_of(Model(unknown), ids()),
    "KV207": lambda: code_of(Model(splits), ids()),
    "KV208": lambda: code_of(Model(pairs), ids()),
    "KV209": lambda: code_of(Rows(), ids()),
}


def mapped(model: Model, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.vmap(lambda text: text @ text.mT)(x).tril() @ x
    return y.float()


def meta() -> str:
    model = Model(same).to("meta")
    assert torch.compile(model, backend="kvpass", dynamic=True)(ids().to("meta")).shape == (1, 1, 16)
    refusal = backend.records()[-1].refusal
    assert refusal is not None
    return refusal.code


class MasksItsWeight(nn.Module):
    """A convolution that writes zeros into its own weight, past the version counter (PixelCNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(16, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        self.conv.weight.data *= torch.tensor([1.0, 1.0, 0.0])
        return self.conv(self.embed(ids).mT).mT


def test_a_write_into_a_weight_names_it() -> None:
    assert code_of(MasksItsWeight(), ids()) == "KV107"
    refusal = backend.records()[-1].refusal
    assert refusal is not None
    assert "_modules['conv']._parameters['weight']" in str(refusal)


@pytest.mark.parametrize("code", BY_CALL)
def test_refused_by_a_call(code: str) -> None:
    assert BY_CALL[code]() == code


def test_gradients() -> None:
    with torch.enable_grad():
        assert code_of(Model(same), ids()) == "KV103"


def test_failures_in_capture_and_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(export, "make_fx", broken)
        assert code_of(Model(same), ids()) == "KV109"
    for ours in ("incrementalise", "Program"):
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            patch.setattr(backend, ours, broken)
            assert code_of(Model(same), ids()) == "KV110"


def test_a_capture_that_fails_inside_of_a_vmap() -> None:
    """It is left again: whatever runs next would else run inside of it, and Dynamo's guards fail at once."""

    def running(model: Model, x: Tensor) -> Tensor:
        return torch.vmap(lambda text: text.cumsum(0) * torch.tensor([0.5, 1, 2, 3, 4, 5, 6, 7]))(x)

    model = Model(running)
    fast = torch.compile(model, backend="kvpass")
    for rows in (5, 6, 7):
        torch.testing.assert_close(fast(ids(rows=rows)), model(ids(rows=rows)))
    torch._dynamo.reset()
    assert code_of(model, ids()) == "KV109"


def test_an_op_that_checks_what_it_is_given() -> None:
    """`inverse` raises an error that no later op waits for: it stays what it is, and of weights that is enough."""

    def of_weights(model: Model, x: Tensor) -> Tensor:
        return x @ torch.inverse(model.key.weight + 2 * torch.eye(8))

    def of_rows(model: Model, x: Tensor) -> Tensor:
        return x @ torch.inverse(x.mT @ x + torch.eye(8))

    assert code_of(Model(of_rows), ids()) == "KV201"
    model, cache = Model(of_weights), kvpass.Cache("8MiB")
    fast = kvpass.compile(model, cache=cache)
    for rows in (7, 9):
        torch.testing.assert_close(fast(ids(rows=rows)), model(ids(rows=rows)))
    assert cache.stats().rows_reused == 7
    model.key.weight.copy_(-2 * torch.eye(8))
    with pytest.raises(torch.linalg.LinAlgError):
        fast(ids(rows=9))


def test_the_first_cause_is_said() -> None:
    """Rows that a mask may leave without keys are read, but that mask is made of all rows in the first place."""

    class Chosen(Model):
        def forward(self, ids: Tensor, *more: Any) -> Tensor:
            x, size = self.embed(ids), ids.float()
            hidden = (size < size.topk(3).values[:, -1:])[:, None] | torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            x = ((x @ x.mT).masked_fill(hidden, -1e9).softmax(-1) @ x)[:, None]
            return self.out(sdpa(x, self.key(x), x, is_causal=True)[:, 0, -1:])

    assert code_of(Chosen(same), ids()) == "KV202"
    assert "topk" in str(backend.records()[-1].refusal)


def test_the_first_cause_is_said_of_rows_in_a_shape_without_a_rule() -> None:
    """A Fourier transform of twice as many rows: that its result is cut in two is not what is wrong."""

    def convolved(model: Model, x: Tensor) -> Tensor:
        n = x.shape[1]
        wave = torch.fft.rfft(x, n=2 * n, dim=1)
        return torch.fft.irfft(wave * wave, n=2 * n, dim=1)[:, :n]

    assert code_of(Model(convolved), ids()) == "KV202"
    assert "fft_rfft" in str(backend.records()[-1].refusal)


def test_a_guard_without_a_value_holds_for_no_length() -> None:
    """Chunks of ``s // 64`` rows: below 64 torch itself would divide by zero."""
    rows = sympy.Symbol("s", integer=True, positive=True)
    guard = sympy.Eq(Mod(8, FloorDiv(rows, 64)), 0)
    assert [holds(guard, rows, number) for number in (10, 64, 200, 256)] == [False, True, False, True]
    logarithm = sympy.Eq(CeilToInt(OpaqueUnaryFn_log2(rows - 9)), 2)
    assert [holds(logarithm, rows, number) for number in (8, 9, 10, 13)] == [False, False, False, True]


def test_a_branch_that_is_taken_in_the_graph() -> None:
    def either(model: Model, x: Tensor) -> Tensor:
        answer: Tensor = torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))
        return answer

    assert code_of(Model(either), ids()) == "KV201"


def test_a_wrong_rewriting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "append", lambda pool, rows, place, before: pool.zero_())
    assert code_of(Model(same), ids()) == "KV301"


def test_a_cache_that_is_too_small_says_so_in_the_call(caplog: pytest.LogCaptureFixture) -> None:
    model, cache = Model(same), kvpass.Cache(capacity=1024)
    with caplog.at_level(logging.WARNING, "kvpass"):
        torch.testing.assert_close(kvpass.compile(model, cache=cache)(ids()), model(ids()))
    assert "KV302" in caplog.text
    assert cache.stats().bytes_used == 0


def test_a_number_that_changes_says_so_in_the_call(caplog: pytest.LogCaptureFixture) -> None:
    model, cache = Model(scaled), kvpass.Cache(capacity="8MiB")
    fast = torch.compile(model, backend="kvpass", dynamic=True, options={"cache": cache})
    with caplog.at_level(logging.WARNING, "kvpass"):
        for factor in (0.5, 0.5, 0.25, 0.125, 0.5):
            torch.testing.assert_close(fast(ids(), factor), model(ids(), factor))
    assert "KV303" in caplog.text
    assert cache.stats().rows_reused == 2 * 9


class Padded(Model):
    """Attention in which one finite number hides later rows, and another one padding."""

    def __init__(self) -> None:
        super().__init__(same)

    def forward(self, ids: Tensor, kept: Tensor) -> Tensor:
        x = self.embed(ids)
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        scores = (x @ self.key(x).mT + (1 - kept[:, None]) * -1e9).masked_fill(later, -1e9)
        return self.out(x + scores.softmax(-1) @ x)


def test_a_mask_that_is_none_says_so_in_the_call(caplog: pytest.LogCaptureFixture) -> None:
    """``(1 - 2) * -1e9`` undoes what hides later rows: there the answer is the model's own."""
    model, cache = Padded(), kvpass.Cache(capacity="8MiB")
    fast = kvpass.compile(model, cache=cache)
    kept = torch.ones(ids().shape, dtype=torch.long)
    reused = []
    with caplog.at_level(logging.WARNING, "kvpass"):
        for mask in (kept, kept, 2 * kept, -kept, kept):
            before = cache.stats().rows_reused
            torch.testing.assert_close(fast(ids(), mask), model(ids(), mask))
            reused.append(cache.stats().rows_reused - before)
    assert caplog.text.count("KV304") == 1
    assert reused == [0, 9 * len(kept), 0, 0, 9 * len(kept)]
    assert "zeros and ones" in str(kvpass.explain(model, ids(), kept))


def test_every_refusal_has_a_test() -> None:
    here = {*BY_CALL, "KV103", "KV109", "KV110", "KV301", "KV302", "KV303", "KV304"}
    there = set().union(*(case.codes for case in CASES))
    assert {refusal.code for refusal in errors.REFUSALS} <= here | there


@pytest.mark.parametrize("model", [Talks(Block(), Block()), nn.Sequential(nn.Embedding(16, 8), Block(), Breaks())])
def test_a_split_that_dynamo_does_not_report(model: nn.Module) -> None:
    backend._records.clear()
    assert code_of(model.eval(), ids()) == "KV104"
    assert {record.refusal.code for record in backend.records() if record.refusal} == {"KV104"}
    assert all(record.program is None for record in backend.records())
    report = kvpass.explain(model, ids())
    assert not report.proven
    assert any(refusal.source.endswith("in forward") for refusal in report.refusals)


def test_a_whole_model_in_a_loop_of_plain_python() -> None:
    """The loop is left to Python; each call of the model is one graph."""
    model = Model(same).eval()

    def generate(ids: Tensor) -> Tensor:
        for _ in range(3):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
            torch._dynamo.graph_break()
        return ids

    backend._records.clear()
    fast = torch.compile(generate, backend="kvpass", dynamic=True)
    torch.testing.assert_close(fast(ids()), generate(ids()))
    assert all(record.program is not None for record in backend.records())
