"""Many rows at once: what treats each row for itself goes through them block by block, and nothing else does."""

from __future__ import annotations

import random
from typing import Any

import pytest
import sympy
import torch
from torch import fx

from kvpass.lowering.tape import Operand, OutOfRange, Tape, products
from kvpass.lowering.tape import tape as tape_module
from kvpass.lowering.tape.plan import Host, Instruction, Planner

aten = torch.ops.aten
N, B = (sympy.Symbol(name, integer=True, positive=True) for name in ("n", "b"))
HEADS, SIZE = 3, 8
WIDTH = HEADS * SIZE
LENGTHS = (17, 16, 31, 50)


class Text:
    """A random graph over values ``[batch, rows, 24]``: rows that are treated each for itself, and rows that mix."""

    def __init__(self, seed: int) -> None:
        self.random, self.graph = random.Random(seed), fx.Graph()
        draw = torch.Generator().manual_seed(seed)
        self.weights = [torch.randn(WIDTH, WIDTH, generator=draw) / 5 for _ in range(2)]
        self.gain = torch.randn(WIDTH, generator=draw)
        self.count, self.x, self.places, *self.held = (
            self.graph.placeholder(name) for name in ("n", "x", "places", "w0", "w1", "gain")
        )
        self.values = [self.x]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def one(self) -> fx.Node:
        return self.random.choice(self.values[-4:])

    def heads(self, x: fx.Node) -> fx.Node:
        return self.call(aten.transpose.int, self.call(aten.view.default, x, [-1, self.count, HEADS, SIZE]), 1, 2)

    def joined(self, x: fx.Node) -> fx.Node:
        return self.call(aten.reshape.default, self.call(aten.transpose.int, x, 1, 2), [-1, self.count, WIDTH])

    def turned(self) -> fx.Node:
        """Rotary embeddings, in the layout of heads."""
        x = self.heads(self.one())
        first, second = (self.call(aten.slice.Tensor, x, 3, a, a + SIZE // 2) for a in (0, SIZE // 2))
        half = self.call(aten.cat.default, [self.call(aten.neg.default, second), first], -1)
        return self.joined(self.call(aten.add.Tensor, x, half))

    def normed(self) -> fx.Node:
        x = self.one()
        mean = self.call(aten.mean.dim, self.call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
        by = self.call(aten.rsqrt.default, self.call(aten.add.Tensor, mean, 1e-5))
        return self.call(aten.mul.Tensor, self.call(aten.mul.Tensor, x, by), self.held[2])

    def make(self) -> fx.Node:
        """One more value."""
        ways = {
            "pointwise": lambda: self.call(aten.silu.default, self.one()),
            "sum": lambda: self.call(aten.add.Tensor, self.one(), self.one()),
            "product": lambda: self.call(aten.linear.default, self.one(), self.random.choice(self.held[:2])),
            "norm": self.normed,
            "softmax": lambda: self.call(aten.softmax.int, self.one(), -1),
            "rotary": self.turned,
            "heads": lambda: self.joined(self.call(aten.tanh.default, self.heads(self.one()))),
            "dense": lambda: self.joined(self.call(aten.contiguous.default, self.heads(self.one()))),
            "running": lambda: self.call(aten.tanh.default, self.call(aten.cumsum.default, self.one(), 1)),
            "turned around": lambda: self.call(aten.index_select.default, self.one(), 1, self.places),
            "shifted": lambda: self.call(aten.constant_pad_nd.default, self.one(), [0, 0, 1, -1]),
            "over rows": lambda: self.call(
                aten.sub.Tensor, x := self.one(), self.call(aten.amax.default, x, [1], True)
            ),
        }  # fmt: skip
        return ways[self.random.choice(list(ways))]()

    def module(self, count: int) -> fx.GraphModule:
        for _ in range(count):
            self.values.append(self.make())
        self.graph.output(tuple(self.values[-3:]))
        return fx.GraphModule({}, self.graph)

    def inputs(self, batch: int, rows: int) -> list[Any]:
        x = torch.randn(batch, rows, WIDTH, generator=torch.Generator().manual_seed(rows))
        return [rows, x, torch.arange(rows - 1, -1, -1), *self.weights, self.gain]

    def tape(self, module: fx.GraphModule, batch: int) -> Tape:
        several = batch > 1
        sizes = (B if several else sympy.S.One, N, sympy.Integer(WIDTH))
        operands = [Operand(number=N), Operand(sizes=sizes), Operand(sizes=(N,), dtype=torch.int64)]
        operands += [Operand(fixed=x) for x in (*self.weights, self.gain)]
        hints = {N: 20} | ({B: batch} if several else {})
        return Tape(module, operands, hints, N)


def check(seed: int, batch: int, ops: int = 24) -> Tape:
    text = Text(seed)
    module = text.module(ops)
    tape = text.tape(module, batch)
    for rows in LENGTHS:
        inputs, numbers = text.inputs(batch, rows), [rows, batch] if batch > 1 else [rows]
        assert tape.suits(inputs, numbers, None)
        for found, expected in zip(tape(inputs, numbers), module(*inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return tape


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SEEDS = [pytest.param(seed, marks=() if seed < 6 else pytest.mark.soak) for seed in range(60)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("two_threads")
def test_rows_that_go_together_and_rows_that_mix(seed: int) -> None:
    check(seed, batch=1 + seed % 3)


def runs_of(tape: Tape) -> list[int]:
    return [int(together) for _, _, together in tape._table if together]


def test_neighbours_go_through_the_rows_together() -> None:
    """A norm, an activation and a residual sum: one walk, and the memory of two values of a row."""
    text = Text(0)
    x = text.x
    for _ in range(5):
        text.values = [x]
        x = text.call(aten.add.Tensor, x, text.call(aten.silu.default, text.normed()))
    text.graph.output((x,))
    tape = text.tape(fx.GraphModule({}, text.graph), 1)
    assert runs_of(tape) == [8 * 5]
    assert len(tape.slots) <= 5
    assert not tape.hosts


def test_an_index_out_of_range_ends_a_call_of_many_rows() -> None:
    graph = fx.Graph()
    ids, weight = graph.placeholder("ids"), graph.placeholder("weight")
    found = graph.call_function(aten.index.Tensor, (weight, [ids]))
    graph.output((graph.call_function(aten.exp.default, (found,)),))
    weight_ = torch.randn(11, 4)
    operands = [Operand(sizes=(N,), dtype=torch.int64), Operand(fixed=weight_)]
    tape = Tape(fx.GraphModule({}, graph), operands, {N: 20}, N)
    assert runs_of(tape) == [2]
    places = torch.arange(40) % 11
    torch.testing.assert_close(tape([places, weight_], [40])[0], weight_[places].exp())
    places[33] = 11
    with pytest.raises(OutOfRange):
        tape([places, weight_], [40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [17, 48, 49, 100])
@pytest.mark.parametrize("crossed", [False, True], ids=["out in", "in out"])
@pytest.mark.parametrize("stored", ["floats", "bytes"])
def test_products_of_many_rows(dtype: torch.dtype, rows: int, crossed: bool, stored: str) -> None:
    """By the kernel or by PyTorch, with and without a bias: an error of at most twice that of PyTorch."""
    draw = torch.Generator().manual_seed(rows)
    x, bias = torch.randn(rows, 77, generator=draw).to(dtype), torch.randn(150, generator=draw).to(dtype)
    shape = (77, 150) if crossed else (150, 77)
    floats = torch.randn(shape, generator=draw).to(dtype)
    weight = floats if stored == "floats" else torch.randint(-128, 128, shape, generator=draw).to(torch.int8)
    turned = weight if crossed else weight.T
    for given in (None, bias):
        out = torch.empty(rows, 150, dtype=dtype)
        products.multiply(x, turned, given, out)
        exact = x.double() @ turned.double() + (0 if given is None else given.double())
        theirs = torch.addmm(torch.zeros(150, dtype=dtype) if given is None else given, x, turned.to(dtype))
        assert (out.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max() + 1e-6


@pytest.mark.parametrize("shape", [(N, 24), (1, 24), (24,), ()])
@pytest.mark.parametrize("holes", [False, True])
def test_what_is_added_to_a_product(shape: tuple[Any, ...], holes: bool) -> None:
    """A vector, a row of a matrix, a matrix, one number; every other entry of one."""
    graph = fx.Graph()
    x, weight, added = (graph.placeholder(name) for name in ("x", "weight", "added"))
    if holes and shape:
        added = graph.call_function(aten.slice.Tensor, (added, -1, 0, 48, 2))
    graph.output((graph.call_function(aten.addmm.default, (added, x, weight)),))
    module = fx.GraphModule({}, graph)
    weight_ = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    wide = [sympy.sympify(size) for size in shape]
    if holes and shape:
        wide[-1] = sympy.Integer(48)
    constant = not any(size == N for size in wide)
    given = torch.randn([int(size) if constant else 1 for size in wide]) if constant else None
    operands = [Operand(sizes=(N, sympy.Integer(16))), Operand(fixed=weight_)]
    operands.append(Operand(fixed=given) if given is not None else Operand(sizes=tuple(wide)))
    tape = Tape(module, operands, {N: 20}, N)
    for rows in (17, 60):
        own = given if given is not None else torch.randn([rows if size == N else int(size) for size in wide])
        inputs = [torch.randn(rows, 16), weight_, own]
        torch.testing.assert_close(tape(inputs, [rows])[0], module(*inputs)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("streams", [True, False])
def test_both_ways_are_taken(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_most_streamed", lambda dtype: float("inf") if streams else 0)
    test_products_of_many_rows(torch.bfloat16, 17, False, "bytes")
    taken: list[int] = []
    right = products.kernel
    monkeypatch.setattr(products, "kernel", lambda *a: taken.append(1) or right(*a))
    test_products_of_many_rows(torch.float32, 17, True, "floats")
    assert bool(taken) is streams


# -- planted faults ---------------------------------------------------------------------------------------------------


def fails(seeds: range) -> bool:
    for seed in seeds:
        try:
            check(seed, batch=1)
        except AssertionError:
            return True
    return False


def test_a_walk_past_a_row_that_is_not_made_yet_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tape_module._runs

    def careless(steps: Any) -> Any:
        for step in steps:
            if isinstance(step, Instruction):
                step.across = frozenset()
        return right(steps)

    monkeypatch.setattr(tape_module, "_runs", careless)
    assert fails(range(6))


def test_memory_whose_rows_stand_elsewhere_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "rows_at", lambda self, made: sympy.expand(made.count * made.dtype.itemsize))
    assert fails(range(12))


def test_an_op_over_rows_that_is_taken_for_one_of_a_row_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "_in_its_row", lambda self, access: True)
    assert fails(range(6))


def test_products_are_made_in_memory_of_the_tape() -> None:
    hosts = [step for seed in range(3) for step in check(seed, 1).hosts]
    assert any(isinstance(step, Host) and step.target is products.multiply and step.out == () for step in hosts)
