"""Mixtures of experts that sort their tokens: written without the sort.

To multiply every token with the matrix of its expert at once, rows are put in the order of their experts, multiplied
group by group, and put back. Between the two permutations a row stands among rows of all sequences, so no rule could
say what it depends on. But what is done there is done row by row, and commutes with the permutation: for
``x' = x[order]`` and ``f`` row by row, ``f(x') = f(x)[order]``. Every value in the other order has a *twin* in the
order of the tokens, and where rows are put back stands the twin itself. A product in groups of sorted experts becomes
``bmm(x[:, None], weight[ids])[:, 0]``, which says of each row what it is multiplied with.

Nothing is changed unless every use of the sort is one that commutes with it or that undoes it.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from kvpass.analysis.sweep import arguments, sym
from kvpass.transforms.alike import RESHAPES, axis_of
from kvpass.transforms.spell import JOINS, call, named

aten = torch.ops.aten
_SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
_LIKE = (aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
_MOVES = (
    *RESHAPES,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten._to_copy.default,
    aten.index.Tensor,
)
"""Ops whose result has no entry that their operand has not."""


_INDICES: dict[Any, int] = {aten.argmax.default: 1, aten.argmin.default: 1, aten.argsort.default: 1}
_SECOND_INDICES: dict[Any, int] = {aten.topk.default: 2, aten.sort.default: 1, aten.max.dim: 1, aten.min.dim: 1}
"""Ops whose result, or second result, is an index along the axis that this argument names."""


def unsorted(graph: fx.Graph) -> None:
    """Undo every sort of a list of experts that only serves to multiply in groups."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _SORTS:
            _Sorted(graph, node).undo()


@dataclass(frozen=True)
class Place:
    """The twin of the order itself: entry ``k`` is ``k // each``."""

    each: int = 1


