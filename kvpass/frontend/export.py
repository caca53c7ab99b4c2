"""From Dynamo's graph to functional ATen ops, each run of ops that occurs again traced once.

Tracing is what a first call waits for, and a deep model is one layer many times over. The graph is cut into pieces,
and what tracing makes of a piece is kept under all that it can depend on: its ops, their arguments, and what is known
of the values that it reads. Where the cuts are is a matter of speed alone.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch._aot_autograd.functional_utils import from_fun, has_data_mutation, has_metadata_mutation, to_fun
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import detect_fake_mode
from torch._higher_order_ops.effects import has_effects
from torch._inductor.fx_passes.dedupe_symint_uses import dedupe_symints
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx, maybe_disable_thunkify, maybe_enable_thunkify
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvpass import errors
from kvpass.analysis.repeats import comparable
from kvpass.analysis.sweep import sym
from kvpass.analysis.table import RULES
from kvpass.lowering.tape import trace

_TRIED = 24  # ops before which a graph may be cut: the cheapest one is taken
_WORTH = 0.7  # of the ops of a graph, still to be traced
_AUTOCAST = {torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}
aten = torch.ops.aten
_READ = frozenset([
    aten.argsort.stable, aten.chunk.default, aten.contiguous.default, aten.gru_cell.default, aten.meshgrid.default,
    aten.meshgrid.indexing, aten.positive.default, aten.sym_size.int, aten.type_as.default, aten.unflatten.int,
])  # written in others, and read as they are  # fmt: skip
_FUNCTIONALIZE = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
_IDLE = {torch._C._log_api_usage_once}  # return nothing, and change nothing that tracing sees


def exported(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
    """The functional ATen graph; its outputs are a flat tuple.

    Args:
        gm: Dynamo's graph.
        fakes: what its placeholders are, with symbolic sizes.

    Raises:
        CaptureFailed: PyTorch cannot trace it.
        Mutation: it writes into an input.
    """
    pieces = _pieces(gm.graph)
    joined = _Joined(gm, _of_one_mode(fakes)).of(pieces) if pieces else None
    return joined if joined is not None else traced(gm, fakes)


def _of_one_mode(fakes: Sequence[Any]) -> list[Any]:
    """Dynamo's values belong to a mode of its own; those that tracing makes, to the one of the compilation."""
    mode = detect_fake_mode(fakes)
    if mode is None:
        return list(fakes)
    return [mode.from_tensor(x) if isinstance(x, FakeTensor) and x.fake_mode is not mode else x for x in fakes]


