"""The differential check at compile time: the rewritten graph against the captured one, on the real weights.

The proof says that the rewriting is right; this looks. A short text made of the call's own rows is fed in random chunks
through a small cache of its own, and after every chunk the outputs are compared with the model on the whole prefix.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from kvpass import errors
from kvpass.analysis.facts import Fact, index, leaf_name
from kvpass.analysis.identity import identities
from kvpass.analysis.sweep import Analyzed, source_of, sym
from kvpass.cache import Cache, SlotSpec
from kvpass.ir import Captured, Role
from kvpass.kernels.reference import evaluate
from kvpass.runtime.compare import difference, limits
from kvpass.runtime.keys import Keys
from kvpass.runtime.program import run
from kvpass.transforms.rewrite import Incremental

_ROWS = (12, 40)  # at least and at most so many rows are fed
_MORE = 5  # rows behind those of a call
_PAGE = 16


class PlainFailed(Exception):
    """The model as it was written raises on the caller's rows, ids out of range for one: nothing can be compared."""


def verify(
    captured: Captured,
    incremental: Incremental,
    plain: Callable[..., Any],
    written: Callable[..., Any],
    real: Sequence[Any],
    seed: int = 0,
) -> None:
    """Compare the two graphs on random chunks.

    Args:
        plain: the model as Dynamo captured it.
        written: the captured graph. It is what is compared with where the context brings rows, since no shorter text
            goes with that context.
        real: the arguments of the call that is compiled.

    Raises:
        VerifyMismatch: an output differs by more than `TOLERANCE`.
        PlainFailed: the model itself raises on rows of this call.
    """
    rng = random.Random(seed)
    if captured.aligned is not None:
        real = _with_rows_of_context(captured, plain, written, real)
        plain = written
    try:
        _compared(captured, incremental, plain, _Texts(captured, real, rng))
    except PlainFailed:  # a number of the caller's may speak of rows that a shorter text does not have
        _compared(captured, incremental, plain, _Texts(captured, real, rng, whole=True))


def _compared(captured: Captured, incremental: Incremental, plain: Callable[..., Any], texts: _Texts) -> None:
    plan = incremental.plan
    keys = Keys(captured, plan)
    held = (texts.rows + keys.lead(texts.prefix(2))) // _PAGE + 2
    room = held * _PAGE * texts.batch * 2 * sum(s.bytes_per_row for s in plan.slots)
    cache = Cache(max(room, 1 << 16), page_size=_PAGE, poison=True)
    names = identities(plan.analyzed, {name: name.encode() for name in captured.constants})
    table = cache.register(
        [SlotSpec(names[s.node], s.before, s.after, s.dtype, s.node.meta["val"].device, s.name) for s in plan.slots]
    )
    allowed = limits(captured.module.graph)
    for end in texts.chunks(keys.last(texts.prefix(texts.rows))):
        args = texts.prefix(end)
        rows, width = keys.rows(args)
        with torch.no_grad():
            try:
                expected = plain(*args)
            except Exception as error:
                raise PlainFailed() from error
            with cache.begin(table, rows, width, b"", limit=end + keys.lead(args) - keys.last(args)) as lease:
                found = run(incremental, args, lease)
        meaningful = _meaningful(plan.analyzed, args)
        for k, (a, b) in enumerate(zip(found, expected, strict=True)):
            problem = difference(a, b, allowed[k], meaningful.get(k))
            if problem:
                node = plan.analyzed.outputs[k]
                detail = f"output {k} at {end} rows, {lease.start} of them cached: {problem}"
                raise errors.VerifyMismatch(detail=detail).at(node.name, source_of(node))


def _with_rows_of_context(
    captured: Captured, plain: Callable[..., Any], written: Callable[..., Any], real: Sequence[Any]
) -> list[Any]:
    """The arguments of a call and what the context brings for each row, compared on the call as it is.

    Raises:
        VerifyMismatch: the captured graph, of these rows, answers otherwise than the model.
        PlainFailed: the model itself raises.
    """
    assert captured.aligned is not None
    values = dict(_sizes(captured, real))
    nodes = captured.module.graph.find_nodes(op="placeholder")
    args = [
        _number(node, value, values) if given.role is Role.SYMBOL else value
        for given, node, value in zip(captured.inputs, nodes, real, strict=False)
    ]
    with torch.no_grad():
        try:
            expected = plain(*args)
        except Exception as error:
            raise PlainFailed() from error
        rows = [*args, *captured.aligned(*args)]
        found = written(*rows)
    allowed = limits(captured.module.graph)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        problem = difference(a, b, allowed[k], None)
        if problem:
            raise errors.VerifyMismatch(detail=f"output {k}, of what the context brings row by row: {problem}")
    return rows


