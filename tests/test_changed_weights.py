"""A weight that changes is noticed, however it is written; nothing stale is answered."""

import ctypes
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kvpass
from kvpass.analysis.identity import digest_of
from kvpass.ir import address
from kvpass.runtime import weights
from kvpass.runtime.weights import Weights


class Small(nn.Module):
    """Causal attention; the key projection is applied as a transposed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(19, 8), nn.Linear(8, 19)
        self.key = nn.Parameter(torch.randn(8, 8).t())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(nn.functional.scaled_dot_product_attention(x, x @ self.key, x, is_causal=True))


def add(model: Small) -> None:
    model.key.add_(1.0)


def scale_data_with_stride(model: Small) -> None:
    model.key.data.mul_(2)


def scale_data(model: Small) -> None:
    model.embed.weight.data.mul_(2)


def write_one_entry(model: Small) -> None:
    model.embed.weight.data[5, 3] = 40


def write_one_entry_through_a_view(model: Small) -> None:
    model.key.data.t()[:4].view(-1)[9:10] = 40


def replace_data(model: Small) -> None:
    model.embed.weight.data = torch.randn(19, 8)


def turn(model: Small) -> None:
    model.key.data = model.key.data.T


def turn_by_strides(model: Small) -> None:
    model.key.data = model.key.data.as_strided((8, 8), model.key.stride()[::-1])


def swap(model: Small) -> None:
    torch.utils.swap_tensors(model.key, nn.Parameter(torch.randn(8, 8)))


def swap_all(model: Small) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def load(model: Small) -> None:
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()})


CHANGES = [
    add,
    scale_data_with_stride,
    scale_data,
    write_one_entry,
    write_one_entry_through_a_view,
    replace_data,
    turn,
    turn_by_strides,
    swap,
    swap_all,
    load,
]


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "as on a device"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_no_stale_answer(change: Callable[[Small], None], on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_on_host", lambda tensor: on_host)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Small().eval()
    fast = kvpass.compile(model, cache=kvpass.Cache(page_size=4))
    ids = torch.arange(11).unsqueeze(0)
    fast(ids)
    change(model)
    torch.testing.assert_close(fast(ids), model(ids), rtol=1e-4, atol=1e-4)


class Masked(nn.Module):
    """A convolution over both sides, of which a mask takes away what looks ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.head = nn.Embedding(19, 8), nn.Conv1d(8, 8, 5, padding=2), nn.Linear(8, 19)
        self.register_buffer("taps", (torch.arange(5) < 3).float())

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.conv.weight * self.taps
        return self.head(nn.functional.conv1d(self.embed(ids).mT, weight, self.conv.bias, padding=2).mT)


@torch.no_grad()
@pytest.mark.parametrize("more", [1, 2])
def test_zeros_that_the_proof_used_are_written_over(more: int) -> None:
    torch.manual_seed(0)
    model, ids = Masked().eval(), torch.arange(15)[None] % 19
    fast = kvpass.compile(model, verify=False)
    for rows in (9, 11):
        torch.testing.assert_close(fast(ids[:, :rows]), model(ids[:, :rows]))
    model.taps[2 : 2 + more] += 0.5
    for rows in (12, 14, 15, 10):
        torch.testing.assert_close(fast(ids[:, :rows]), model(ids[:, :rows]))


@torch.no_grad()
def test_nothing_refers_to_a_weight_weakly() -> None:
    """`swap_tensors` would refuse it; a refusal that is kept, of one fixed length here, keeps no frame of Dynamo's."""
    torch._dynamo.reset()
    model = Small().eval()
    fast = torch.compile(model, backend="kvpass", options={"cache": kvpass.Cache(page_size=4), "tiers": "eager"})
    gc.disable()
    try:
        for length in (7, 9, 11):
            fast(torch.arange(length).unsqueeze(0))
        assert not [name for name, weight in model.named_parameters() if weakref.getweakrefs(weight)]
    finally:
        gc.enable()


def test_one_entry_of_a_tensor_without_a_version() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(1000, 8)
        held = Weights({"w": tensor})
        assert held.same((tensor,))
        tensor[517, 3] = 1
        assert not held.same((tensor,))


def test_one_entry_of_a_tensor_with_holes() -> None:
    tensor = torch.zeros(1000, 16)[:, :8]
    held = Weights({"w": tensor})
    assert held.same((tensor,))
    tensor.data[517, 3] = 1
    assert not held.same((tensor,))


