"""Compiled steps in a program: when they are taken up, what they are made for, and when they are not taken."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import kvpass
from kvpass.frontend import export
from kvpass.frontend.backend import records
from kvpass.lowering import build
from kvpass.lowering.tape import trace
from kvpass.lowering.tape.rules import RULES
from kvpass.runtime import steps, written
from kvpass.runtime.steps import Steps

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 32)
        self.place = nn.Embedding(512, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(layers))
        self.mix = nn.ModuleList(nn.Linear(32, 96) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.head = nn.Linear(32, 23)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for norm, mix, out in zip(self.norms, self.mix, self.out, strict=True):
            q, k, v = (part.view(*ids.shape, 4, 8).transpose(1, 2) for part in mix(norm(x)).chunk(3, dim=-1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + nn.functional.silu(out(y.transpose(1, 2).flatten(2)))
        return self.head(x[:, -1:])


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # no part of it is a trifle
    return model


Fast = Callable[..., Any]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4 * float(expected.abs().max()))


def grow(fast: Fast, model: Model, ids: Tensor, count: int, by: int = 1) -> Tensor:
    """Ids that have grown; every answer is the model's."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, torch.randint(0, 23, (ids.shape[0], by))], 1)
            close(fast(ids), model(ids))
    return ids


def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry, the number of new rows and sequences, with every call that a tape serves."""
    calls: list[int] = []
    right = Steps._taken

    def count(self: Steps, made: Any, args: Any, numbers: Any) -> Any:
        found = right(self, made, args, numbers)
        if found is not None:
            calls.append(len(numbers))
        return found

    monkeypatch.setattr(Steps, "_taken", count)
    return calls


def test_a_step_is_compiled_in_the_background_and_taken_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = taken(monkeypatch)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="auto")
    ids = grow(fast, model, torch.randint(0, 23, (1, 9)), 1, by=8)
    assert kvpass.wait(fast)
    grow(fast, model, ids, 5)
    assert len(calls) == 5


def test_compiled_before_the_first_call_that_needs_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = taken(monkeypatch)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled")
    ids = grow(fast, model, torch.randint(0, 23, (1, 9)), 1, by=3)
    ids = grow(fast, model, ids, 4)
    assert len(calls) == 4
    ids = grow(fast, model, ids, 3, by=3)  # several rows at once are another regime
    assert len(calls) == 7
    ids = grow(fast, model, ids, 3, by=17)  # and so are many
    grow(fast, model, torch.randint(0, 23, (1, 40)), 1)  # and a prompt
    assert len(calls) == 11
    program = records()[-1].program
    assert program is not None
    assert program.steps is not None
    names = [name.partition(",")[0] for name, tape, _ in program.steps.describe() if tape is not None]
    assert sorted(names) == ["many new rows", "many new rows and no other", "one new row", "several new rows"]


def test_the_second_prompt_is_compiled_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that reads one prompt would wait for a tape that it never takes."""
    calls = taken(monkeypatch)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="auto")
    for k in range(4):
        ids = torch.randint(0, 23, (1, 30 + k))
        ids[:, :2] = torch.tensor([0, k])  # all begin with one token
        grow(fast, model, ids, 1)
        assert kvpass.wait(fast)
    assert len(calls) == 1  # the first prompt found nothing in the cache, the others a row


def test_a_prompt_leaves_the_marks_of_the_weights(model: Model) -> None:
    """Whoever asks a weight for a writable pointer takes its mark, and every later call reads all of it."""
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled", verify=False)
    grow(fast, model, torch.randint(0, 23, (1, 30)), 2, by=20)
    program = records()[-1].program
    assert program is not None
    assert program._bound is not None
    assert program._bound.weights._marked
    assert all(map(written.bearing, program._bound.weights._marked))


def test_never_compiled_where_the_user_says_so(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = taken(monkeypatch)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="eager")
    grow(fast, model, torch.randint(0, 23, (1, 9)), 4)
    assert not calls
    assert not records()[-1].program.steps.describe()  # type: ignore[union-attr]


def test_a_word_that_is_no_tier() -> None:
    with pytest.raises(kvpass.errors.OptionError, match="'auto', 'compiled', 'eager'"):
        kvpass.compile(Model(), tiers="fast")


def test_one_tape_for_all_lengths_and_histories(model: Model) -> None:
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB", page_size=4), tiers="compiled", verify=False)
    ids = grow(fast, model, torch.randint(0, 23, (1, 9)), 60)
    grow(fast, model, ids[:, :20], 10)  # a branch, and a table that is no longer one run
    program = records()[-1].program
    assert program is not None
    assert program.steps is not None
    assert [str(regime) for regime in program.steps._made] == ["one new row, any batch"]
    assert all(len(held) == 1 for held in program.steps._made.values())


