"""What is put together of pieces is what tracing all of it at once gives, node by node."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

import kvpass
from kvpass import errors
from kvpass.frontend import capture, export
from tests.coverage import MODELS, VOCAB, build
from tests.spellings.modules import MODULES, SIZE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


def written(module: fx.GraphModule) -> list[Any]:
    """A graph without the names of its nodes."""
    place: dict[fx.Node, int] = {}
    out = []
    for node in module.graph.nodes:
        place[node] = len(place)
        held = getattr(module, node.target) if node.op == "get_attr" else None
        inside = held.tolist() if isinstance(held, Tensor) else held.code if isinstance(held, fx.GraphModule) else None
        op = node.op == "call_function" or node.op == "output"
        told = export.call(node, place.__getitem__) if op else (node.op, inside)
        values = node.meta["val"] if isinstance(node.meta.get("val"), (tuple, list)) else [node.meta.get("val")]
        types = [export.type_of(x)[:4] for x in values if x is not None]  # not whether a weight wants gradients
        out.append((told, types))
    return out


def modes(module: fx.GraphModule) -> set[int]:
    """Values of several modes cannot be operands of one op."""
    leaves = pytree.tree_leaves([node.meta.get("val") for node in module.graph.nodes])
    return {id(x.fake_mode) for x in leaves if isinstance(x, FakeTensor)}


class Tracing:
    """Stands for `exported`: keeps what is made, whole and in pieces, and ends the compilation there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, worth: float = 1e9) -> None:
        self.whole: list[fx.GraphModule] = []
        self.joined: list[fx.GraphModule] = []
        self.traced: list[int] = []
        monkeypatch.setattr(capture, "exported", self.exported)
        monkeypatch.setattr(export, "_WORTH", worth)
        one = export.traced

        def counting(gm: fx.GraphModule, fakes: Any) -> fx.GraphModule:
            self.traced[-1] += 1
            return one(gm, fakes)

        monkeypatch.setattr(export, "traced", counting)
        self.one = one

    def exported(self, gm: fx.GraphModule, fakes: Any) -> fx.GraphModule:
        self.traced.append(0)
        self.joined.append(export.exported(gm, fakes))
        self.whole.append(self.one(gm, fakes))
        raise errors.SingleRow()

    def check(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        torch._dynamo.reset()
        before = len(self.whole)
        with torch.no_grad():
            kvpass.compile(model)(*args, **kwargs)
        assert before < len(self.whole) == len(self.joined) == len(self.traced)
        for joined, whole in zip(self.joined, self.whole, strict=True):
            assert written(joined) == written(whole)
            assert len(modes(joined)) == len(modes(whole)) == 1


IDS = torch.randint(0, 7, (2, 9), generator=torch.Generator().manual_seed(0))


def some(all_of_them: Iterable[Any], each: int) -> list[Any]:
    """One of so many; the others are in the soak."""
    return [x if k % each == 0 else pytest.param(x, marks=pytest.mark.soak) for k, x in enumerate(all_of_them)]


@pytest.mark.parametrize("name", some(MODULES, 4))
def test_a_module_of_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MODULES[name]
    Tracing(monkeypatch).check(spec.build(), IDS, *([torch.randn(2, 5, SIZE)] if spec.memory else []))


@pytest.mark.parametrize("kind", some(MODELS, 12), ids=lambda kind: kind.__name__)
def test_a_covered_model_of_pieces(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    Tracing(monkeypatch).check(model, IDS, *model.arguments(IDS))


class Layer(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.one, self.two, self.eps = nn.Linear(16, 32), nn.Linear(32, 16), eps

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(nn.functional.layer_norm(x, (16,), eps=self.eps)))).cumsum(1)


class InPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x += self.two(self.one(x).relu_())
        return x


class Exact(Layer):
    """Autocast is entered, and off: leaving it names the entering, which must not stand in another piece."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.two(torch.relu(self.one(x)))
        return x + y.float().cumsum(1)


class Doubled(Layer):
    """Layers that differ in what type a number has: 2 and 2.0, which is another dtype for whole numbers."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device) * (2 if self.eps > 1e-3 else 2.0)
        return x + self.two(torch.relu(self.one(x))) + steps[:, None]


class Wider(Layer):
    """Layers that differ in nothing but the sizes of their weights."""

    def __init__(self, eps: float) -> None:
        super().__init__(eps)
        width = 48 if eps > 1e-3 else 32
        self.one, self.two = nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x)))


