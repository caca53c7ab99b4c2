"""From what Dynamo hands over to a `Captured` graph: functional, in high-level ATen ops, with symbolic sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from kvpass import errors
from kvpass.analysis.buffers import closed_form, entries_of
from kvpass.analysis.sweep import arguments, dim_of, sym
from kvpass.frontend.aligned import as_long_as, with_rows_of_context
from kvpass.frontend.export import exported, source_of, value_of
from kvpass.frontend.higher_order import expanded
from kvpass.frontend.vmap import unmapped
from kvpass.ir import Captured, Input, Role, holds
from kvpass.transforms.behind import turned
from kvpass.transforms.normalise import without_empty
from kvpass.transforms.spell import JOINS, PADS


def capture(gm: fx.GraphModule, real: Sequence[Any]) -> Captured:
    """The first of `captures`: what most likely grows is the sequence."""
    return next(captures(gm, real))


def captures(gm: fx.GraphModule, real: Sequence[Any]) -> Iterator[Captured]:
    """Trace Dynamo's graph to functional ATen ops and say what each input is, once for each axis that may grow, for
    each number of entries that may stand before the rows on one axis with them, for what a vector as long as the
    batch may be (entries that all sequences share, or one of each), and for a context that may bring rows.

    A model of an encoder and a decoder has two such axes, and what stands before the rows may be a prefix, or the
    padding of a convolution. The proof says which of them it is.

    Args:
        gm: Dynamo's graph; its placeholders carry fake tensors and sources.
        real: the arguments of the call that is being compiled.

    Raises:
        Refusal: the graph has a fixed length, lives on several devices, writes into an input, or has no sequence axis.
    """
    places = [n for n in gm.graph.nodes if n.op == "placeholder"]
    fakes = [value_of(n) for n in places]
    _one_device([f for f in fakes if isinstance(f, torch.Tensor)])
    constant = [is_constant(n, r) for n, r in zip(places, real, strict=True)]
    _tie_lengths(fakes, constant)
    readings, unread = _readings(fakes, constant, _answered(gm))
    if unread is not None and not readings:
        raise unread
    gm, scalars = _with_numbers(unmapped(expanded(gm)), places, real)
    module = exported(gm, fakes)
    without_empty(module.graph)
    fixed, read = _numbers(fakes), False
    for reading in readings:
        try:
            if reading.seq in fixed:
                raise fixed[reading.seq][1]
            described = _described(copied(module), places, fakes, real, constant, reading)
        except errors.Refusal as refusal:
            unread = unread if reading.rows_first else unread or refusal.kept()
            continue
        read = read or not reading.rows_first
        first, *others = _leads(described.module, reading.seq)
        yield replace(described, scalars=scalars, lead=first)
        for lead in others:
            described = _described(copied(module), places, fakes, real, constant, reading)
            yield replace(described, scalars=scalars, lead=lead)
        lengths = as_long_as(reading.seq, _guards(fakes))
        if lengths:
            described = _described(copied(module), places, fakes, real, constant, reading)
            apart = with_rows_of_context(described, lengths)
            if apart is not None:
                yield replace(apart, scalars=scalars)
    if unread is not None and not read:
        raise unread


@dataclass(frozen=True)
class _Reading:
    """What the axes of the inputs are taken for.

    Attributes:
        rows_first: tokens are ``[S, B]``.
        apart: a float vector as long as the batch has an entry for each sequence.
    """

    seq: sympy.Symbol
    rows_first: bool
    apart: bool


def _readings(
    fakes: Sequence[Any], constant: Sequence[bool], answers: Sequence[torch.Tensor]
) -> tuple[list[_Reading], errors.Refusal | None]:
    """All of them, the likeliest first, and why none is of tokens ``[B, S]``, where that is so."""
    found, why = list[tuple[sympy.Symbol, bool]](), None
    try:
        found = [(seq, False) for seq in _sequence_symbols(fakes, constant, answers)]
    except errors.Refusal as refusal:
        why = refusal.kept()
    for seq in _symbols_before_the_batch(fakes, constant):  # which says more of what is given than the other reading
        place = next((k for k, other in enumerate(found) if other == (seq, False)), len(found))
        found.insert(place, (seq, True))
    either, one = (False, True), (False,)
    return [
        _Reading(seq, rows_first, apart)
        for seq, rows_first in found
        for apart in (either if _undecided(fakes, constant, seq, rows_first) else one)
    ], why


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph, to be rewritten in place."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def _answered(gm: fx.GraphModule) -> list[Any]:
    """The tensors that the graph returns, as Dynamo has them."""
    nodes = pytree.tree_leaves(gm.graph.output_node().args)
    values = [value_of(n) for n in nodes if isinstance(n, fx.Node)]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _with_numbers(
    gm: fx.GraphModule, places: Sequence[fx.Node], real: Sequence[Any]
) -> tuple[fx.GraphModule, dict[int, Any]]:
    """The graph with the numbers that ``item`` reads from 0-d inputs written in.

    With ``dynamic=True`` Dynamo passes a Python float (an epsilon, a scale) as a tensor and guards nothing: whoever
    runs the graph compares.
    """
    index = {place.name: k for k, place in enumerate(places)}
    items = [n for n in gm.graph.nodes if n.op == "call_method" and n.target == "item" and n.args[0].name in index]
    if not items:
        return gm, {}
    numbers = {n.name: (index[n.args[0].name], real[index[n.args[0].name]].item()) for n in items}
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        made[node] = numbers[node.name][1] if node.name in numbers else graph.node_copy(node, made.__getitem__)
    return fx.GraphModule(gm, graph), dict(numbers.values())


def _one_device(tensors: Sequence[torch.Tensor]) -> None:
    kinds = sorted({t.device.type for t in tensors if t.dim() > 0} or {"cpu"})
    if len(kinds) > 1 or kinds[0] not in ("cpu", "cuda"):
        raise errors.UnsupportedDevice(detail=" and ".join(kinds))


def is_constant(node: fx.Node, real: Any) -> bool:
    """Tensors that hang on a module are known by identity; what the caller passes is known by content."""
    if isinstance(real, torch.nn.Parameter):
        return True
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None or not isinstance(real, torch.Tensor):
        return False
    guard = source.guard_source
    return bool(
        guard.is_unspecialized_nn_module() or guard.is_specialized_nn_module() or "Param" in type(source).__name__
    )


def _tie_lengths(fakes: Sequence[Any], constant: Sequence[bool]) -> None:
    """Guard that tokens, masks and positions are of one length, and that all inputs are of one batch, where it is so
    in this call.

    A model that only gathers from its mask does not say so itself, and its rows would be two sequences. Comparing the
    two symbols makes it a guard of Dynamo's: other sizes are another compilation.
    """
    given = [f for f, fixed in zip(fakes, constant, strict=True) if not fixed and isinstance(f, torch.Tensor)]
    tables = [f for f in given if _is_table(f)]
    for other in tables[1:]:
        _tie(tables[0].shape[1], other.shape[1])
    for other in given if tables else ():
        if other.dim() > 1:
            _tie(tables[-1].shape[0], other.shape[0])


def _tie(a: Any, b: Any) -> None:
    symbols = all(isinstance(sym(size), sympy.Symbol) for size in (a, b))
    if symbols and sym(a) != sym(b) and a.node.hint == b.node.hint:
        bool(a == b)


def _is_table(fake: Any) -> bool:
    """``[B, S]``: tokens, a padding mask, positions."""
    return isinstance(fake, torch.Tensor) and fake.dim() == 2 and isinstance(sym(fake.shape[1]), sympy.Symbol)


def _sequence_symbols(
    fakes: Sequence[Any], constant: Sequence[bool], answers: Sequence[torch.Tensor]
) -> list[sympy.Symbol]:
    """The symbols of the axes whose length may grow, the likeliest first.

    That is one that the first answer has, then the second axis of an integer input.
    """
    votes: dict[sympy.Symbol, int] = {}
    for fake, fixed in zip(fakes, constant, strict=True):
        if fixed or not isinstance(fake, torch.Tensor):
            continue
        for axis, size in enumerate(fake.shape):
            expr = sym(size)
            if isinstance(expr, sympy.Symbol) and (axis > 0 or fake.dim() == 1):
                votes[expr] = votes.get(expr, 0) + (100 if axis == 1 and not fake.is_floating_point() else 1)
    found = {s for answer in answers[:1] for s in map(sym, answer.shape[1:]) if s in votes}
    votes |= {s: votes[s] + 10_000 for s in found}
    lengths = {int(sym(f.shape[1])) for f, c in zip(fakes, constant, strict=True) if _looks_like_ids(f, c)}
    one_row = lengths == {1} and not found and max(votes.values(), default=0) < 100  # behind an encoder of floats
    if votes and not one_row:
        return sorted(votes, key=lambda s: (votes[s], s.name), reverse=True)
    raise errors.SingleRow() if lengths == {1} else _static_length(fakes, lengths)


def _symbols_before_the_batch(fakes: Sequence[Any], constant: Sequence[bool]) -> list[sympy.Symbol]:
    """The symbols of the first axes of integer inputs ``[S, B]``."""
    given = [f for f, fixed in zip(fakes, constant, strict=True) if not fixed and isinstance(f, torch.Tensor)]
    sizes = [sym(f.shape[0]) for f in given if f.dim() == 2 and not f.is_floating_point()]
    return list(dict.fromkeys(size for size in sizes if size.is_Symbol))


def _static_length(fakes: Sequence[Any], lengths: set[int]) -> errors.StaticLength:
    """Why a length is fixed: nobody said that it varies, or the model made a number of it."""
    found = (refusal for number, refusal in _numbers(fakes).values() if number in lengths)
    return next(found, errors.StaticLength(detail="nothing in it says which axis is the sequence"))


def _numbers(fakes: Sequence[Any]) -> dict[sympy.Symbol, tuple[int, errors.StaticLength]]:
    """The symbols of sizes that tracing has found to be one number, and guards; with the reason that says so."""
    found: dict[sympy.Symbol, tuple[int, errors.StaticLength]] = {}
    env = _environment(fakes)
    if env is None:
        return found
    for symbol, number in env.replacements.items():
        if number.is_Integer:
            found[symbol] = int(number), _made_a_number(int(number), env.replacements_slocs.get(symbol))
    for guard in env.guards:
        fixed = _fixed_by(guard.expr)
        if fixed is not None:
            found[fixed[0]] = fixed[1], _made_a_number(fixed[1], guard.sloc)
    return found


def _environment(fakes: Sequence[Any]) -> Any:
    """Of the sizes; None where there are no tensors."""
    return next((fake.fake_mode.shape_env for fake in fakes if isinstance(fake, FakeTensor)), None)


def _guards(fakes: Sequence[Any]) -> list[Any]:
    """What tracing has found to hold of the sizes."""
    env = _environment(fakes)
    return [] if env is None else [guard.expr for guard in env.guards]


def _fixed_by(guard: Any) -> tuple[sympy.Symbol, int] | None:
    """The symbol and its value, where a guard such as ``sqrt(s) == 3.0`` holds for one size only."""
    if not isinstance(guard, sympy.Eq) or len(guard.free_symbols) != 1:
        return None
    (symbol,) = guard.free_symbols
    if not symbol.is_integer:  # a float of the model's
        return None
    numbers = list(islice((n for n in range(2, 513) if holds(guard, symbol, n)), 2))
    return (symbol, numbers[0]) if len(numbers) == 1 else None


def _made_a_number(number: int, place: Any) -> errors.StaticLength:
    code, _, where = (getattr(place, "maybe_user_loc", None) or "").rpartition("  # ")
    detail = f"it holds for {number} rows only: the model makes a Python number of how many there are"
    return errors.StaticLength(detail=detail, source=f"{where}: {code}" if where else "")


def _looks_like_ids(fake: Any, fixed: bool) -> bool:
    return isinstance(fake, torch.Tensor) and not fixed and fake.dim() >= 2 and bool(sym(fake.shape[1]).is_number)


def _described(
    module: fx.GraphModule,
    places: Sequence[fx.Node],
    fakes: Sequence[Any],
    real: Sequence[Any],
    constant: Sequence[bool],
    reading: _Reading,
) -> Captured:
    seq = reading.seq
    batch = _batch_size(fakes, constant, seq, reading.rows_first)
    inputs, constants = [], {}
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    for k, (node, fake, value) in enumerate(zip(nodes, fakes, real, strict=True)):
        source = source_of(places[k])
        given = Input(node.name, k, Role.SYMBOL, source)
        if isinstance(fake, torch.Tensor):
            given = _tensor_input(node.name, k, source, fake, value, constant[k], reading, batch)
            if given.role is Role.CONSTANT:
                constants[node.name] = value
        inputs.append(given)
    turned(module.graph, seq)
    guards = tuple(guard for guard in _guards(fakes) if guard.free_symbols == {seq})
    return Captured(module, tuple(inputs), seq, batch, constants, guards=guards)


def _leads(module: fx.GraphModule, seq: sympy.Symbol) -> list[sympy.Expr]:
    """How many entries may stand before all rows: what is joined with them, nothing, and what they are padded with.

    Scores have rows on two axes, and say nothing.
    """
    joined, padded = list[sympy.Expr](), list[sympy.Expr]()
    for node in module.graph.nodes:
        args = arguments(node)
        if node.target in JOINS:
            (*others, last), axis = args[0], dim_of(node, 1) % node.meta["val"].dim()
            size = sympy.Add(*(sym(piece.meta["val"].shape[axis]) for piece in others))
            before = _before_text(last, axis, seq)
            if before is not None and size != 0 and not size.has(seq):
                joined.append(before + size)
        elif node.target in PADS:
            last = args[0].meta["val"].dim() - 1
            for k, (first, then) in enumerate(zip(args[1][::2], args[1][1::2], strict=True)):
                before = _before_text(args[0], last - k, seq)
                if isinstance(first, int) and first > 0 and then == 0 and before is not None:
                    padded.append(before + first)
    return list(dict.fromkeys([*joined, sympy.Integer(0), *padded]))


def _before_text(x: fx.Node, axis: int, seq: sympy.Symbol) -> sympy.Expr | None:
    """How much longer than the text an axis is, where no other grows: what may stand before the rows already."""
    sizes = [sym(size) for size in x.meta["val"].shape]
    more = sympy.expand(sizes[axis] - seq)
    return more if more.is_nonnegative and sum(size.has(seq) for size in sizes) == 1 else None


def _batch_size(
    fakes: Sequence[Any], constant: Sequence[bool], seq: sympy.Symbol, rows_first: bool = False
) -> sympy.Expr:
    """Axis 0 of the sequence inputs, or the one behind the rows; inputs with one row of batch serve all sequences."""
    sizes = []
    for fake, fixed in zip(fakes, constant, strict=True):
        if fixed or not isinstance(fake, torch.Tensor):
            continue
        axes = [k for k, size in enumerate(fake.shape) if sym(size) == seq]
        if axes == [0, 1] and fake.dim() == 2 and not fake.is_floating_point() and fake.dtype is not torch.bool:
            raise errors.AmbiguousAxes(detail="batch and sequence had the same length when the graph was captured")
        if axes and axes[0] > 0:
            sizes.append(sym(fake.shape[0]))
        elif rows_first and axes == [0] and fake.dim() > 1:
            sizes.append(sym(fake.shape[1]))
    return next((s for s in sizes if s != 1), sympy.Integer(1))


def _tensor_input(
    name: str,
    k: int,
    source: str,
    fake: torch.Tensor,
    real: Any,
    fixed: bool,
    reading: _Reading,
    batch: sympy.Expr,
) -> Input:
    seq = reading.seq
    if fixed:
        return Input(name, k, Role.CONSTANT, source)
    axes = tuple(a for a, size in enumerate(fake.shape) if sym(size) == seq)
    if any(sym(size).has(seq) and sym(size) != seq for size in fake.shape):
        raise errors.NoSequence(detail=f"{source} has an axis whose length is computed from the sequence's")
    lead = 0 if 0 not in axes and _is_batch(fake, batch, reading.apart) else None
    if reading.rows_first and 1 not in axes and (lead is None or fake.dim() > 2) and _behind_rows(fake, batch):
        lead = 1
    if lead is None and axes and axes[0] > 0 and sym(fake.shape[0]) != 1:
        raise errors.AmbiguousAxes(detail=f"{source} has {fake.shape[0]} sequences where the batch has {batch}")
    if len(axes) == 2:
        return _mask_input(name, k, source, axes, lead, real)
    if len(axes) > 2:
        raise errors.NoSequence(detail=f"{source} has the sequence on {len(axes)} axes")
    role = Role.SEQUENCE if axes else Role.CONTEXT
    if not axes and (batch == 1 or lead is None):
        lead = None
    return Input(name, k, role, source, axes, lead, entries=entries_of(real) if axes else None)


def _behind_rows(fake: torch.Tensor, batch: sympy.Expr) -> bool:
    return bool(batch != 1 and fake.dim() > 1 and sym(fake.shape[1]) == batch)


def _is_batch(fake: torch.Tensor, batch: sympy.Expr, apart: bool) -> bool:
    """Axis 0 is the batch. Of a float vector as long as a batch of fixed size, no size says it: each is a reading."""
    own = apart or bool(batch.free_symbols) or (not fake.is_floating_point() and batch != 1)
    return bool((fake.dim() > 1 or (fake.dim() == 1 and own)) and sym(fake.shape[0]) == batch)


def _undecided(fakes: Sequence[Any], constant: Sequence[bool], seq: sympy.Symbol, rows_first: bool) -> bool:
    """Whether there is such a vector."""
    try:
        batch = _batch_size(fakes, constant, seq, rows_first)
    except errors.AmbiguousAxes:  # which every reading says
        return False
    given = [f for f, fixed in zip(fakes, constant, strict=True) if not fixed and isinstance(f, torch.Tensor)]
    vectors = [f for f in given if f.dim() == 1 and _is_batch(f, batch, True)]
    return batch != 1 and any(not _is_batch(f, batch, False) for f in vectors)


def _mask_input(name: str, k: int, source: str, axes: tuple[int, ...], lead: int | None, real: torch.Tensor) -> Input:
    """A mask that the caller passes, one for all texts: its closed form is recognised, and compared at every call."""
    last = axes == (real.dim() - 2, real.dim() - 1)
    each = real.reshape(-1, *real.shape[-2:])
    form = closed_form(each[0], lambda: sympy.nan) if last and bool((each == each[:1]).all()) else None
    if form is None or form.has(sympy.nan):
        raise errors.DependsOnFuture(
            detail=f"{source} is a mask over pairs of rows that has no closed form, the same for all texts"
        )
    return Input(name, k, Role.FORM, source, axes, lead, form)
