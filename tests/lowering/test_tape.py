"""Each rule of the tape against the op itself, and the tape as a whole: sizes, indices, hosts, memory."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions as torch_sizes

from kvpass.lowering.tape import Operand, OutOfRange, Tape, Untraceable
from kvpass.lowering.tape import plan as planning
from kvpass.lowering.tape import tape as tape_module
from kvpass.lowering.tape.rules import RULES
from kvpass.lowering.tape.trace import trace

aten = torch.ops.aten
N = sympy.Symbol("n", integer=True, positive=True)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def graph_of(call: Callable[[fx.Graph, list[fx.Node]], Any], count: int) -> fx.GraphModule:
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{k}") for k in range(count)]
    graph.output((call(graph, inputs),))
    return fx.GraphModule({}, graph)


def tape_of(module: fx.GraphModule, inputs: list[Tensor], fixed: tuple[int, ...] = ()) -> Tape:
    operands = [
        Operand(fixed=x) if k in fixed else Operand(sizes=tuple(map(sympy.Integer, x.shape)), dtype=x.dtype)
        for k, x in enumerate(inputs)
    ]
    return Tape(module, operands, {})


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def whole(*shape: int, low: int = -5, high: int = 6) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(7))


def truth(*shape: int) -> Tensor:
    return whole(*shape) > 0


X, Y, ROW, COLUMN = floats(2, 3, 20), floats(2, 3, 20).flip(2), floats(20), floats(2, 3, 1)
POSITIVE, WHOLE, COUNT, MASK = X.abs() + 0.1, whole(2, 3, 20), whole(2, 3, 20, low=1), truth(2, 3, 20)

# (op, first arguments, others, keywords)
Case = tuple[Any, list[Any], tuple[Any, ...], dict[str, Any]]
UNARY = (
    *("exp", "exp2", "sin", "cos", "tanh", "erf", "sigmoid", "silu", "relu", "relu6", "neg", "abs", "square", "gelu"),
    *("softplus", "leaky_relu", "clone", "logical_not", "isnan"),
)
BINARY = (
    *("mul.Tensor", "div.Tensor", "eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor"),
    *("maximum", "minimum"),
)


def op(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(aten, base), overload or "default")


CASES: list[Case] = [
    *((op(name), [X], (), {}) for name in UNARY),
    *((op(name), [POSITIVE], (), {}) for name in ("log", "log2", "sqrt", "rsqrt", "reciprocal")),
    (aten.gelu.default, [X], (), {"approximate": "tanh"}),
    (aten.exp.default, [torch.tensor([-200.0, -103.0, -88.0, 0.0, 88.0, 89.0, float("inf"), float("nan")])], (), {}),
    (aten.tanh.default, [torch.tensor([-50.0, -0.6, -1e-8, 0.0, 1e-8, 0.6, 50.0, float("nan")])], (), {}),
    *((op(name), [X, Y], (), {}) for name in BINARY),
    *((op(name), [X, ROW], (), {}) for name in BINARY),
    *((op(name), [COLUMN, ROW], (), {}) for name in BINARY),
    *((op(name), [WHOLE, COUNT], (), {}) for name in BINARY if name != "div.Tensor"),
    *((op(name), [X, WHOLE], (), {}) for name in BINARY),
    *((op(name), [X.bfloat16(), ROW.bfloat16()], (), {}) for name in BINARY),
    *((op(f"{name}.Scalar"), [X], (0.25,), {}) for name in ("eq", "ne", "lt", "le", "gt", "ge", "mul", "div", "add")),
    *((op(f"{name}.Scalar"), [WHOLE], (2,), {}) for name in ("eq", "ne", "lt", "le", "gt", "ge", "mul", "add", "sub")),
    *((op(f"{name}.Scalar"), [WHOLE], (6,), {}) for name in ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__")),
    *((op(f"{name}.Tensor"), [MASK, WHOLE > 0], (), {}) for name in ("__and__", "__or__")),
    (aten.logical_xor.default, [MASK, WHOLE], (), {}),
    (aten.rsub.Tensor, [X, ROW], (), {}),
    (aten.div.Scalar_mode, [WHOLE, 3], (), {"rounding_mode": "floor"}),
    (aten.floor_divide.Scalar, [WHOLE], (3,), {}),
    (aten.pow.Scalar, [10000.0, X], (), {}),
    (aten.clamp_max.default, [X], (0.5,), {}),
    (aten.where.ScalarSelf, [MASK, -1.5, X], (), {}),
    (aten.where.ScalarOther, [MASK, X, float("-inf")], (), {}),
    (aten.where.Scalar, [MASK, 1.5, 2.5], (), {}),
    (aten.full_like.default, [X], (2.5,), {}),
    (aten.new_full.default, [X], ([3, 4], 7.0), {}),
    (aten.fill.Scalar, [X], (3.0,), {}),
    (aten.ones_like.default, [WHOLE], (), {}),
    (aten.new_zeros.default, [X], ([2, 2],), {}),
    (aten.new_ones.default, [X], ([2, 2],), {}),
    (aten.flatten.using_ints, [X.transpose(1, 2)], (1,), {}),
    (aten.view_copy.default, [X], ([6, 20],), {}),
    (aten.type_as.default, [WHOLE, X], (), {}),
    (aten.concat.default, [[X, Y, COLUMN]], (2,), {}),
    (aten.stack.default, [[X, Y]], (-1,), {}),
    (aten.pad.default, [X], ([2, 1],), {"value": 3.0}),
    (aten.mean.default, [X], (), {}),
    *((op(name), [MASK], (), {}) for name in ("any", "all")),
    *((op(f"{name}.dims"), [MASK], ([0, 2],), {}) for name in ("any", "all")),
    (aten._softmax.default, [X], (1, False), {}),
    (aten._log_softmax.default, [X], (1, False), {}),
    (aten.mm.default, [X[0], Y[1].T], (), {}),
    (aten.add.Tensor, [X, Y], (), {"alpha": 2}),
    (aten.sub.Tensor, [X, ROW], (), {"alpha": 3}),
    (aten.add.Tensor, [WHOLE, COUNT], (), {}),
    (aten.add.Tensor, [X], (1e-6,), {}),
    (aten.rsub.Scalar, [X], (1.0,), {}),
    (aten.remainder.Scalar, [WHOLE], (3,), {}),
    (aten.remainder.Tensor, [X, POSITIVE], (), {}),
    (aten.remainder.Scalar, [X], (0.3,), {}),
    (aten.floor_divide.default, [WHOLE], (3,), {}),
    (aten.div.Tensor_mode, [WHOLE], (3,), {"rounding_mode": "trunc"}),
    (aten.div.Tensor_mode, [WHOLE], (3,), {"rounding_mode": "floor"}),
    (aten.div.Tensor, [WHOLE, COUNT], (), {}),
    (aten.bitwise_and.Tensor, [MASK, WHOLE > 0], (), {}),
    (aten.bitwise_or.Tensor, [WHOLE, COUNT], (), {}),
    (aten.bitwise_xor.Tensor, [WHOLE, COUNT], (), {}),
    (aten.bitwise_not.default, [MASK], (), {}),
    (aten.bitwise_not.default, [WHOLE], (), {}),
    (aten.logical_and.default, [MASK, WHOLE], (), {}),
    (aten.logical_or.default, [MASK, WHOLE], (), {}),
    *((aten.pow.Tensor_Scalar, [POSITIVE], (e,), {}) for e in (2, 3, 0.5, -0.5, -1, 1.7)),
    (aten.pow.Tensor_Scalar, [WHOLE], (2,), {}),
    (aten.pow.Tensor_Scalar, [WHOLE], (5,), {}),
    (aten.pow.Tensor_Tensor, [POSITIVE, X], (), {}),
    (aten.clamp.default, [X], (-0.5, 0.5), {}),
    (aten.clamp.default, [X], (None, 0.5), {}),
    (aten.clamp_min.default, [WHOLE], (0,), {}),
    (aten.hardtanh.default, [X], (), {}),
    (aten.where.self, [MASK, X, ROW], (), {}),
    (aten.where.self, [MASK, WHOLE, COUNT], (), {}),
    (aten.masked_fill.Scalar, [X, MASK], (float("-inf"),), {}),
    (aten.masked_fill.Tensor, [X, MASK, torch.tensor(-1e9)], (), {}),
    *((aten._to_copy.default, [X * 3], (), {"dtype": d}) for d in (torch.int64, torch.bool, torch.bfloat16)),
    *(
        (aten._to_copy.default, [WHOLE], (), {"dtype": d})
        for d in (torch.float32, torch.bool, torch.float64, torch.int32)
    ),
    (aten.repeat.default, [X], ([2, 1, 3],), {}),
    (aten.repeat.default, [ROW], ([2, 2],), {}),
    (aten.repeat_interleave.self_int, [X], (3, 1), {}),
    (aten.reshape.default, [X.transpose(1, 2)], ([2, 60],), {}),
    (aten.embedding.default, [floats(11, 8), whole(2, 5, low=0, high=11)], (), {}),
    (aten.index_select.default, [X], (2,), {"index": whole(7, low=0, high=20)}),
    (aten.gather.default, [X], (2,), {"index": whole(2, 3, 4, low=0, high=20)}),
    (aten.tril.default, [floats(2, 7, 9)], (-1,), {}),
    (aten.triu.default, [floats(2, 7, 9)], (2,), {}),
    (aten.constant_pad_nd.default, [X], ([1, 2, 0, 3],), {"value": 4.0}),
    (aten.constant_pad_nd.default, [X], ([-2, 1],), {}),
    *((aten.constant_pad_nd.default, [X], (shift,), {}) for shift in ([1, -1], [-1, 1], [0, 0, 1, -1])),
    *((op(f"{name}.Scalar"), [torch.tensor([0.1, 0.2, 0.3]).bfloat16()], (0.1,), {}) for name in ("eq", "le", "mul")),
    *((op(name), [X], ([-1], True), {}) for name in ("sum.dim_IntList", "mean.dim", "amax", "amin")),
    *((op(name), [X], ([0, 2],), {}) for name in ("sum.dim_IntList", "mean.dim", "amax", "amin")),
    (aten.sum.dim_IntList, [WHOLE], ([1],), {}),
    (aten.sum.dim_IntList, [MASK], ([1],), {}),
    (aten.mean.dim, [X.bfloat16()], ([-1],), {}),
    (aten.any.dim, [MASK], (1,), {}),
    (aten.all.dim, [MASK], (2, True), {}),
    (aten.sum.default, [X], (), {}),
    (aten.cumsum.default, [X], (1,), {}),
    (aten.cumsum.default, [MASK], (2,), {}),
    (aten.softmax.int, [X], (-1,), {}),
    (aten.softmax.int, [X], (1,), {}),
    (aten.log_softmax.int, [X], (-1,), {}),
    (aten.softmax.int, [X.bfloat16()], (-1,), {}),
    (aten._safe_softmax.default, [X.masked_fill(torch.arange(3).view(3, 1) == 1, float("-inf"))], (-1,), {}),
    (aten.softmax.int, [X.masked_fill(MASK, float("-inf"))], (-1,), {}),
    (aten.layer_norm.default, [X], ([20],), {}),
    (aten.layer_norm.default, [X], ([20],), {"weight": ROW, "bias": ROW.flip(0)}),
    (aten.rms_norm.default, [X], ([20],), {"weight": ROW, "eps": 1e-5}),
    (aten.rms_norm.default, [X], ([20],), {}),
    (aten.matmul.default, [X, floats(2, 20, 4)], (), {}),
    (aten.matmul.default, [floats(3, 2, 5, 20), X.transpose(1, 2)[:, None][0]], (), {}),
    (aten.bmm.default, [X, X.transpose(1, 2)], (), {}),
    # axes of one entry have no loop
    (aten.matmul.default, [COLUMN, COLUMN.transpose(1, 2)], (), {}),
    (aten.bmm.default, [COLUMN.transpose(1, 2)[:, :, :1], COLUMN[:, :1]], (), {}),
    *((op(name), [COLUMN], ([-1],), {}) for name in ("sum.dim_IntList", "mean.dim", "amax")),
    (aten.softmax.int, [COLUMN], (-1,), {}),
    (aten.layer_norm.default, [COLUMN], ([1],), {}),
    (aten.rms_norm.default, [COLUMN], ([1],), {}),
]


def name_of(case: Case) -> str:
    target, first, args, kwargs = case
    dtypes = [str(x.dtype)[6:] for x in pytree.tree_leaves(first) if isinstance(x, Tensor)]
    return f"{target}-{dtypes}-{args}-{list(kwargs)}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_rule_is_the_op(case: Case) -> None:
    """Tensors, wherever they are among the arguments, are the inputs of a graph of this one op."""
    target, first, args, kwargs = case
    given: Any = ((*first, *args), kwargs)
    inputs = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]

    def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        left = iter(nodes)
        own: Any = pytree.tree_map(lambda x: next(left) if isinstance(x, Tensor) else x, given)
        return graph.call_function(target, *own)

    tape = tape_of(graph_of(call, len(inputs)), inputs)
    (found,), expected = tape(inputs, []), target(*given[0], **kwargs)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    limit = TOLERANCE.get(expected.dtype, 0.0)
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit, equal_nan=True)
    if target in RULES and not any(x.is_complex() for x in inputs):
        assert not tape.hosts, "it has a rule, and ran as it is written"


def test_made_from_nothing() -> None:
    def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        (x,) = nodes
        ones = graph.call_function(
            aten.full.default, ([2, 3], 2.5), {"dtype": torch.float32, "device": torch.device("cpu")}
        )
        rows = graph.call_function(
            aten.arange.start_step, (1, 7, 2), {"dtype": torch.int64, "device": torch.device("cpu")}
        )
        tall = graph.call_function(aten.mul.Tensor, (ones, rows))
        like = graph.call_function(aten.zeros_like.default, (x,))
        joined = graph.call_function(aten.cat.default, ([tall, x, like], 1))
        return graph.call_function(aten.stack.default, ([joined, joined], 1))

    x = floats(2, 4)
    tape = tape_of(graph_of(call, 1), [x])
    (found,) = tape([x], [])
    tall = torch.full((2, 3), 2.5) * torch.tensor([1, 3, 5])
    joined = torch.cat([tall, x, torch.zeros_like(x)], 1)
    assert torch.equal(found, torch.stack([joined, joined], 1))
    assert not tape.hosts


def test_indices_of_one_axis_and_of_several() -> None:
    table, i, j = floats(5, 6, 7), whole(3, 1, low=-5, high=5), whole(1, 4, low=0, high=6)

    def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        return graph.call_function(aten.index.Tensor, (nodes[0], [nodes[1], nodes[2]]))

    tape = tape_of(graph_of(call, 3), [table, i, j])
    assert torch.equal(tape([table, i, j], [])[0], table[i, j])
    assert not tape.hosts


def test_an_index_out_of_range_is_refused() -> None:
    weight, ids = floats(11, 8), torch.tensor([3, 11])
    module = graph_of(lambda g, n: g.call_function(aten.embedding.default, tuple(n)), 2)
    tape = tape_of(module, [weight, ids])
    with pytest.raises(OutOfRange):
        tape([weight, ids], [])
    assert torch.equal(tape([weight, ids - 1], [])[0], weight[ids - 1])


def test_sizes_are_computed_as_they_are_meant() -> None:
    """Operators of which one stands in another."""
    n, m = sympy.symbols("n m", integer=True, positive=True)
    exprs = [
        torch_sizes.Mod(7, 2 * n), torch_sizes.PythonMod(7 * m, n * m), sympy.Mod(7, 2 * n, evaluate=False),
        2 * torch_sizes.FloorDiv(m + 5, 2 * n), torch_sizes.FloorDiv(7, torch_sizes.FloorDiv(m, n)),
        sympy.Max(n, sympy.Min(m, 3) * 2), sympy.Ne(torch_sizes.Mod(2, 2 * n), 0), torch_sizes.Mod(m, n) * 3 % 5,
    ]  # fmt: skip
    compute = tape_module._numbers([n, m], exprs)
    for a, b in itertools.product((1, 2, 3, 5), (5, 7, 9)):
        expected = [e.subs({n: a, m: b}) for e in exprs]
        assert compute(a, b) == [bool(e) if e.is_Boolean else int(e) for e in expected], (a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("crossed", [False, True], ids=["out in", "in out"])
def test_products_with_bytes(dtype: torch.dtype, rows: int, crossed: bool) -> None:
    """Matrices of bytes are multiplied as they stand, beside one of floats; where another op reads one, it is made."""
    x, scale = floats(rows, 77, dtype=dtype), floats(150, dtype=dtype)
    stored = [whole(*((77, out) if crossed else (out, 77)), low=-128, high=128).to(torch.int8) for out in (150, 33)]
    plain = floats(77, 21, dtype=dtype)

    def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        x, one, two, three, by = nodes
        turned = [w if crossed else graph.call_function(aten.t.default, (w,)) for w in (one, two)]
        first, second = (graph.call_function(aten._to_copy.default, (w,), {"dtype": dtype}) for w in turned)
        y = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.mm.default, (x, first)), by))
        z = graph.call_function(aten.mm.default, (x, second))
        rest = graph.call_function(aten.mm.default, (x, three))
        shown = graph.call_function(aten.slice.Tensor, (graph.call_function(aten.neg.default, (second,)), 0, 0, rows))
        return graph.call_function(aten.cat.default, ([y, z, rest, shown], 1))

    inputs = [x, *stored, plain, scale]
    tape = tape_of(graph_of(call, 5), inputs, fixed=(1, 2, 3, 4))
    assert sum(b.made is not None and b.made.sizes[-1] == 150 for b in tape.buffers) == 2  # products, none a matrix
    (found,) = tape(inputs, [])
    one, two = (w if crossed else w.T for w in stored)

    def parts(kind: torch.dtype) -> list[Tensor]:
        return [x.to(kind) @ one.to(kind) * scale.to(kind), x.to(kind) @ two.to(kind), x.to(kind) @ plain.to(kind)]

    expected = torch.cat([*parts(torch.float64), -two[:rows].double()], 1)
    theirs = (torch.cat([*parts(dtype), -two[:rows].to(dtype)], 1).double() - expected).abs().max()
    assert (found.double() - expected).abs().max() <= 2 * theirs + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("crossed", [False, True], ids=["out in", "in out"])
def test_products_of_few_rows(dtype: torch.dtype, rows: int, crossed: bool) -> None:
    """Several matrices on the same rows, with and without a bias, of sizes that fill no vector."""
    x = floats(rows, 77, dtype=dtype)
    weights = [floats(*((77, out) if crossed else (out, 77)), dtype=dtype) for out in (150, 33)]
    bias = floats(150, dtype=dtype)

    def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        x, one, two, b = nodes
        if crossed:
            first = graph.call_function(aten.addmm.default, (b, x, one))
            second = graph.call_function(aten.mm.default, (x, two))
        else:
            first = graph.call_function(aten.linear.default, (x, one, b))
            second = graph.call_function(aten.linear.default, (x, two))
        return graph.call_function(aten.cat.default, ([first, second], 1))

    inputs = [x, *weights, bias]
    tape = tape_of(graph_of(call, 4), inputs, fixed=(1, 2, 3))
    (found,) = tape(inputs, [])
    assert tape.functions == 2  # one product for both, and the join
    matrices = [w.double() if crossed else w.double().T for w in weights]
    expected = torch.cat([x.double() @ matrices[0] + bias.double(), x.double() @ matrices[1]], 1)
    ours = (found.double() - expected).abs().max()
    theirs = (
        (
            torch.cat([(x @ (w if crossed else w.T)) for w in weights], 1).double()
            - (expected - torch.cat([bias, bias.new_zeros(33)]).double())
        )
        .abs()
        .max()
    )
    assert ours <= 2 * theirs + 1e-6


def test_equal_layers_are_made_once_and_share_memory() -> None:
    weights = [floats(32, 32) / 6 for _ in range(40)]

    def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        x, *layers = nodes
        for layer in layers:
            y = graph.call_function(aten.linear.default, (x, layer))
            x = graph.call_function(aten.add.Tensor, (x, graph.call_function(aten.silu.default, (y,))))
        return x

    inputs = [floats(3, 32), *weights]
    tape = tape_of(graph_of(call, 41), inputs, fixed=tuple(range(1, 41)))
    assert tape.instructions == 120
    assert tape.functions == 3
    assert len(tape.slots) <= 5
    expected = inputs[0]
    for weight in weights:
        expected = expected + torch.nn.functional.silu(expected @ weight.T)
    torch.testing.assert_close(tape(inputs, [])[0], expected, rtol=1e-4, atol=1e-4)


def test_sizes_that_change_from_call_to_call() -> None:
    graph = fx.Graph()
    count, x = graph.placeholder("n"), graph.placeholder("x")
    rows = graph.call_function(
        aten.arange.start_step, (0, count, 1), {"dtype": torch.int64, "device": torch.device("cpu")}
    )
    later = graph.call_function(aten.slice.Tensor, (x, 0, graph.call_function(operator.sub, (count, 2)), count))
    graph.output(
        (
            graph.call_function(aten.add.Tensor, (x, graph.call_function(aten.unsqueeze.default, (rows, 1)))),
            later,
            count,
        )
    )
    module = fx.GraphModule({}, graph)
    tape = Tape(module, [Operand(number=N), Operand(sizes=(N, sympy.Integer(5)))], {N: 6})
    for n in (6, 3, 50, 4):
        x = torch.randn(n, 5)
        assert tape.suits([n, x], [n], None)
        full, end, number = tape([n, x], [n])
        assert torch.equal(full, x + torch.arange(n).unsqueeze(1))
        assert torch.equal(end, x[-2:])
        assert number == n


def test_a_weight_that_is_turned_in_its_memory_is_another_operand() -> None:
    x, weight = floats(3, 8), floats(8, 8)
    tape = tape_of(graph_of(lambda g, i: g.call_function(aten.mm.default, tuple(i)), 2), [x, weight], (1,))
    with tape.lock:
        assert tape.suits([x, weight], [], None)
        weight.data = weight.data.T
        assert not tape.suits([x, weight], [], object())


def test_what_has_no_rule_runs_as_it_is_written() -> None:
    def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        doubled = graph.call_function(aten.mul.Tensor, (nodes[0], 2.0))
        best = graph.call_function(aten.topk.default, (doubled, 3))
        values = graph.call_function(operator.getitem, (best, 0))
        return graph.call_function(aten.exp.default, (values,))

    x = floats(4, 9)
    tape = tape_of(graph_of(call, 1), [x])
    assert [host.target for host in tape.hosts] == [aten.topk.default]
    torch.testing.assert_close(tape([x], [])[0], (2 * x).topk(3).values.exp())


@pytest.mark.parametrize("target", [aten.floor_divide.default, aten.remainder.Tensor])
def test_a_division_by_zero_raises_and_ends_no_process(target: Any) -> None:
    inputs = [WHOLE, COUNT.clone()]
    tape = tape_of(graph_of(lambda g, n: g.call_function(target, tuple(n)), 2), inputs)
    assert torch.equal(tape(inputs, [])[0], target(*inputs))
    inputs[1][0, 0, 0] = 0
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        tape(inputs, [])


def test_complex_numbers_run_as_they_are_written() -> None:
    def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        x, turn = (graph.call_function(aten.view_as_complex.default, (node,)) for node in nodes)
        both = graph.call_function(aten.view_as_real.default, (graph.call_function(aten.mul.Tensor, (x, turn)),))
        return graph.call_function(aten.exp.default, (graph.call_function(aten.select.int, (both, 2, 1)),))

    inputs = [floats(4, 6, 2), floats(4, 6, 2).flip(0)]
    tape = tape_of(graph_of(call, 2), inputs)
    expected = torch.view_as_real(torch.view_as_complex(inputs[0]) * torch.view_as_complex(inputs[1]))[..., 1].exp()
    torch.testing.assert_close(tape(inputs, [])[0], expected)


def test_memory_that_an_op_gives_back_is_not_taken_by_others() -> None:
    """An op whose result is its operand, though it was another tensor when it was traced."""

    def same(x: Tensor) -> Tensor:
        return x.clone() if x.device.type == "meta" else x

    def call(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        (x,) = nodes
        kept = graph.call_function(same, (graph.call_function(aten.mul.Tensor, (x, 2.0)),))
        for _ in range(4):
            x = graph.call_function(aten.add.Tensor, (x, 1.0))
        return graph.call_function(aten.add.Tensor, (kept, x))

    x = floats(3, 5)
    torch.testing.assert_close(tape_of(graph_of(call, 1), [x])([x], [])[0], 2 * x + (x + 4))


def test_an_op_that_writes_into_an_operand_is_no_part_of_a_tape() -> None:
    for target, args in ((aten.add_.Tensor, (2.0,)), (aten.exp_.default, ())):
        module = graph_of(lambda g, n, target=target, args=args: g.call_function(target, (n[0], *args)), 1)  # type: ignore[misc]
        with pytest.raises(Untraceable, match="writes into an operand"):
            tape_of(module, [floats(3)])


def test_an_op_that_needs_contents_is_no_part_of_a_tape() -> None:
    module = graph_of(lambda g, n: g.call_function(aten.nonzero.default, tuple(n)), 1)
    with pytest.raises(Untraceable):
        tape_of(module, [floats(3)])


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES[aten.silu.default]
    monkeypatch.setitem(planning.RULES, aten.silu.default, lambda w: right(w).replace("sigmoid", "hyperbolic"))
    with pytest.raises(AssertionError):
        test_rule_is_the_op((aten.silu.default, [X], (), {}))


def test_an_op_is_traced_for_each_type_size_and_number() -> None:
    """What it made before is what it makes only where nothing differs that it can depend on."""
    whole_numbers = torch.arange(6).reshape(2, 3)
    inputs = [floats(2, 3), floats(2, 3, dtype=torch.bfloat16), floats(3, 2), floats(2, 3), whole_numbers]

    def calls(graph: fx.Graph, given: list[fx.Node]) -> Any:
        made = [graph.call_function(aten.neg.default, (x,)) for x in given]
        made += [graph.call_function(aten.mul.Tensor, (given[4], by)) for by in (2, 2.0, True)]
        made += [graph.call_function(aten.full.default, ([2, 3], by)) for by in (1, True, 1.0)]
        made += [graph.call_function(aten.slice.Tensor, (given[0], 1, 0, to)) for to in (1, 2, 1)]
        made += [graph.call_function(aten.transpose.int, (made[0], *axes)) for axes in ((0, 1), (1, 1), (-2, -1))]
        return tuple(made)

    module = graph_of(calls, len(inputs))
    operands = [Operand(sizes=tuple(map(sympy.Integer, x.shape)), dtype=x.dtype) for x in inputs]
    values = trace(module, operands, {}).values
    (results,) = next(iter(module.graph.find_nodes(op="output"))).args[0]
    for node, expected in zip(results, module(*inputs)[0], strict=True):
        found = values[node]
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride()), node