class Crossed(Wider):
    """And in how their weights stand in memory: what becomes of a reshape depends on it."""

    def __init__(self, eps: float) -> None:
        super().__init__(1e-5)
        if eps > 1e-3:
            self.one.weight = nn.Parameter(self.one.weight.detach().mT.contiguous().mT)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.one.weight.reshape(-1).sum()


class Twins(Layer):
    """Two results of what is alike are read by what comes next: queries and keys that are normalised."""

    def __init__(self, eps: float) -> None:
        super().__init__(eps)
        self.other, self.value = nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (nn.functional.rms_norm(project(x), (32,), eps=self.eps) for project in (self.one, self.other))
        return x + self.two(self.value(x) * q * torch.relu(k))


class Choosing(Layer):
    """Layers that hold functions of their own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * (3 if self.eps > 1e-3 else 5), (x,))


class Split(Layer):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x).chunk(2, -1)
        return x + torch.relu(a) * b


class Sliced(Layer):
    """Layers that differ in what they take of a row."""

    def forward(self, x: Tensor) -> Tensor:
        half = x[..., :8] if self.eps > 1e-3 else x[..., 8:]
        return x + self.two(torch.relu(self.one(torch.cat([half, half], -1))))


class Flat(Layer):
    """Layers that each compute a size."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x.flatten(0, 1)))).view_as(x)


class Deep(nn.Module):
    def __init__(self, kind: type[Layer], epsilons: list[float]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(kind(eps) for eps in epsilons)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


ALIKE, OTHER = [1e-5] * 8, [1e-5, 1e-5, 1e-2, 1e-5, 1e-5, 1e-2, 1e-5, 1e-5]


@pytest.mark.parametrize("kind", [Layer, InPlace, Exact, Doubled, Wider, Crossed, Choosing, Split, Sliced, Flat, Twins])
@pytest.mark.parametrize("epsilons", [ALIKE, OTHER], ids=["alike", "other"])
def test_layers_of_pieces(kind: type[Layer], epsilons: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    tracing = Tracing(monkeypatch)
    tracing.check(Deep(kind, epsilons), IDS)


@pytest.mark.parametrize("kind", [Exact, Split])
def test_wherever_it_is_cut(kind: type[Layer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each op that is repeated, if only it may be cut there."""
    tracing, model = Tracing(monkeypatch), Deep(kind, OTHER)
    for label in range(1, 12):
        monkeypatch.setattr(export, "_chosen", lambda count, label=label: [label] if count[label] > 1 else [])
        tracing.check(model, IDS)
    assert 2 < max(tracing.traced) < 9


def test_how_much_is_traced_does_not_depend_on_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing = Tracing(monkeypatch, export._WORTH)
    for depth in (6, 12):
        tracing.check(Deep(Layer, [1e-5] * depth), IDS)
    assert tracing.traced[0] == tracing.traced[1] < 5


def test_a_layer_that_differs_is_traced_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing = Tracing(monkeypatch)
    tracing.check(Deep(Layer, ALIKE), IDS)
    tracing.check(Deep(Layer, OTHER), IDS)
    assert tracing.traced[0] < tracing.traced[1] < 8


def test_a_value_that_is_read_later_in_one_layer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ops on the same types, of which other results go on."""

    class Model(Deep):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x = self.embed(ids)
            for k, layer in enumerate(self.layers):
                y = layer.two(hidden := torch.relu(layer.one(x)))
                if k == 3:
                    kept = hidden
                x = x + y
            return x, kept

    Tracing(monkeypatch).check(Model(Layer, ALIKE), IDS)


def test_sizes_that_the_data_tells_are_those_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(Deep):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = x + layer.two(torch.relu(layer.one(x))) * (x > layer.one.bias[0]).sum().item()
            return x

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        tracing = Tracing(monkeypatch)
        tracing.check(Model(Layer, ALIKE), IDS)
    assert tracing.traced[0] > 1  # tried, and given up


def test_what_changes_the_state_of_tracing_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says where the effect of such a call ends."""

    class Model(Deep):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.enable_grad():
                x = super().forward(ids)
            return x.detach()

    tracing = Tracing(monkeypatch)
    tracing.check(Model(Layer, ALIKE), IDS)
    assert tracing.traced == [1]
