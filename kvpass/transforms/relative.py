"""Scores by distance that are moved into place by reading a matrix in rows of another length.

``x[i, m]`` is a score of row `i` and of a distance that is counted from the end, ``last - m``. Padded by a column, read
in rows of another length and cut, its entry ``[i, j]`` is ``x[i, last - (i - j)]`` where ``j <= i``, and something of
the row below elsewhere (Dai et al. 2019, appendix B; Huang et al. 2019, section 3.4.1; the same from ``2 s - 1``
distances on both sides). Spelled as a look-up by distance, ``x`` with its second axis turned round, so that distances
are counted from 0 and a vector of one is the same in a text of any length. What stands above the diagonal is not kept:
the look-up is wrapped in `only_where`, and the proof goes through where nothing reads it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from kvpass.analysis.kept import only_where
from kvpass.analysis.sweep import arguments, dim_of, sym
from kvpass.transforms.alike import RESHAPES, SIZED, axis_of
from kvpass.transforms.spell import JOINS, PADS, call, filled, named, replace, size_of, sizes

aten = torch.ops.aten

_I, _J = sympy.symbols("i j", integer=True, nonnegative=True)
_BELOW, _BEHIND = sympy.symbols("below behind", integer=True, nonnegative=True)
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)

Place: TypeAlias = tuple[fx.Node, int, int, sympy.Expr]
"""A value, the first of one or two axes of it, how many they are, and a place among the entries along them."""


def looked_up(graph: fx.Graph, rows: sympy.Symbol) -> None:
    """Rewrite in place.

    Args:
        rows: the length of the text.
    """
    for node in reversed(list(graph.nodes)):
        if node.target not in (*RESHAPES, aten.slice.Tensor, aten.index_select.default) or not node.users:
            continue
        found = _Moved(node, rows).found()
        if found is not None:
            with graph.inserting_before(node), node.meta["val"].fake_mode:
                made = _look_up(graph, node, rows, *found)
            if made is not None:
                replace(node, made)


@dataclass
class _Moved:
    """The way back from a square of scores to the matrix that was read in rows of another length."""

    node: fx.Node
    rows: sympy.Symbol

    def found(self) -> tuple[fx.Node, int, sympy.Expr] | None:
        """``(x, axis, last)``: an entry ``[i, j]`` of the square is entry ``[i, last - (i - j)]`` of ``x`` along
        ``axis`` and the next one."""
        shape = _shape(self.node)
        squares = (k for k in range(len(shape) - 1) if shape[k] == shape[k + 1] == self.rows)
        return next(filter(None, (self._back(self.node, k, 2, _I * self.rows + _J) for k in squares)), None)

    def _back(
        self, node: fx.Node, axis: int, count: int, flat: sympy.Expr, folded: bool = False
    ) -> tuple[fx.Node, int, sympy.Expr] | None:
        """Where an entry comes from: ``flat`` is its place among those along so many axes from ``axis`` on."""
        step = self._one_back(node, axis, count, sympy.expand(flat))
        deeper = None if step is None else self._back(*step, folded or node.target in RESHAPES)
        if deeper is not None or not folded or count < 2 or _shape(node)[axis] != self.rows:
            return deeper
        at = self._split(flat, _shape(node)[axis + 1])
        last = sympy.expand(at[1] + _I - _J) if at is not None and at[0] == _I else _I
        return None if last.has(_I, _J) else (node, axis, last)

    def _one_back(self, node: fx.Node, axis: int, count: int, flat: sympy.Expr) -> Place | None:
        args, rank = arguments(node), len(_shape(node))
        if node.target in RESHAPES:
            return self._reshaped(node, args[0], axis, count, flat)
        if node.target is aten.slice.Tensor:
            given = named(node)
            moved = self._shifted(node, axis, count, flat, args[0], given["dim"] % rank, _start(node))
            return moved if given["step"] == 1 else None
        if node.target is aten.index_select.default and args[2].target in _ARANGES:
            start, step = _progression(args[2])
            moved = self._shifted(node, axis, count, flat, args[0], args[1] % rank, start)
            return moved if step == 1 else None
        if node.target in PADS:
            dim, before = _padded(node) or (-1, 0)
            return self._shifted(node, axis, count, flat, args[0], dim, -before)
        if node.target in JOINS:
            return self._joined(node, axis, count, flat)
        return None

    def _shifted(
        self, node: fx.Node, axis: int, count: int, flat: sympy.Expr, x: fx.Node, dim: int, by: Any
    ) -> Place | None:
        """The place in ``x``, of which the node has all entries along other axes, and ``by`` is added along ``dim``."""
        if not axis <= dim < axis + count:
            return None
        new, old = _shape(node)[axis : axis + count], _shape(x)[axis : axis + count]
        if dim < axis + count - 1:  # whole lines
            moved = sympy.expand(flat + by * new[1])
            return (x, axis, count, moved) if self._within(moved, _product(old)) else None
        at = [flat] if count == 1 else self._split(flat, new[1])
        if at is None or not self._within(at[-1] + by, old[-1]):
            return None
        return x, axis, count, at[-1] + by if count == 1 else at[0] * old[1] + at[1] + by

    def _joined(self, node: fx.Node, axis: int, count: int, flat: sympy.Expr) -> Place | None:
        """The piece in which all these entries stand."""
        dim, start = dim_of(node, 1) % len(_shape(node)), sympy.Integer(0)
        for piece in arguments(node)[0]:
            found = self._shifted(node, axis, count, flat, piece, dim, -start)
            if found is not None:
                return found
            start = start + _shape(piece)[dim]
        return None

    def _reshaped(self, node: fx.Node, x: fx.Node, axis: int, count: int, flat: sympy.Expr) -> Place | None:
        """The same place among the axes of ``x`` that have as many entries before and behind them."""
        new, old = _shape(node), _shape(x)
        before, behind = _product(new[:axis]), _product(new[axis + count :])
        for k, many in itertools.product(range(len(old)), (2, 1)):
            if k + many <= len(old) and _product(old[:k]) == before and _product(old[k + many :]) == behind:
                return x, k, many, flat
        return None

    def _split(self, flat: sympy.Expr, width: Any) -> list[Any] | None:
        """Row and column in a matrix of this width: the row is `i`, or one beside it."""
        for row in (_I, _I - 1, _I + 1):
            rest = sympy.expand(flat - row * width)
            if self._within(rest, width):
                return [row, rest]
        return None

    def _within(self, place: Any, size: Any) -> bool:
        """Whether ``0 <= place < size`` for all ``0 <= j <= i < s``."""
        return all(self._is_nonnegative(value) for value in (place, size - 1 - place))

    def _is_nonnegative(self, value: Any) -> bool:
        """Of a polynomial: ``i = j + below``, ``s = i + 1 + behind``; no coefficient is negative then."""
        inside = sympy.sympify(value).subs({self.rows: _I + 1 + _BEHIND}).subs({_I: _J + _BELOW})
        inside = sympy.expand(inside)
        if not inside.free_symbols <= {_J, _BELOW, _BEHIND} or not inside.is_polynomial(_J, _BELOW, _BEHIND):
            return False
        return all(c.is_nonnegative for c in sympy.Poly(inside, _J, _BELOW, _BEHIND).coeffs())


def _shape(node: fx.Node) -> list[Any]:
    return [sym(d) for d in node.meta["val"].shape]


def _product(sizes: list[Any]) -> Any:
    return sympy.expand(sympy.Mul(*sizes))


def _progression(arange: fx.Node) -> tuple[Any, Any]:
    """Its first number, and what each is more than the one before."""
    numbers = [size_of(a) for a in arguments(arange)]
    return numbers[0] if len(numbers) > 1 else sympy.Integer(0), numbers[2] if len(numbers) > 2 else sympy.Integer(1)


def _start(node: fx.Node) -> Any:
    """Where a slice begins, counted from the first entry."""
    given = named(node)
    start, x = size_of(given["start"] or 0), given["self"]
    return start + _shape(x)[given["dim"] % x.meta["val"].dim()] if start.is_negative else start


def _padded(node: fx.Node) -> tuple[int, Any] | None:
    """``(axis, before)`` of a pad by a number along one axis: how many entries it puts before what is there."""
    given = named(node)
    if filled(node) is None:
        return None
    pads = [size_of(p) for p in given["pad"]]
    axes = [k for k in range(len(pads) // 2) if pads[2 * k] != 0 or pads[2 * k + 1] != 0]
    return (node.meta["val"].dim() - 1 - axes[0], pads[2 * axes[0]]) if len(axes) == 1 else None


def _look_up(
    graph: fx.Graph, node: fx.Node, rows: sympy.Symbol, x: fx.Node, axis: int, last: sympy.Expr
) -> fx.Node | None:
    make = partial(call, graph, node)
    count, rank = make(aten.sym_size.int, x, axis), x.meta["val"].dim()
    turned = _Turned(make, rows, count).of(x, axis + 1, last)
    if turned is None:
        return None
    index = make(aten.arange.default, count, device=x.meta["val"].device)
    ones = [1] * (rank - 2 - axis)
    i, j = (make(aten.reshape.default, index, [*sides, *ones]) for sides in ((-1, 1), (1, -1)))
    distance = make(aten.clamp.default, make(aten.sub.Tensor, i, j), 0)
    made = make(aten.gather.default, turned, axis + 1, make(aten.expand.default, distance, sizes(make, turned)))
    made = make(only_where, made, make(aten.le.Tensor, j, i))
    return made if _shape(made) == _shape(node) else make(aten.reshape.default, made, arguments(node)[1])


@dataclass
class _Turned:
    """Values along one axis, counted from an entry down: ``turned[t] = x[last - t]``."""

    make: Callable[..., fx.Node]
    rows: sympy.Symbol
    count: fx.Node
    known: dict[tuple[fx.Node, int, sympy.Expr], fx.Node | None] = field(default_factory=dict)

    def of(self, x: fx.Node, axis: int, last: sympy.Expr) -> fx.Node | None:
        """None where it is not known how."""
        if (x, axis, last) not in self.known:
            made = self._made(x, axis, last)
            fits = made is not None and _shape(made) == [self.rows if k == axis else d for k, d in enumerate(_shape(x))]
            self.known[x, axis, last] = made if fits else None
        return self.known[x, axis, last]

    def _made(self, x: fx.Node, axis: int, last: sympy.Expr) -> fx.Node | None:
        args, size = arguments(x), _shape(x)[axis]
        if x.target in _ARANGES:
            return self._arange(x, last)
        if x.target is aten.slice.Tensor and named(x)["dim"] % len(_shape(x)) == axis:
            return self.of(args[0], axis, sympy.expand(last + _start(x))) if named(x)["step"] == 1 else None
        if x.target is aten.flip.default and [d % len(_shape(x)) for d in args[1]] == [axis]:
            return self._cut(args[0], axis, size - 1 - last)
        if x.op in ("placeholder", "get_attr"):
            return self._cut(self.make(aten.flip.default, x, [axis]), axis, size - 1 - last)
        found = self._looked_up(x, axis, last)
        return self._alike(x, axis, last) if found is None else found

    def _arange(self, x: fx.Node, last: sympy.Expr) -> fx.Node | None:
        """``start + step * (last - t)``, in integers and in floats that are ones."""
        (start, step), value = map(sympy.nsimplify, _progression(x)), x.meta["val"]
        if not (start.is_integer and step.is_integer):
            return None
        first = self._size(sympy.expand(start + step * last))
        if first is None:
            return None
        made = self.make(aten.arange.default, self.count, dtype=value.dtype, device=value.device)
        made = made if step == -1 else self.make(aten.mul.Tensor, made, int(-step))
        return made if first == 0 else self.make(aten.add.Tensor, made, first)

    def _cut(self, x: fx.Node, axis: int, start: sympy.Expr) -> fx.Node | None:
        """As many entries as there are rows; `start` is a number in a table that is cut from its end."""
        start = sympy.expand(start)
        if not start.is_Integer or start < 0:
            return None
        end = self.count if start == 0 else self.make(operator.add, self.count, int(start))
        return self.make(aten.slice.Tensor, x, axis, int(start), end)

    def _size(self, value: sympy.Expr) -> Any:
        """A number of the form ``a + b s`` as an argument of a call."""
        if value.is_Integer:
            return int(value)
        slope = sympy.expand(value.coeff(self.rows))
        rest = sympy.expand(value - slope * self.rows)
        if not (slope.is_Integer and rest.is_Integer):
            return None
        made = self.count if slope == 1 else self.make(operator.mul, self.count, int(slope))
        return made if rest == 0 else self.make(operator.add, made, int(rest))

    def _looked_up(self, x: fx.Node, axis: int, last: sympy.Expr) -> fx.Node | None:
        """Rows of a table: the places are turned."""
        if x.target is aten.embedding.default:
            table, ids, at = *arguments(x)[:2], 0
        elif x.target is aten.index_select.default:
            table, ids, at = arguments(x)[0], arguments(x)[2], arguments(x)[1] % len(_shape(x))
        elif x.target is aten.index.Tensor and arguments(x)[1][0] is not None and len(arguments(x)[1]) == 1:
            table, (ids,), at = *arguments(x)[:2], 0
        else:
            return None
        if not at <= axis < at + len(_shape(ids)) or ids.meta["val"].dtype is torch.bool:
            return None
        turned = self.of(ids, axis - at, last)
        return None if turned is None or table is ids else self._with(x, arguments(x), {ids: turned})

    def _alike(self, x: fx.Node, axis: int, last: sympy.Expr) -> fx.Node | None:
        """An op that treats the entries alike: of operands that are turned."""
        size = _shape(x)[axis]
        operands = [a for a in x.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
        places = [[None, *(k for k, d in enumerate(_shape(a)) if d == size)] for a in operands]
        for chosen in itertools.product(*places):
            axes = {a: k for a, k in zip(operands, chosen, strict=True) if k is not None}
            if not axes or axis_of(x, axes) != axis:
                continue
            turned = {a: self.of(a, k, last) for a, k in axes.items()}
            if None in turned.values():
                return None
            given = list(arguments(x))
            if x.target in SIZED:
                given[1] = [self.count if k == axis else told for k, told in enumerate(given[1])]
            return self._with(x, tuple(given), turned)
        return None

    def _with(self, x: fx.Node, given: tuple[Any, ...], turned: Mapping[fx.Node, Any]) -> fx.Node:
        """The same op, of operands in another order."""

        def turn(a: fx.Node) -> Any:
            return turned.get(a, a)

        return self.make(x.target, *fx.map_arg(given, turn), **fx.map_arg(dict(x.kwargs), turn))