@dataclass
class _Sorted:
    """One sort, and what was found behind it.

    Attributes:
        twins: of each value in the order of the experts, the same rows in the order of the tokens.
        inverse: orders that undo the sort.
        counts, ends: how many rows each of so many experts has, and where its rows end.
        back: where rows are put back, and what stands there then.
        lent: what has the shape of the order and nothing else of it.
    """

    graph: fx.Graph
    sort: fx.Node
    twins: dict[fx.Node, fx.Node | Place] = field(default_factory=dict)
    inverse: set[fx.Node] = field(default_factory=set)
    counts: dict[fx.Node, int] = field(default_factory=dict)
    ends: dict[fx.Node, int] = field(default_factory=dict)
    back: dict[fx.Node, fx.Node] = field(default_factory=dict)
    lent: set[fx.Node] = field(default_factory=set)

    def undo(self) -> None:
        self.ids: fx.Node = arguments(self.sort)[0]
        value = self.ids.meta["val"]
        if value.dim() != 1 or value.is_floating_point() or self._descends():
            return
        self.rows = sym(value.shape[0])
        waiting = self._first()
        node = self.sort
        while waiting:
            node = node.next
            if node not in waiting:
                continue
            waiting.discard(node)
            if not self._understood(node):
                return
            if node not in self.back and node not in self.lent:
                waiting |= set(node.users)
        for node, twin in self.back.items():
            node.replace_all_uses_with(twin)

    def _descends(self) -> bool:
        return bool(named(self.sort)["descending"])

    def _first(self) -> set[fx.Node]:
        """The sorted experts and the order; what uses them."""
        if self.sort.target in (aten.argsort.default, aten.argsort.stable):
            self.twins[self.sort] = Place()
            return set(self.sort.users)
        for piece in self.sort.users:
            self.twins[piece] = Place() if arguments(piece)[1] else self.ids
        return {user for piece in self.sort.users for user in piece.users}

    def _understood(self, node: fx.Node) -> bool:
        if node.op != "call_function":
            return False
        return (
            self._measured(node)
            or self._counted(node)
            or self._looked_up(node)
            or self._put_back(node)
            or self._multiplied(node)
            or self._row_by_row(node)
        )

    def _twin(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> bool:
        with self.graph.inserting_before(node):
            twin = self.twins[node] = call(self.graph, node, target, *args, **kwargs)
        shape = twin.meta["val"].shape
        return len(shape) > 0 and sym(shape[0]) == self.rows

    def _measured(self, node: fx.Node) -> bool:
        """Sizes are those of the twin; of an order, those of what is sorted."""
        x = arguments(node)[0] if node.target is aten.sym_size.int else None
        twin = self.ids if x in self.inverse else self.twins.get(x)  # type: ignore[arg-type]
        if twin is None:
            return False
        with self.graph.inserting_before(node):
            like = twin if isinstance(twin, fx.Node) else self.ids
            self.back[node] = call(self.graph, node, aten.sym_size.int, like, arguments(node)[1])
        return True

    # -- the ends of the groups ------------------------------------------------------------------------------------

    def _counted(self, node: fx.Node) -> bool:
        """``histc(experts, E, 0, E - 1)``, its running sum, and casts of both."""
        x = arguments(node)[0] if arguments(node) else None
        if node.target is aten.histc.default and self.twins.get(_uncast(x)) is self.ids:
            given = named(node)  # between two equal bounds the values' own are taken: one expert counts all rows
            if given["min"] == 0 and given["max"] == given["bins"] - 1 and _below(self.ids, given["bins"]):
                self.counts[node] = given["bins"]
                return True
        if x in self.counts and node.target is aten.cumsum.default:
            self.ends[node] = self.counts[x]
            return True
        for found in self.counts, self.ends:
            if x in found and node.target is aten._to_copy.default and not node.meta["val"].dtype.is_floating_point:
                found[node] = found[x]
                return True
        return False

    # -- from one order to the other -------------------------------------------------------------------------------

    def _looked_up(self, node: fx.Node) -> bool:
        """``x[order]``, ``x[order // each]``, ``weight[experts]``; and rows put back by ``y[inverse]``."""
        if node.target is aten.argsort.default and self.twins.get(arguments(node)[0]) == Place():
            self.inverse.add(node)
            return not named(node)["descending"]
        if node.target is not aten.index.Tensor or len(arguments(node)[1]) != 1:
            return False
        x, (index,) = arguments(node)
        if x in self.twins:
            twin = self.twins[x]
            if index not in self.inverse or not isinstance(twin, fx.Node):
                return False
            self.back[node] = twin
            return True
        place = self.twins.get(index)
        if isinstance(place, Place):
            if sym(x.meta["val"].shape[0]) * place.each - self.rows != 0:
                return False
            if place.each == 1:
                self.twins[node] = x
                return True
            with self.graph.inserting_before(node):
                each = call(self.graph, node, aten.unsqueeze.default, x, 1)
                sizes = [-1, place.each, *(-1 for _ in x.meta["val"].shape[1:])]
                each = call(self.graph, node, aten.expand.default, each, sizes)
            return self._twin(node, aten.flatten.using_ints, each, 0, 1)
        return place is not None and self._twin(node, aten.index.Tensor, x, [place])

    def _put_back(self, node: fx.Node) -> bool:
        """``out[order] = y``, all of it; and ``out.index_add(0, order // each, y)``."""
        args = arguments(node)
        if node.target is aten.index_put.default and len(args[1]) == 1:
            base, (index,), rows = args[:3]
            if self.twins.get(index) != Place() or base in self.twins or (len(args) > 3 and args[3]):
                return False
            if sym(base.meta["val"].shape[0]) != self.rows or base.meta["val"].shape != node.meta["val"].shape:
                return False
            twin = self.twins.get(rows)
            if isinstance(twin, fx.Node) and twin.meta["val"].shape == node.meta["val"].shape:
                self.back[node] = twin
                return True
            return self._counts_up(node, rows)
        if node.target is aten.index_add.default and args[1] == 0:
            base, _, index, rows = args[:4]
            place, twin = self.twins.get(index), self.twins.get(rows)
            if base in self.twins or not isinstance(place, Place) or not isinstance(twin, fx.Node):
                return False
            if sym(base.meta["val"].shape[0]) * place.each != self.rows or node.kwargs:
                return False
            with self.graph.inserting_before(node):
                tail = list(twin.meta["val"].shape[1:])
                each = call(self.graph, node, aten.reshape.default, twin, [-1, place.each, *tail])
                total = call(self.graph, node, aten.sum.dim_IntList, each, [1])
                self.back[node] = call(self.graph, node, aten.add.Tensor, base, total)
            return True
        return False

    def _counts_up(self, node: fx.Node, rows: fx.Node) -> bool:
        """``inverse[order] = arange(rows)``."""
        if rows.target is not aten.arange.default or rows in self.twins or len(arguments(rows)) != 1:
            return False
        self.inverse.add(node)
        return True

    # -- what is done between --------------------------------------------------------------------------------------

    def _multiplied(self, node: fx.Node) -> bool:
        """A product in groups, ATen's or another library's."""
        args = arguments(node)
        if len(args) < 2 or not isinstance(self.twins.get(args[0]), fx.Node):
            return False
        given = named(node)
        tensors = [v for v in given.values() if isinstance(v, fx.Node)]
        if len(tensors) != 3 or tensors[2] not in self.ends or tensors[1] in self.twins:
            return False
        weight = tensors[1]
        value = weight.meta["val"]
        if value.dim() != 3 or value.shape[0] != self.ends[tensors[2]] or given.get("out_dtype") is not None:
            return False
        if node.target is not aten._grouped_mm.default and not _multiplies_groups(
            node.target, value.dtype, value.device
        ):
            return False
        with self.graph.inserting_before(node):
            x = call(self.graph, node, aten.unsqueeze.default, self.twins[args[0]], 1)
            mine = call(self.graph, node, aten.index.Tensor, weight, [self.ids])
            made = call(self.graph, node, aten.bmm.default, x, mine)
        return self._twin(node, aten.select.int, made, 1, 0)

    def _row_by_row(self, node: fx.Node) -> bool:
        """The same op on twins, where it treats rows alike."""
        tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
        if any(a in self.counts or a in self.ends or a in self.inverse for a in tensors):
            return False
        places = [self.twins[a] for a in tensors if isinstance(self.twins.get(a), Place)]
        if places and node.target in _LIKE:
            self.lent.add(node)
            return True
        if places:
            return self._divided(node, places)
        mine = dict.fromkeys((a for a in tensors if a in self.twins), 0)
        if axis_of(node, mine) != 0:
            return False
        args = arguments(node)

        def twin(a: fx.Node) -> Any:
            return self.twins.get(a, a)

        return self._twin(node, node.target, *fx.map_arg(args, twin), **fx.map_arg(dict(node.kwargs), twin))

    def _divided(self, node: fx.Node, places: list[Any]) -> bool:
        """``order // each``."""
        args = arguments(node)
        floor = node.target in (aten.floor_divide.default, aten.floor_divide.Scalar) or (
            node.target in (aten.div.Tensor_mode, aten.div.Scalar_mode) and node.kwargs.get("rounding_mode") == "floor"
        )
        if not floor or places != [Place()] or not isinstance(args[1], int) or args[1] < 1:
            return False
        self.twins[node] = Place(args[1])
        return True


def _uncast(x: Any) -> Any:
    while isinstance(x, fx.Node) and x.target is aten._to_copy.default:
        x = arguments(x)[0]
    return x


def _below(node: Any, count: int) -> bool:
    """True of integers that are indices along an axis of at most ``count`` entries.

    Others would fall out of the count of the groups, and shift every group behind them.
    """
    while isinstance(node, fx.Node) and node.target in _MOVES:
        node = arguments(node)[0]
    if isinstance(node, fx.Node) and node.target in (*JOINS, aten.stack.default):
        return all(_below(piece, count) for piece in arguments(node)[0])
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    args, targets = arguments(node), _INDICES
    if node.target is operator.getitem and args[1] == 1:
        node, args, targets = args[0], arguments(args[0]), _SECOND_INDICES
    if node.target not in targets:
        return False
    place = targets[node.target]
    axis = args[place] if len(args) > place else node.kwargs.get("dim", -1)
    if axis is None:
        return False
    size = sym(args[0].meta["val"].shape[axis])
    return bool(size.is_Integer and size <= count)


@functools.lru_cache(maxsize=64)
def _multiplies_groups(target: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether another library's operator is a product in groups: tried on groups of random sizes, some of them empty.

    An operator has no text that could be read. It gets sorted rows, one matrix for each group, and where the groups
    end; if in all of these its result is the product row by row, it is taken to be just that.
    """
    generator = torch.Generator().manual_seed(0)
    with unset_fake_temporarily(), torch.no_grad():
        for groups, inner, outer in ((1, 16, 32), (3, 32, 16), (5, 48, 64), (8, 16, 16)):
            sizes = torch.randint(0, 5, (groups,), generator=generator)
            sizes[groups // 2] += 1
            ids = torch.arange(groups).repeat_interleave(sizes)
            x = torch.randn(len(ids), inner, generator=generator).to(dtype)
            weight = torch.randn(groups, inner, outer, generator=generator).to(dtype)
            want = torch.bmm(x.unsqueeze(1).double(), weight[ids].double()).squeeze(1)
            try:
                got = target(x.to(device), weight.to(device), sizes.cumsum(0).int().to(device))
            except Exception:  # noqa: BLE001  whatever it is, it is no product of these
                return False
            if not isinstance(got, torch.Tensor) or got.shape != want.shape:
                return False
            error = (got.cpu().double() - want).abs().max()
            if not error <= 64 * torch.finfo(dtype).eps * float(want.abs().max()):
                return False
    return True