def _sizes(captured: Captured, real: Sequence[Any]) -> Iterator[tuple[sympy.Basic, int]]:
    """What the sizes were in the call, read off its tensors: reading a SymInt would specialise the graph."""
    nodes = captured.module.graph.find_nodes(op="placeholder")
    for node, value in zip(nodes, real, strict=False):
        if isinstance(value, torch.Tensor):
            for size, number in zip(node.meta["val"].shape, value.shape, strict=True):
                yield sym(size), int(number)


def _number(node: fx.Node, value: Any, values: dict[sympy.Basic, int]) -> Any:
    known = sympy.sympify(sym(node.meta["val"]).xreplace(values))
    # A number of the caller's has no tensor to be read off.
    return int(known) if known.is_number else getattr(getattr(value, "node", None), "hint", value)


class _Texts:
    """Prefixes of a text whose rows are drawn from the rows of the call.

    Args:
        whole: all have at least the rows of the call.
    """

    def __init__(self, captured: Captured, real: Sequence[Any], rng: random.Random, whole: bool = False) -> None:
        self.captured, self.real, self.rng = captured, real, rng
        first = captured.of(Role.SEQUENCE)[0]
        held = int(real[first.index].shape[first.seq_axes[0]])
        self.least = held if whole else 2
        wanted = held if captured.of(Role.FORM) else held + _MORE if whole else max(held, _ROWS[0])
        most = wanted if whole else min(wanted, _ROWS[1])
        self.rows = next((rows for rows in range(most, self.least - 1, -1) if captured.takes(rows)), held)
        self.pick = [k if k < held else rng.randrange(held) for k in range(self.rows)]
        self.batch = Keys(captured).batch(real)
        self.values = dict(_sizes(captured, real))

    def chunks(self, tail: int) -> list[int]:
        """Ascending prefix lengths: one long first chunk, single rows, and several at once.

        A text that has one length only is fed twice.
        """
        least = max(self.least, tail)
        taken = [end for end in range(least, self.rows) if self.captured.takes(end)] + [self.rows]
        first = self.rng.choice([end for end in taken if end <= max(least, self.rows // 2)] or taken)
        ends = {first, self.rows, first + 1, first + 4}
        fed = [end for end in taken if end in ends]
        return fed if len(fed) > 1 else fed * 2

    def prefix(self, end: int) -> list[Any]:
        nodes = [n for n in self.captured.module.graph.nodes if n.op == "placeholder"]
        rows = torch.tensor(self.pick[:end])
        args: list[Any] = []
        for given, node, value in zip(self.captured.inputs, nodes, self.real, strict=True):
            if given.role is Role.SYMBOL:
                length = sym(node.meta["val"]) == self.captured.seq
                args.append(end if length else _number(node, value, self.values))
            elif given.role in (Role.SEQUENCE, Role.FORM):
                for axis in given.seq_axes:
                    value = value.detach().index_select(axis, rows.to(value.device))
                args.append(value)
            else:
                args.append(value)
        return args


def _meaningful(analyzed: Analyzed, args: Sequence[Any]) -> dict[int, torch.Tensor]:
    """By output, a mask of the entries that mean something where padding leaves rows without keys."""
    out = {}
    for k, node in enumerate(analyzed.outputs):
        fact = analyzed.fact(node) if isinstance(node, fx.Node) and node in analyzed.steps else None
        if fact is None or fact.valid == sympy.true:
            continue
        values = _Values(analyzed.captured.module, args)
        names = {leaf.func.__name__ for leaf in fact.valid.atoms(AppliedUndef)}
        leaves = {n: values.of(n) for n in analyzed.steps if leaf_name(n.name) in names}
        out[k] = _mask(analyzed, fact, values.of(node), leaves, values)
    return out


class _Values(fx.Interpreter):
    """All values of the captured graph for one call."""

    def __init__(self, module: fx.GraphModule, args: Sequence[Any]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.arguments = args
        with torch.no_grad():
            self.run(*args)

    def of(self, node: fx.Node) -> Any:
        return self.env[node]


def _mask(
    analyzed: Analyzed, fact: Fact, value: torch.Tensor, leaves: dict[fx.Node, Any], values: _Values
) -> torch.Tensor:
    captured = analyzed.captured
    batch = Keys(captured).batch(values.arguments)
    length = Keys(captured).length(values.arguments)
    sizes = {captured.seq: sympy.Integer(length), captured.batch: sympy.Integer(batch)}
    shape = [int(atom.size.xreplace(sizes)) for atom in fact.atoms[: fact.real]]
    symbols: dict[sympy.Basic, Any] = {captured.seq: length, captured.batch: batch}
    for k in range(len(fact.atoms)):
        view = [-1 if j == k else 1 for j in range(fact.real)]
        symbols[index(k)] = torch.arange(shape[k]).view(view) if k < fact.real else 0
    flat = {
        leaf_name(node.name): leaf.reshape([int(atom.size.xreplace(sizes)) for atom in analyzed.fact(node).atoms])
        for node, leaf in leaves.items()
    }
    kept = evaluate(fact.valid, symbols, flat)
    return torch.as_tensor(kept).expand(shape).reshape(value.shape)
