"""The kernels as an operator in a graph of Dynamo's."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

import kvpass
from kvpass.ir import Attention
from kvpass.kernels.text import text
from kvpass.lowering import cpu
from kvpass.runtime import program
from tests.lowering.cases import POOL, Inputs, Shape, attention

LAYOUT = [1, 1, 1]


@pytest.mark.parametrize(
    "spec",
    [
        attention(6, 2, 16, 24),
        attention(4, 4, 16, dtype=torch.bfloat16, mask="window"),
        attention(6, 2, 16, score="bias"),
    ],
    ids=["sizes", "bfloat16", "reads"],
)
def test_what_pytorch_asks_of_an_operator(spec: Attention) -> None:
    inputs = Inputs(spec, Shape(new=3, cached=70))
    key, value = inputs.pages(inputs.key), inputs.pages(inputs.value)
    where = inputs.shape.cached, inputs.shape.rows, inputs.reads, text(spec)
    attend: Any = torch.ops.kvpass.attention.default
    torch.library.opcheck(attend, (inputs.query, *key, -1, LAYOUT, *value, -1, LAYOUT, *where))
    torch.library.opcheck(attend, (inputs.query, inputs.key, None, -1, [], inputs.value, None, -1, [], *where))


def test_a_graph_holds_it_while_the_rows_grow() -> None:
    spec = attention(6, 2, 16, 24)
    kernel = cpu.lower(spec, POOL, POOL)

    def step(query: Tensor, key: tuple[Tensor, Tensor], value: tuple[Tensor, Tensor], start: int, rows: int) -> Tensor:
        return kernel(query * 2, (*key, -1), (*value, -1), start, rows, []).sum(1) + 1

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    inputs = Inputs(spec, Shape(new=1, cached=200))
    pages = inputs.pages(inputs.key), inputs.pages(inputs.value)
    for start in (5, 64, 133, 199):
        given = (inputs.query, *pages, start, start + 1)
        torch.testing.assert_close(compiled(*given), step(*given))
    assert counter.frame_count == 1
    assert "kvpass.attention" in [str(node.target) for node in counter.graphs[0].graph.nodes]


class Block(nn.Module):
    """One layer with grouped heads and learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.where = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 50)

    def forward(self, ids: Tensor) -> Tensor:
        batch, rows = ids.shape
        x = self.embed(ids) + self.where(torch.arange(rows))
        q = self.q(x).view(batch, rows, 4, 8).transpose(1, 2)
        k, v = self.kv(x).view(batch, rows, 2, 2, 8).transpose(1, 3).unbind(2)
        made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(made.transpose(1, 2).reshape(batch, rows, 32))


@torch.no_grad()
def test_inductor_compiles_an_incremental_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, ids = Block().eval(), torch.arange(40).unsqueeze(0)
    fast = kvpass.compile(model, cache=kvpass.Cache(page_size=8))
    fast(ids[:, :9])
    calls: list[tuple[fx.GraphModule, list[Any]]] = []
    plainly = program._without_gradients

    def recorded(module: fx.GraphModule, args: Sequence[Any]) -> Any:
        calls.append((module, list(args)))
        return plainly(module, args)

    monkeypatch.setattr(program, "_without_gradients", recorded)
    for length in (12, 25, 34):
        fast(ids[:, :length])
    module = calls[0][0]
    counter = CompileCounterWithBackend("inductor")
    # Code that ran inside of a compiled call is left alone by Dynamo: a copy has code of its own.
    copy = fx.GraphModule(module, module.graph)
    compiled = torch.compile(copy.forward, backend=counter, fullgraph=True, dynamic=True)
    for same, args in calls:
        assert same is module
        torch.testing.assert_close(compiled(*args), plainly(module, args))
    for graph in counter.graphs:
        assert "kvpass.attention" in [str(node.target) for node in graph.graph.nodes]