def test_batches_of_any_size_share_a_tape(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = taken(monkeypatch)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled", verify=False)
    grow(fast, model, torch.randint(0, 23, (2, 9)), 3)
    for batch in (3, 5, 4, 2):
        with torch.no_grad():
            torch._dynamo.mark_dynamic(ids := torch.randint(0, 23, (batch, 9)), 0)
            fast(ids)
        grow(fast, model, ids, 3)
    made = [record.program.steps._made for record in records()[-2:] if record.program and record.program.steps]
    assert all(len(held) == 1 for one in made for held in one.values())
    assert len(calls) >= 12


def test_sizes_of_zero_and_one_are_regimes_of_their_own(model: Model) -> None:
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"))
    with torch.no_grad():
        torch._dynamo.mark_dynamic(ids := torch.randint(0, 23, (2, 9)), 0)
        fast(ids)
    program = records()[-1].program
    assert program is not None
    assert program.steps is not None
    arguments = program.steps.arguments
    (batch,) = arguments.symbols
    args: list[Any] = [None] * arguments.first
    regimes = []
    for args[batch] in (0, 1, 2, 3):
        regimes.append(arguments.regime(args, 5, 1))
    assert len(set(regimes)) == 3
    assert regimes[2] == regimes[3]


def test_weights_that_change_and_weights_that_move(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = taken(monkeypatch)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled", verify=False)
    ids = grow(fast, model, torch.randint(0, 23, (1, 9)), 3)
    with torch.no_grad():
        model.out[0].weight.mul_(1.5)
        ids = grow(fast, model, ids, 3)
        model.mix[1].weight.data = torch.randn(96, 32)
        ids = grow(fast, model, ids, 3)
        model.head.weight = nn.Parameter(torch.randn(23, 32))
        grow(fast, model, ids, 3)
    assert len(calls) > 6


def test_a_token_out_of_range_raises_as_in_the_model(model: Model) -> None:
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled", verify=False)
    ids = grow(fast, model, torch.randint(0, 23, (1, 9)), 3)
    bad = torch.cat([ids, torch.tensor([[23]])], 1)
    with torch.no_grad():
        with pytest.raises(IndexError) as plain:
            model(bad)
        with pytest.raises(IndexError) as ours:
            fast(bad)
    assert str(ours.value) == str(plain.value)
    grow(fast, model, ids, 2)


def test_a_step_that_differs_is_dropped(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = RULES[aten.silu.default]
    monkeypatch.setitem(RULES, aten.silu.default, lambda w: right(w).replace("sigmoid", "-sigmoid"))
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled")
    with caplog.at_level(logging.WARNING, "kvpass"):
        grow(fast, model, torch.randint(0, 23, (1, 9)), 5)
    assert sum("the compiled step differs" in line for line in caplog.messages) == 1


def test_without_the_comparison_the_fault_would_show(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES[aten.silu.default]
    monkeypatch.setitem(RULES, aten.silu.default, lambda w: right(w).replace("sigmoid", "-sigmoid"))
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled", verify=False)
    with pytest.raises(AssertionError):
        grow(fast, model, torch.randint(0, 23, (1, 9)), 5)


def test_a_failed_compilation_leaves_the_slow_path(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(steps.Arguments, "tape", broken)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="auto")
    with caplog.at_level(logging.WARNING, "kvpass"):
        ids = grow(fast, model, torch.randint(0, 23, (1, 9)), 3)
        kvpass.wait(fast)
        grow(fast, model, ids, 3)
    assert sum("the disk is full" in line for line in caplog.messages) == 1


def test_without_a_compiler_it_runs_op_by_op(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise build.NoCompiler("no C++ compiler was found")

    monkeypatch.setattr(build, "shared_library", none)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled")
    grow(fast, model, torch.randint(0, 23, (1, 9)), 3)


def test_two_threads_share_a_model(model: Model) -> None:
    fast = kvpass.compile(model, cache=kvpass.Cache("16MiB"), tiers="compiled", verify=False)
    start = grow(fast, model, torch.randint(0, 23, (1, 9)), 2)
    failed: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            own = torch.Generator().manual_seed(seed)
            ids = start
            with torch.no_grad():
                for _ in range(30):
                    ids = torch.cat([ids, torch.randint(0, 23, (1, 1), generator=own)], 1)
                    close(fast(ids), model(ids))
        except BaseException as error:  # noqa: BLE001 (told by the thread that waits)
            failed.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]


def test_a_model_without_gradients_inside_inference_mode(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = taken(monkeypatch)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled", verify=False)
    with torch.inference_mode():
        ids = torch.randint(0, 23, (1, 9))
        for _ in range(4):
            ids = torch.cat([ids, torch.randint(0, 23, (1, 1))], 1)
            close(fast(ids), model(ids))
    assert calls


def test_prompts_inside_and_outside_of_inference_mode(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a tape serves both, and PyTorch writes into it."""
    calls = taken(monkeypatch)
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="compiled", verify=False)
    for k in range(4):
        with torch.inference_mode(k % 2 == 0), torch.no_grad():
            ids = torch.randint(0, 23, (1, 60 + k))
            close(fast(ids).clone(), model(ids))
        with torch.no_grad():
            ids = torch.randint(0, 23, (1, 70 + k))
            close(fast(ids), model(ids))
    assert len(calls) == 8


def test_what_is_traced_once_is_what_each_op_makes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, strides and types of every value, and which of them share memory."""
    made = steps.Tape
    checked: list[int] = []

    def tape(module: fx.GraphModule, operands: Any, hints: Any, rows: Any) -> Any:
        once = trace.trace(module, operands, hints)
        with monkeypatch.context() as patch:
            patch.setattr(trace._Repeats, "value", lambda self, *call: trace._value(*call))
            each = trace.trace(module, operands, hints)
        assert described(once) == described(each)
        assert once.guards == each.guards
        checked.append(len(once.values))
        return made(module, operands, hints, rows)

    monkeypatch.setattr(steps, "Tape", tape)
    fast = kvpass.compile(model, cache=kvpass.Cache("4MiB"), tiers="compiled")
    ids = torch.randint(0, 23, (2, 20))
    with torch.no_grad():
        for rows in (9, 10, 13, 14):
            close(fast(ids[:, :rows]), model(ids[:, :rows]))
    assert len(checked) == 3


class First(nn.Module):
    """The first layer of a model, and its head: it shares what that layer stores."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embed, self.place, self.head = model.embed, model.place, model.head
        self.norms, self.mix, self.out = model.norms[:1], model.mix[:1], model.out[:1]

    forward = Model.forward


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 1), (2, 3)])
def test_slots_whose_tables_of_pages_differ(model: Model, batch: int, rows: int) -> None:
    """Another model keeps other texts in some of them: from then on each has pages of its own."""
    cache = kvpass.Cache("4MiB", page_size=4, poison=True)
    fast, first = (kvpass.compile(m, cache=cache, tiers="compiled", verify=False) for m in (model, First(model)))
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 23, (batch, 40), generator=generator) for _ in range(3)]
    with torch.no_grad():
        for length in range(9, 9 + 3 * rows, rows):
            close(fast(texts[0][:, :length]), model(texts[0][:, :length]))
        first(texts[1])
        for length in (20, 20 + rows, 20 + 2 * rows, 40):
            close(fast(texts[2][:, :length]), model(texts[2][:, :length]))
    program = next(record.program for record in records() if record.program and record.program.cache is cache)
    regimes = program.steps._made
    assert {len(set(regime.tables)) for regime, made in regimes.items() if made[0].tape} == {1, 2}


def described(traced: trace.Traced) -> list[Any]:
    place: dict[int, int] = {}
    same: dict[int, int] = {}
    out: list[Any] = []
    for node, value in traced.values.items():
        if not isinstance(value, Tensor):
            out.append(str(value))
            continue
        numbers = [str(n) for n in (*value.shape, *value.stride(), value.storage_offset())]
        memory = place.setdefault(trace.memory(value), len(place))
        out.append((node.name, numbers, value.dtype, memory, same.setdefault(id(value), len(same))))
    return out


def test_no_step_is_traced_while_a_model_is(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch takes sizes that any thread computes with for those of a trace before dispatch: steps stayed op by op."""
    inside, prepared = threading.Event(), steps.Arguments.tape

    class Slow(export.PropagateUnbackedSymInts):
        def run(self, *args: Any) -> Any:
            inside.set()
            time.sleep(1)
            return super().run(*args)

    def later(*args: Any) -> Any:
        assert inside.wait(60)
        return prepared(*args)

    monkeypatch.setattr(steps.Arguments, "tape", later)
    ids = torch.arange(12)[None]
    fast = kvpass.compile(model, cache=kvpass.Cache("8MiB"), tiers="auto")
    with torch.no_grad():
        fast(ids)
        program = records()[-1].program
        monkeypatch.setattr(export, "PropagateUnbackedSymInts", Slow)
        kvpass.compile(Model(1).eval())(ids)
    for future in program.steps.pending():  # type: ignore[union-attr]
        future.result()
    assert [reason for _, _, reason in program.steps.describe()] == [""]  # type: ignore[union-attr]