def traced(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
    """The same, all of it at once. Ops that are written in others are those, but for some that are read as they are."""
    spelled: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
    whole: set[torch._ops.OpOverload] = set(_READ)
    module = _to_aten(gm, fakes, spelled)
    while others := {n.target for n in module.graph.nodes if _is_composite(n.target)} - spelled.keys() - whole:
        more = {op: op.decompose for op in others}
        try:
            module = _to_aten(gm, fakes, spelled | more)
        except errors.CaptureFailed:  # PyTorch's own, which needs numbers where there are symbols
            foreign = {op for op in others if op.namespace != "aten"}
            if foreign == others:
                raise
            whole |= others - foreign
        else:
            spelled |= more
    return module


def _is_composite(op: Any) -> bool:
    """An op without a rule that is written in other ops; tracing leaves it whole."""
    return (
        isinstance(op, torch._ops.OpOverload)
        and op.namespace not in ("prim", "prims")
        and op not in RULES
        and op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    )


def _to_aten(
    gm: fx.GraphModule, fakes: Sequence[Any], spelled: Mapping[torch._ops.OpOverload, Callable[..., Any]]
) -> fx.GraphModule:
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    written: list[str] = []
    try:
        with trace.tracing, torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "At pre-dispatch tracing, we assume that any custom op")
            once, written = _traced_once(gm, fakes, spelled)
            if once is not None:
                return once
            module, signature = aot_export_module(
                gm, fakes, trace_joint=False, pre_dispatch=True, decompositions=dict(spelled)
            )
    except Exception as error:
        # Dynamo writes entering and leaving a `vmap` as calls in the graph: an error between them leaves it open.
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        if written:
            raise errors.Mutation(detail=", ".join(written)) from error
        raise errors.CaptureFailed(detail=f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if changed:
        raise errors.Mutation(detail=", ".join(written or sorted(map(str, changed.values()))))
    assert isinstance(module, fx.GraphModule)
    if signature.input_tokens:
        raise errors.CaptureFailed(detail="an op raises an error by what it is given, as `torch.inverse` does")
    return module


def _traced_once(
    gm: fx.GraphModule, fakes: Sequence[Any], spelled: Mapping[torch._ops.OpOverload, Callable[..., Any]]
) -> tuple[fx.GraphModule | None, list[str]]:
    """What `aot_export_module` returns for a graph that only computes, which it runs twice: first to learn that.

    Returns:
        None where the graph does more (it writes into inputs, or has effects), or where tensors are made of others;
        and what the user calls the inputs that are written into.
    """
    mode = detect_fake_mode(fakes)
    lifted = [*gm.parameters(), *gm.buffers()]
    if mode is None or mode.shape_env is None or lifted or any(map(is_traceable_wrapper_subclass, fakes)):
        return None, []
    written: list[str] = []
    names = [source_of(node) for node in gm.graph.nodes if node.op == "placeholder"]

    def run(*args: Any) -> tuple[Any, ...]:
        # Functionalization in C++ would come before the one that is traced.
        with maybe_enable_thunkify(), torch._C._ExcludeDispatchKeyGuard(_FUNCTIONALIZE):
            given = [to_fun(arg) for arg in args]
            with preserve_node_meta(), maybe_disable_thunkify():
                mode.epoch += 1  # each run has symbols of its own for what data decides
                results = PropagateUnbackedSymInts(gm).run(*given)
            written[:] = [
                name
                for name, new, old in zip(names, given, args, strict=True)
                if isinstance(old, torch.Tensor)
                and (has_data_mutation(new) or has_metadata_mutation(new, old, check_only_storage_mutation=False))
            ]
            return tuple(pytree.tree_map(from_fun, results))

    with mode, enable_python_dispatcher(), FunctionalTensorMode(pre_dispatch=True, export=True):
        module = make_fx(run, decomposition_table=dict(spelled), pre_dispatch=True)(*_told_apart(_of_one_mode(fakes)))
    if written or any(has_effects(node.target) for node in module.graph.nodes if node.op == "call_function"):
        return None, written
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, []


def _told_apart(values: Sequence[Any]) -> list[Any]:
    """The same values, each an object of its own: results of one piece that is put in twice have one between them, and
    tracing takes two inputs that are one tensor for the same input.
    """
    seen, out = set[int](), list[Any]()
    for value in values:
        repeated = isinstance(value, torch.Tensor) and id(value) in seen
        seen.add(id(value))
        out.append(value.detach() if repeated else value)
    return out


def source_of(place: fx.Node) -> str:
    """What the user calls an input of Dynamo's graph."""
    source = getattr(getattr(place.meta.get("grapharg"), "source", None), "name", place.name)
    return str(source() if callable(source) else source)


# -- where to cut ---------------------------------------------------------------------------------------------------


def _pieces(graph: fx.Graph) -> list[list[fx.Node]]:
    """The ops of a graph in runs of which most occur again; nothing where few do."""
    nodes = [n for n in graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    free = _free(nodes)
    results = [n for n in _results(graph) if isinstance(n, fx.Node)]
    if free is None or any(n.op == "get_attr" or not _known(n) for n in results):
        return []
    numbers: dict[Hashable, int] = {}
    labels = [numbers.setdefault(_label(n), len(numbers)) for n in nodes]
    count = Counter(labels)
    found = min(
        ([0, *(k for k, label in enumerate(labels) if label == at and k and free[k])] for at in _chosen(count)),
        key=lambda cuts: _cost(labels, cuts),
        default=[0],
    )
    if _cost(labels, found) > _WORTH * len(nodes):
        return []
    return [nodes[a:b] for a, b in zip(found, [*found[1:], len(nodes)], strict=True)]


def _chosen(count: Counter[int]) -> Iterator[int]:
    """Ops that are repeated; of those that are repeated equally often, a few."""
    taken: Counter[int] = Counter()
    for label, times in count.most_common():
        if times > 1 and taken[times] < 3 and taken.total() < _TRIED:
            taken[times] += 1
            yield label


def _cost(labels: Sequence[int], cuts: Sequence[int]) -> int:
    """How many ops are to be traced: those of pieces that are unlike each other."""
    return sum(map(len, {tuple(labels[a:b]) for a, b in zip(cuts, [*cuts[1:], len(labels)], strict=True)}))


def _free(nodes: Sequence[fx.Node]) -> list[bool] | None:
    """Whether a graph may be cut before each op; None where an op does something beside what it returns.

    Tuples stay with what takes them apart, wrappers with what reads them, and entering autocast with leaving it.
    """
    place = {node: k for k, node in enumerate(nodes)}
    free = [True] * len(nodes)
    for k, node in enumerate(nodes):
        if _known(node) or node.target in _IDLE:
            continue
        last = max((place[user] for user in node.users if user in place), default=k)
        if node.target not in _AUTOCAST and not isinstance(value_of(node), torch.Tensor) and not _several(node):
            return None
        if node.target is torch.amp.autocast_mode._enter_autocast and last == k:
            return None
        free[k + 1 : last + 1] = [False] * (last - k)
    return free


def value_of(node: fx.Node) -> Any:
    """What tracing knows of a node, in a graph of Dynamo's or of ATen's."""
    return node.meta.get("example_value", node.meta.get("val"))


def _known(node: fx.Node) -> bool:
    """A plain tensor or a symbolic number: what may go from one piece to another."""
    value = value_of(node)
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) or (
        isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value)
    )


