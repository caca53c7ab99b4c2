"""How one captured op is computed for the demanded rows.

Most ops are the same op on the demanded rows of their operands. Those whose arguments speak of sizes or positions
(views, ranges, slices, triangles) are spelled anew here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from kvpass import errors
from kvpass.analysis.facts import Atom, Fact, Kind
from kvpass.analysis.sweep import Step, arguments, dim_of, sym
from kvpass.transforms.plan import Demand, canonical, demand_of_operand

if TYPE_CHECKING:
    from kvpass.transforms.rewrite import Builder

aten = torch.ops.aten


@dataclass
class Context:
    """One op in the making: its step, the atoms computed in full, and its operands already built."""

    builder: Builder
    node: fx.Node
    step: Step
    everything: Demand
    operands: Any

    def args(self) -> tuple[Any, ...]:
        return tuple(self.convert(a) for a in arguments(self.node))

    def kwargs(self) -> dict[str, Any]:
        return {k: self.convert(v) for k, v in self.node.kwargs.items()}

    def convert(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            if arg in self.builder.analyzed.steps:
                return next(self.operands)
            return self.builder.number(sym(arg.meta["val"]))
        if isinstance(arg, (list, tuple)):
            return type(arg)(self.convert(a) for a in arg)
        return arg

    def sizes(self) -> list[Any]:
        return self.builder.sizes(self.step.fact, self.everything)


def plain(c: Context) -> fx.Node:
    """The same op on the demanded rows of its operands."""
    args = c.args()
    return c.builder.call(c.node.target, *args, **c.kwargs())


def _reshape(c: Context) -> fx.Node:
    return c.builder.call(aten.reshape.default, next(c.operands), c.sizes())


def _expand(c: Context) -> fx.Node:
    return c.builder.call(aten.expand.default, next(c.operands), c.sizes())


def _filled(c: Context) -> fx.Node:
    value = c.node.meta["val"]
    number = c.step.fact.expr
    if number is None:
        raise errors.NotIncremental(detail="a tensor filled with an unknown number")
    fill: Any = bool(number) if value.dtype is torch.bool else c.builder.number(number)
    if value.dtype.is_floating_point and number.is_number:  # a whole number may be too large for an integer
        fill = float(number)
    return c.builder.call(aten.full.default, c.sizes(), fill, dtype=value.dtype, device=value.device)


def _arange(c: Context) -> fx.Node:
    """``arange(start, end, step)`` over the demanded entries."""
    args = [c.convert(a) for a in arguments(c.node)]
    start: Any = 0
    step: Any = 1
    if c.node.target is not aten.arange.default:
        start = args[0]
        step = args[2] if len(args) > 2 else c.node.kwargs.get("step", 1)
    start, step = (int(n) if isinstance(n, float) and n.is_integer() else n for n in (start, step))
    value, b = c.node.meta["val"], c.builder
    atoms = c.step.fact.atoms
    lo, hi = b.span(atoms[0], 0 in c.everything) if atoms else (sympy.Integer(0), sympy.Integer(1))
    if isinstance(start, float) or isinstance(step, float):
        full = b.call(c.node.target, *args, dtype=value.dtype, device=value.device)
        return full if 0 in c.everything else b.call(aten.slice.Tensor, full, 0, b.number(lo), b.number(hi))
    first, last = _at(b, start, step, lo), _at(b, start, step, hi)
    return b.call(aten.arange.start_step, first, last, step, dtype=value.dtype, device=value.device)


def _at(b: Builder, start: Any, step: Any, place: sympy.Expr) -> Any:
    offset = b.number(place * step) if isinstance(step, int) else b.call(operator.mul, b.number(place), step)
    if start == 0 and not isinstance(start, fx.Node):
        return offset
    if not isinstance(start, fx.Node) and not isinstance(offset, fx.Node):
        return start + offset
    return b.call(operator.add, start, offset)


def _slice(c: Context) -> fx.Node:
    x: fx.Node = next(c.operands)
    b, source = c.builder, c.step.operands[0]
    before, after = b.analyzed.fact(source), c.step.fact
    axis = int(arguments(c.node)[1]) % len(before.dims) if len(arguments(c.node)) > 1 else 0
    atom = _row_atom(before, axis)
    if atom is None:
        args = tuple(c.convert(a) for a in arguments(c.node)[1:])
        return b.call(aten.slice.Tensor, x, *args)
    new = _row_atom(after, axis) or Atom(Kind.SEQ, sym(c.node.meta["val"].shape[axis]))
    whole = c.step.links[0][before.flat(axis)[0]] is None
    flat = after.flat(axis)
    everything = whole or (len(flat) > 0 and flat[0] in c.everything)
    offset = new.start - atom.start
    if before == after or sym(c.node.meta["val"].shape[axis]) == atom.size:
        return x
    asked = canonical(demand_of_operand(c.step, 0, before, c.everything), before)
    origin, _ = b.span(atom, before.flat(axis)[0] in asked)
    lo, hi = b.span(new, everything)
    return b.call(aten.slice.Tensor, x, axis, b.number(offset + lo - origin), b.number(offset + hi - origin))


def _row_atom(fact: Fact, axis: int) -> Atom | None:
    dim = fact.dims[axis]
    return dim[0] if len(dim) == 1 and dim[0].kind is Kind.SEQ else None


def _select(c: Context) -> fx.Node:
    x = next(c.operands)
    b, before = c.builder, c.builder.analyzed.fact(c.step.operands[0])
    axis = int(arguments(c.node)[1]) % len(before.dims)
    atom = _row_atom(before, axis)
    place = c.convert(arguments(c.node)[2])
    if atom is None or not atom.grows:
        return b.call(aten.select.int, x, axis, place)
    where = (
        sym(arguments(c.node)[2].meta["val"])
        if isinstance(arguments(c.node)[2], fx.Node)
        else sympy.sympify(arguments(c.node)[2])
    )
    where = atom.size + where if where.is_negative else where
    asked = canonical(demand_of_operand(c.step, 0, before, c.everything), before)
    origin, _ = b.span(atom, before.flat(axis)[0] in asked)
    return b.call(aten.select.int, x, axis, b.number(where - origin))


def _triangle(c: Context) -> fx.Node:
    """Row and column indices start at the first computed entry: the diagonal moves with them."""
    x, b, fact = next(c.operands), c.builder, c.step.fact
    diagonal: Any = c.convert(arguments(c.node)[1]) if len(arguments(c.node)) > 1 else c.node.kwargs.get("diagonal", 0)
    firsts = []
    for axis in (-2, -1):
        flat = fact.flat(axis)
        firsts.append(b.span(fact.atoms[flat[0]], flat[0] in c.everything)[0] if len(flat) else sympy.Integer(0))
    moved = b.number(firsts[0] - firsts[1])
    if isinstance(moved, fx.Node) or isinstance(diagonal, fx.Node):
        moved = b.call(operator.add, moved, diagonal)
    else:
        moved = moved + diagonal
    return b.call(c.node.target, x, moved)


def _repeat(c: Context) -> fx.Node:
    """Counts that are sizes (of the batch, of the rows) count the demanded entries."""
    x: fx.Node = next(c.operands)
    counts, fact = list(arguments(c.node)[1]), c.step.fact
    counts = [1] * (len(fact.dims) - len(counts)) + counts
    for axis, count in enumerate(counts):
        if isinstance(count, fx.Node):
            counts[axis] = c.builder.number(_repeated(c, axis, sym(count.meta["val"])))
    return c.builder.call(aten.repeat.default, x, counts)


def _repeated(c: Context, axis: int, count: sympy.Expr) -> sympy.Expr:
    """How often the entries of an axis are repeated, of which the outermost atoms are the count."""
    fact, all_of_them, demanded = c.step.fact, sympy.Integer(1), sympy.Integer(1)
    for k in fact.flat(axis):
        all_of_them = all_of_them * fact.atoms[k].size
        demanded = demanded * c.builder.length(fact.atoms[k], k in c.everything)
        if all_of_them == count:
            return demanded
    raise errors.NotIncremental(detail=f"an axis repeated {count} times")


def _linear(c: Context) -> fx.Node:
    args = c.args()
    return c.builder.call(c.builder.kernels.linear, *args, **c.kwargs())


def _pad(c: Context) -> fx.Node:
    """The demanded entries of a padded row axis, from all rows of the operand: nothing else is copied."""
    x: fx.Node = next(c.operands)
    b, after = c.builder, c.step.fact
    before = b.analyzed.fact(c.step.operands[0])
    amounts, rest = [c.convert(a) for a in arguments(c.node)[1]], arguments(c.node)[2:]
    for k in range(0, len(amounts), 2):
        axis = len(before.dims) - 1 - k // 2
        old, new = _row_atom(before, axis), _row_atom(after, axis)
        if old is None or new is None or not any(amounts[k : k + 2]):
            continue
        lo, hi = b.span(new, after.flat(axis)[0] in c.everything)
        first = sympy.Max(lo - amounts[k], 0)
        last = sympy.Max(old.size + min(amounts[k + 1], 0), first)
        x = b.call(aten.slice.Tensor, x, axis, b.number(first), b.number(last))
        amounts[k] = b.number(sympy.Min(sympy.Max(amounts[k] - lo, 0), hi - lo))
        amounts[k + 1] = max(amounts[k + 1], 0)
    return b.call(c.node.target, x, amounts, *rest, **c.node.kwargs)


def _bmm(c: Context) -> fx.Node:
    """``bmm(x, weight[ids])`` without a copy of a matrix for each row."""
    x, y = c.args()
    if y.target is aten.index.Tensor and y.args[1][0] is not None:
        weight, ids = (c.builder.analyzed.fact(n) for n in c.builder.analyzed.steps[c.step.operands[1]].operands[:2])
        if len(y.args[1]) == len(ids.dims) == 1 and len(weight.dims) == 3 and ids.dtype is not torch.bool:
            return c.builder.call(c.builder.kernels.experts, x, y.args[0], y.args[1][0])
    return c.builder.call(aten.bmm.default, x, y)


def _sdpa(c: Context) -> fx.Node:
    """``is_causal`` counts indices from the upper left: spell it as a mask over rows."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    args = dict(zip(names, c.args(), strict=False)) | c.kwargs()
    if args.pop("is_causal", False):
        if args.get("attn_mask") is not None:
            raise errors.NotIncremental(detail="attn_mask beside is_causal")
        b, q = c.builder, c.builder.analyzed.fact(c.step.operands[0])
        k = b.analyzed.fact(c.step.operands[1])
        if len(q.dims[-2]) != 1 or len(k.dims[-2]) != 1:
            raise errors.UnsupportedShape(detail="the rows of an attention are merged with another axis")
        (i,), (j,) = q.dims[-2], k.dims[-2]
        device = c.node.meta["val"].device
        lo, hi = b.span(i, q.flat(-2)[0] in demand_of_operand(c.step, 0, q, c.everything))
        rows = b.call(aten.arange.start_step, b.number(lo), b.number(hi), 1, device=device)
        keys = b.call(aten.arange.start_step, 0, b.number(j.size), 1, device=device)
        args["attn_mask"] = b.call(aten.le.Tensor, keys, b.call(aten.unsqueeze.default, rows, 1))
    query, key, value = args.pop("query"), args.pop("key"), args.pop("value")
    return c.builder.call(aten.scaled_dot_product_attention.default, query, key, value, **args)