RELAID: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": torch.t,
    "other strides": lambda x: x.as_strided((8, 8), (1, 8)),
    "fewer entries": lambda x: x[:4],
    "another type": lambda x: x.view(torch.float16),
    "conjugated": torch.conj,
    "negated": lambda x: x._neg_view(),
}
TYPES = {"another type": torch.bfloat16, "conjugated": torch.complex64}


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "as on a device"])
@pytest.mark.parametrize("how", RELAID)
def test_one_memory_read_in_another_way(how: str, on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No entry is written, and the contents are others. (Of types and of what is conjugated Dynamo's guards tell.)"""
    monkeypatch.setattr(weights, "_on_host", lambda tensor: on_host)
    tensor = torch.randn(8, 8, dtype=TYPES.get(how, torch.float32))
    held = Weights({"w": tensor})
    tensor.data = RELAID[how](tensor.data)
    assert how in ("another type", "conjugated", "negated") or not held.same((tensor,))
    again = Weights({"w": tensor})
    assert again.digests != held.digests
    assert again.digests == Weights({"w": tensor.resolve_conj().resolve_neg().clone()}).digests
    assert again.same((tensor,))


def weight(*shape: int) -> tuple[Tensor, Weights]:
    tensor = torch.zeros(shape)
    return tensor, Weights({"w": tensor})


@torch.no_grad()
@pytest.mark.parametrize("held", [True, False], ids=["others see the memory", "nobody else does"])
def test_weights_that_are_parts_of_one_memory(held: bool) -> None:
    """What they are known by begins at their own first entry: in place, by another part, and in another model."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, cache = Small().eval(), kvpass.Cache(capacity="8MiB", page_size=4)
    whole = torch.randn(3, 19, 8)
    model.embed.weight.data, ids = whole[1], torch.randint(0, 19, (1, 12))
    parts = [whole[0], whole[2]]
    if not held:
        del whole
    fast = kvpass.compile(model, cache=cache)

    def check() -> None:
        torch.testing.assert_close(fast(ids), model(ids))

    check()
    model.embed.weight.data[7] += 1.0
    check()
    for part in parts:
        model.embed.weight.data = part
        check()


def test_every_program_sees_a_write() -> None:
    tensor, first = weight(1000, 8)
    tensor.data[517, 3] = 1
    second = Weights({"w": tensor})
    assert not first.same((tensor,))
    assert second.same((tensor,))
    tensor.data[517, 3] = 2
    assert not second.same((tensor,))
    assert not first.same((tensor,))


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "as on a device"])
def test_every_program_relies_on_the_mark(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_on_host", lambda tensor: on_host)
    tensor, first = weight(1000, 8)
    second = Weights({"w": tensor})
    assert first.unwatched == second.unwatched == []
    assert first.same((tensor,))
    assert second.same((tensor,))


def test_a_write_while_the_contents_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1000, 8)

    def digest_and_write(of: Tensor) -> bytes:
        digest = digest_of(of)
        tensor.data[517, 3] = 1
        return digest

    monkeypatch.setattr(weights, "digest_of", digest_and_write)
    held = Weights({"w": tensor})
    monkeypatch.undo()
    assert not held.same((tensor,))


def test_a_write_while_the_contents_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, outside = torch.zeros(1000, 8), foreign(10)
    held = Weights({"w": tensor, "read": nn.Parameter(outside, False)})
    assert held.unwatched == ["read"]

    def digest_and_write(of: Tensor) -> bytes:
        tensor.data[517, 3] = 1
        return digest_of(of)

    monkeypatch.setattr(weights, "digest_of", digest_and_write)
    held.same(held.tensors)
    monkeypatch.undo()
    assert not held.same(held.tensors)


def test_what_two_programs_read_in_every_call_stays_what_it_is() -> None:
    outside = foreign(1000, 8)
    tensor = nn.Parameter(outside, False)
    first, second = Weights({"w": tensor}), Weights({"w": tensor})
    for _ in range(2):
        assert first.same((tensor,))
        assert second.same((tensor,))


def test_tied_weights_share_the_mark() -> None:
    tensor = torch.zeros(1000, 8)
    twin = tensor.detach().t()
    held = Weights({"w": tensor}), Weights({"w": twin})
    twin.data[3, 517] = 1
    assert not held[0].same((tensor,))
    assert not held[1].same((twin,))


def test_an_array_that_was_handed_out_may_be_written_into_at_any_time() -> None:
    tensor, held = weight(1000, 8)
    array = tensor.numpy()
    assert not held.same((tensor,))
    held = Weights({"w": tensor})
    assert held.unwatched == ["w"]
    array[517, 3] = 1
    assert not held.same((tensor,))
    held = Weights({"w": tensor})
    array[517, 3] = 2
    assert not held.same((tensor,))
    held = Weights({"w": tensor})
    del array
    assert held.same((tensor,))
    assert held.unwatched == []
    tensor.data[517, 3] = 1
    assert not held.same((tensor,))


def test_an_array_may_have_been_handed_out_before() -> None:
    tensor = torch.zeros(1000, 8)
    array = tensor.numpy()
    held = Weights({"w": tensor})
    assert held.unwatched == ["w"]
    array[517, 3] = 1
    assert not held.same((tensor,))
    held = Weights({"w": tensor})
    del array
    assert held.same((tensor,))
    assert held.unwatched == []


def test_what_was_written_before_the_array_was_dropped_is_never_taken_for_what_it_was() -> None:
    tensor = torch.zeros(1000, 8)
    array = tensor.numpy()
    held = Weights({"w": tensor})
    array[517, 3] = 1
    del array
    assert not held.same((tensor,))
    assert not held.same((tensor,))


def test_reading_again_that_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1000, 8)
    array = tensor.numpy()
    held = Weights({"w": tensor})
    array[517, 3] = 1
    del array
    with monkeypatch.context() as patch:
        patch.setattr(weights, "digest_of", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            held.same((tensor,))
    assert not held.same((tensor,))


def test_saving_is_no_change_and_leaves_the_mark() -> None:
    tensor, held = weight(1000, 8)
    for _ in range(6):
        torch.save(tensor, io.BytesIO())
        again = Weights({"w": tensor})
        assert again.digests == held.digests
        assert again.unwatched == []
    tensor.data[517, 3] = 1
    assert not again.same((tensor,))


def foreign(*shape: int) -> Tensor:
    return torch.from_numpy(np.zeros(shape, np.float32))


def test_memory_that_torch_does_not_own_is_moved_and_ties_hold() -> None:
    tensor = nn.Parameter(foreign(1000, 16), False)
    twin = torch.empty(0).set_(tensor.untyped_storage(), 0, (8, 1000), (1, 16))
    held = Weights({"w": tensor, "twin": twin})
    assert held.unwatched == []
    assert twin.shape == (8, 1000)
    assert twin.stride() == (1, 16)
    twin.data[3, 517] = 1
    assert tensor[517, 3] == 1
    assert not held.same((tensor, twin))


def test_memory_that_others_see_stays_and_is_read_in_every_call() -> None:
    outside, shared = foreign(1000, 8), torch.zeros(1000, 8).share_memory_()
    tensor = nn.Parameter(outside, False)
    held = Weights({"w": tensor, "shared": shared})
    with torch.inference_mode():
        unversioned = foreign(1000, 8)
    assert held.unwatched == ["w", "shared"]
    assert Weights({"w": unversioned}).unwatched == ["w"]
    outside[517, 3] = 1
    assert tensor[517, 3] == 1
    assert not held.same((tensor, shared))
    held = Weights({"w": tensor, "shared": shared})
    shared.data[517, 3] = 1
    assert not held.same((tensor, shared))


@torch.no_grad()
def test_a_model_whose_weights_are_mapped_from_a_file(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.save(Small().state_dict(), tmp_path / "weights")
    model = Small().eval()
    model.load_state_dict(torch.load(tmp_path / "weights", mmap=True), assign=True)
    fast = kvpass.compile(model, cache=kvpass.Cache(page_size=4))
    ids = torch.arange(11).unsqueeze(0)
    fast(ids)
    model.embed.weight.data[5, 2:4] = 40
    torch.testing.assert_close(fast(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_what_is_read_in_every_call_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model = Small().eval()
    model.embed.weight.data.share_memory_()
    fast = kvpass.compile(model, cache=kvpass.Cache(page_size=4))
    with torch.no_grad():
        for length in (5, 6, 9):
            fast(torch.arange(length).unsqueeze(0))
    assert [r.message.startswith("1 weights (0 MiB") for r in caplog.records if "every call" in r.message] == [True]


def test_a_call_reads_weights_without_a_writable_pointer() -> None:
    torch._dynamo.reset()
    model = Small().eval()
    fast = kvpass.compile(model, cache=kvpass.Cache(page_size=4))
    with torch.no_grad():
        for length in (5, 6, 9):
            fast(torch.arange(length).unsqueeze(0))
    assert all(torch._C._is_cow_tensor(p) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_write_that_torch_does_not_see_shows_in_the_sample(dtype: torch.dtype) -> None:
    """By address: neither a version nor a mark moves. Tensors may be of one storage, of one entry, and transposed."""
    flat = torch.zeros(4000, dtype=dtype)
    tensors = {"one": flat[:1000], "two": flat[1000:].view(30, 100).t(), "three": torch.zeros(1, dtype=dtype)}
    held = Weights(tensors)
    assert held.same(tuple(tensors.values()))
    for tensor in tensors.values():
        where, size = address(tensor), tensor.numel() * tensor.element_size()
        ctypes.memset(where, 1, size)
        assert not held.same(tuple(tensors.values()))
        ctypes.memset(where, 0, size)
        assert held.same(tuple(tensors.values()))