def _several(node: fx.Node) -> bool:
    """A tuple of tensors and numbers, or a number that is known."""
    value = value_of(node)
    kinds = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
    return isinstance(value, (tuple, list, int, float)) and all(isinstance(x, kinds) for x in pytree.tree_leaves(value))


def _results(graph: fx.Graph) -> list[Any]:
    return pytree.tree_leaves(graph.output_node().args)


# -- what tracing can depend on -------------------------------------------------------------------------------------


def _label(node: fx.Node) -> Hashable:
    """What an op is, and the types of what it reads."""
    return call(node, lambda x: (x.op == "get_attr" and x.target, type_of(value_of(x))))


def call(node: fx.Node, named: Callable[[fx.Node], Any]) -> Hashable:
    """What an op is told, its operands by the names that they are given."""
    return comparable((node.op, node.target, fx.map_arg((node.args, node.kwargs), named)))


def type_of(value: Any) -> tuple[Any, ...]:
    """What tracing sees of a value."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        sizes = tuple(map(sym, (*value.shape, *value.stride(), value.storage_offset())))
        return type(value), sizes, value.dtype, value.device, value.requires_grad, value.is_conj(), value.is_neg()
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return type(value), value.node.expr
    if isinstance(value, (tuple, list)):
        return type(value), *map(type_of, value)
    if isinstance(value, (int, float)):
        return type(value), repr(value)
    return type(value), id(value)


# -- tracing and joining --------------------------------------------------------------------------------------------


@dataclass
class _Joined:
    """The pieces of a graph, traced and put one behind the other."""

    gm: fx.GraphModule
    fakes: Sequence[Any]
    graph: fx.Graph = field(default_factory=fx.Graph)
    held: dict[str, Any] = field(default_factory=dict)  # constants of the pieces
    made: dict[Hashable, fx.GraphModule] = field(default_factory=dict)
    nodes: dict[fx.Node, Any] = field(default_factory=dict)  # of Dynamo's, what they are in the new graph

    def of(self, pieces: Sequence[Sequence[fx.Node]]) -> fx.GraphModule | None:
        """The whole graph; None where a piece writes into what it reads, or makes a size that only its data tells."""
        places = self.gm.graph.find_nodes(op="placeholder")
        for k, (place, fake) in enumerate(zip(places, self.fakes, strict=True)):
            self.nodes[place] = node = self.graph.placeholder(f"arg{k}_1")
            node.meta["val"] = fake
        sizes = [place for place, fake in zip(places, self.fakes, strict=True) if isinstance(fake, torch.SymInt)]
        known = set[sympy.Basic]().union(*map(_symbols, self.graph.nodes))
        for piece in pieces:
            try:
                self._add(piece, sizes)
            except errors.Mutation:
                return None
        if any(free - known for free in map(_symbols, self.graph.nodes)):
            return None
        self.graph.output(tuple(self.nodes.get(x, x) if isinstance(x, fx.Node) else x for x in _results(self.gm.graph)))
        dedupe_symints(self.graph)  # as tracing itself does: a size is computed once, and not once a piece
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.held, self.graph)

    def _add(self, piece: Sequence[fx.Node], sizes: Sequence[fx.Node]) -> None:
        inside = set(piece)
        before = (x for node in piece for x in node.all_input_nodes if x not in inside and x.op != "get_attr")
        given = list(dict.fromkeys([*sizes, *before]))
        read = [node for node in piece if any(user not in inside for user in node.users)]
        values = [x.meta["val"] if isinstance(x := self.nodes[node], fx.Node) else x for node in given]
        place = {node: k for k, node in enumerate([*given, *piece])}
        named = lambda x: place.get(x, (x.target, id(getattr(self.gm, str(x.target), None))))  # noqa: E731
        key = (
            tuple(map(type_of, values)),
            tuple(call(node, named) for node in piece),
            tuple(place[node] for node in read),
        )
        module = self.made.get(key)
        if module is None:
            module = self.made[key] = traced(cut_out(self.gm, piece, given, read), values)
            self._keep(module, len(self.made))
        inner = module.graph.find_nodes(op="placeholder")
        results = self.graph.graph_copy(module.graph, dict(zip(inner, map(self.nodes.__getitem__, given), strict=True)))
        self.nodes |= zip(read, pytree.tree_leaves(results), strict=True)

    def _keep(self, module: fx.GraphModule, number: int) -> None:
        """The constants of a piece, under names of their own."""
        for node in module.graph.find_nodes(op="get_attr"):
            name = f"piece{number}_{str(node.target).replace('.', '_')}"
            self.held[name] = attrgetter(str(node.target))(module)
            node.target = name


def cut_out(
    gm: fx.GraphModule, piece: Sequence[fx.Node], given: Sequence[fx.Node], read: Sequence[fx.Node]
) -> fx.GraphModule:
    """Some ops of a graph as one of their own: from what they are given to what is read of them."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in given}
    for held in dict.fromkeys(x for node in piece for x in node.all_input_nodes if x.op == "get_attr"):
        if held not in copies:
            copies[held] = graph.node_copy(held)
    for node in piece:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in read))
    return fx.GraphModule(gm, graph)


def _symbols(node: fx.Node) -> set[sympy.Basic]:
    """The sizes that a value's type speaks of."""
    found: set[sympy.Basic] = set()
    for value in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, torch.Tensor):
            found |= {s for size in value.shape for s in sym(size).free_symbols}
        elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            found |= value.node.expr.free_symbols
    return found