def _cat(c: Context) -> fx.Node:
    """New rows behind what is new of a prefix of the context."""
    pieces, b, fact = c.args()[0], c.builder, c.step.fact
    axis = dim_of(c.node, 1) % len(fact.dims)
    (at, *_), last = [*fact.flat(axis), None], c.step.links[-1]
    text = b.analyzed.fact(c.step.operands[-1]).flat(axis)
    if b.lead == 0 or at in c.everything or len(text) != 1 or last[text[0]] is None:
        return b.call(c.node.target, pieces, axis)
    prefix = pieces[0] if len(pieces) == 2 else b.call(c.node.target, list(pieces[:-1]), axis)
    lo = b.number(sympy.Min(b.p, b.lead))
    return b.call(c.node.target, [b.call(aten.slice.Tensor, prefix, axis, lo, b.number(b.lead)), pieces[-1]], axis)


SPECIAL: dict[Any, Callable[[Context], fx.Node]] = {
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.expand.default: _expand,
    aten.broadcast_to.default: _expand,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.tril.default: _triangle,
    aten.triu.default: _triangle,
    **dict.fromkeys((aten.repeat.default, aten.tile.default), _repeat),
    aten.linear.default: _linear,
    aten.bmm.default: _bmm,
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), _pad),
    aten.scaled_dot_product_attention.default: _sdpa,
    **dict.fromkeys(
        (
            aten.zeros.default,
            aten.zeros_like.default,
            aten.new_zeros.default,
            aten.ones.default,
            aten.ones_like.default,
            aten.new_ones.default,
            aten.full.default,
            aten.full_like.default,
            aten.new_full.default,
            aten.fill.Scalar,
            aten.scalar_tensor.default,
        ),
        _filled,
    ),
}
