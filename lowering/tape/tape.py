"""Instructions as machine code, memory for their buffers, and the call."""

from __future__ import annotations

import ctypes
import itertools
import math
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kvpass.ir import address
from kvpass.lowering import build, cpp
from kvpass.lowering.specialise import specialise
from kvpass.lowering.tape import trace as tracer
from kvpass.lowering.tape.plan import Host, Instruction, Planner, Product, is_value
from kvpass.lowering.tape.trace import Operand, Traced, trace
from kvpass.lowering.tape.words import CALLS, Value

SOURCE = cpp.SOURCE.with_name("tape.cpp")
_MOST_KEPT = 1 << 28  # bytes between calls


class OutOfRange(IndexError):
    """An index that the model's own op would have refused."""


_FUNCTIONS = {
    "floor_div": operator.floordiv, "floor_mod": operator.mod, "larger": max, "smaller": min, "ToFloat": float,
    "IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv, "FloatPow": operator.pow, "CeilToInt": math.ceil,
    "FloorToInt": math.floor, "TruncToInt": math.trunc, "TruncToFloat": lambda x: float(math.trunc(x)),
    "RoundToInt": round, "CeilDiv": lambda a, b: -(-a // b),
}  # fmt: skip


def _numbers(symbols: Sequence[sympy.Symbol], wanted: Sequence[Any]) -> Callable[..., list[Any]]:
    """What these expressions are for the numbers of a call."""
    plain = [_as_calls(e) if isinstance(e, sympy.Basic) else e for e in wanted]
    made: Callable[..., list[Any]] = sympy.lambdify(list(symbols), plain, modules=[_FUNCTIONS, "math"], cse=False)
    return made


def _as_calls(expr: sympy.Basic) -> sympy.Basic:
    """The same, with calls for operators: sympy prints ``a % (b*c)`` without its brackets."""
    for kind, name in CALLS.items():
        expr = expr.replace(kind, sympy.Function(name.partition("<")[0]))
    return expr


class Unexpected(RuntimeError):
    """An op made another shape or type than it does without contents."""


def _runs(steps: Sequence[Instruction | Host]) -> list[list[Instruction | Host]]:
    """Neighbours that can go through the rows together: none reads another row of what one before it makes."""
    runs: list[list[Instruction | Host]] = []
    made: set[int] | None = None
    for step in steps:
        if isinstance(step, Host) or not step.by_rows:
            runs.append([step])
            made = None
            continue
        if made is None or step.across & made:
            runs.append([])
            made = set()
        runs[-1].append(step)
        made.add(step.buffers[-1])
    return runs


def _stands_as(tensor: Tensor, value: Value | None) -> bool:
    """True where a tensor has the sizes, the strides and the type that a tape was made for."""
    if value is None:
        return False
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype) == (value.sizes, value.strides, value.dtype)


class Tape:
    """One decode step, compiled.

    Args:
        module: the incremental graph.
        operands: what its arguments are, in order.
        hints: a value of each symbol, in the order in which a call gives their values.
        rows: the symbol of the new rows, where they are many.

    Raises:
        Untraceable: an op needs to know contents before it runs.
        NoCompiler: nothing can be compiled here.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        operands: Sequence[Operand],
        hints: Mapping[sympy.Symbol, int],
        rows: sympy.Symbol | None = None,
    ) -> None:
        with tracer.tracing:
            traced = trace(module, operands, hints)
            plan = Planner(module, traced, operands, rows)
        self._rows = None if plan.by_rows is None else plan.by_rows.places[traced.symbols[rows]]
        self.lock = threading.Lock()
        self.buffers, self.outputs = plan.buffers, plan.outputs
        steps = [plan.product(step) if isinstance(step, Product) else step for step in plan.steps]
        self.hosts = [step for step in steps if isinstance(step, Host)]
        runs = _runs(steps)
        self._share(runs, plan)
        self._assemble(runs)
        self._prepare(plan.symbols, traced)

    def _share(self, runs: Sequence[Sequence[Instruction | Host]], plan: Planner) -> None:
        """Buffers that are never needed at the same time, and have one size, share memory.

        What goes through the rows block by block is all needed at the same time, but for buffers whose rows stand at
        the same places.
        """
        last: dict[int, tuple[int, int]] = {}
        for r, run in enumerate(runs):
            for k, step in enumerate(run):
                last.update(dict.fromkeys(step.buffers, (r, k)))
        self.slots: list[sympy.Expr] = []
        free: dict[sympy.Expr, list[int]] = {}
        born: dict[int, int] = {}
        for r, run in enumerate(runs):
            here: dict[Any, list[int]] = {}  # of this run's own, by where their rows stand
            ended: list[int] = []
            for k, step in enumerate(run):
                for b in dict.fromkeys(step.buffers):
                    buffer = self.buffers[b]
                    if b in born or buffer.made is None or buffer.host or buffer.kept:
                        continue
                    born[b] = r
                    size = sympy.expand(buffer.made.count * buffer.made.dtype.itemsize)
                    places = here.get(plan.rows_at(buffer.made)) or free.get(size)
                    if not places:
                        self.slots.append(size)
                        places = [len(self.slots) - 1]
                    buffer.slot = places.pop()
                for b in dict.fromkeys(step.buffers):
                    buffer = self.buffers[b]
                    if last[b] != (r, k) or buffer.slot is None or buffer.made is None:
                        continue
                    (here.setdefault(plan.rows_at(buffer.made), []) if born[b] == r else ended).append(buffer.slot)
            for slot in itertools.chain(ended, *here.values()):
                free.setdefault(self.slots[slot], []).append(slot)

    def _assemble(self, runs: Sequence[Sequence[Instruction | Host]]) -> None:
        """One function for equal texts, and a table of what to call."""
        texts: dict[str, int] = {}
        table: list[tuple[int, int, int]] = []
        operands: list[int] = []
        self.stretches: list[tuple[int, int] | Host] = []
        begin = 0
        for run in runs:
            for k, step in enumerate(run):
                if isinstance(step, Host):
                    if len(table) > begin:
                        self.stretches.append((begin, len(table)))
                    begin = len(table)
                    self.stretches.append(step)
                    continue
                together = len(run) if k == 0 and step.by_rows else 0
                table.append((texts.setdefault(step.text, len(texts)), len(operands), together))
                operands += [*step.buffers, *step.numbers]
        if len(table) > begin:
            self.stretches.append((begin, len(table)))
        head = (
            "int f{0}(void* const* base, const int32_t* a, const int64_t* s, [[maybe_unused]] int64_t first, "
            "[[maybe_unused]] int64_t last) {{\n"
        )
        functions = [head.format(k) + text + "  return 0;\n}\n" for text, k in texts.items()]
        names = ", ".join(f"f{k}" for k in range(len(texts))) or "nullptr"
        functions.append(f"constexpr Function FUNCTIONS[] = {{{names}}};")
        facts = {"functions": "\n".join(functions), "rows": self._rows or 0}
        self.source = specialise(SOURCE.read_text(), facts, "//")
        self.functions, self.instructions = len(texts), len(table)
        library = build.load(self.source)
        self._run = library.kvpass_tape
        self._run.restype = ctypes.c_int
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 3]
        self._table = np.array(table or [(0, 0, 0)], np.int32)
        self._operands = np.array(operands or [0], np.int32)

    def _prepare(self, symbols: Sequence[sympy.Symbol], traced: Traced) -> None:
        self._weights: object = None
        self._base = np.zeros(max(1, len(self.buffers)), np.uint64)
        self._size = _numbers(symbols, self.slots)
        self._memory: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * len(self.slots)
        self._of_slot: list[list[int]] = [[] for _ in self.slots]
        self._inputs: list[tuple[int, int]] = []
        self._fixed: list[tuple[int, int]] = []
        self._fresh: list[int] = []
        for b, buffer in enumerate(self.buffers):
            if buffer.tensor is not None:
                self._base[b] = address(buffer.tensor)
                if buffer.argument is not None:
                    self._fixed.append((b, buffer.argument))
            elif buffer.address is not None:
                self._base[b] = buffer.address
            elif buffer.argument is not None:
                self._inputs.append((b, buffer.argument))
            elif buffer.slot is not None:
                self._of_slot[buffer.slot].append(b)
            elif buffer.made is not None and not buffer.host:
                self._fresh.append(b)
        self._held: Sequence[Any] = [self.buffers[b].tensor for b, _ in self._fixed]
        self._given = [self.buffers[b].given for b, _ in self._fixed]
        places = [argument for _, argument in self._fixed]
        self._pick: Callable[[Sequence[Any]], Sequence[Any]] = (
            operator.itemgetter(*places) if len(places) > 1 else lambda args: [args[k] for k in places]
        )
        guards = [g for g in traced.guards if g is not sympy.true]
        self._guard = _numbers(symbols, guards)
        used: dict[Any, None] = {}
        shown = [
            self.outputs,
            [(h.args, h.kwargs, h.out) for h in self.hosts],
            [self.buffers[b].made for b in self._fresh],
        ]
        for leaf in pytree.tree_leaves(shown, is_leaf=is_value):
            parts = (*leaf.sizes, *leaf.strides, leaf.offset) if isinstance(leaf, Value) else (leaf,)
            used.update(dict.fromkeys(p for p in parts if isinstance(p, sympy.Basic)))
        self._shown = list(used)
        self._show = _numbers(symbols, self._shown)

    def suits(self, args: Sequence[Any], numbers: Sequence[int], weights: object) -> bool:
        """Whether the tape was made for such a call; the caller holds the lock.

        Args:
            weights: another object where weights may have moved since the last call; a pool that moves is another one.
        """
        if self._fixed:
            now = self._pick(args)
            if weights is not self._weights or not all(map(operator.is_, now, self._held)):
                if not all(map(_stands_as, now, self._given)):
                    return False
                for (b, _), tensor in zip(self._fixed, now, strict=True):
                    self.buffers[b].tensor, self._base[b] = tensor, address(tensor)
                self._held, self._weights = now, weights
        return all(self._guard(*numbers))

    def __call__(self, args: Sequence[Any], numbers: Sequence[int]) -> tuple[Any, ...]:
        """The outputs of a call; the caller holds the lock.

        Args:
            args: those of the graph.
            numbers: the values of the symbols.

        Raises:
            OutOfRange: an index is not in its table.
            MemoryError: no memory for the scratch of an attention.
        """
        base = self._base
        for k, (size, memory_) in enumerate(zip(self._size(*numbers), self._memory, strict=True)):
            if size > memory_.numel():
                self._memory[k] = made = torch.empty(size + size // 4 + 64, dtype=torch.uint8)
                base[self._of_slot[k]] = made.data_ptr()
        tensors: dict[int, Tensor] = {}
        addresses: dict[int, int] = {}
        for b, argument in self._inputs:
            tensor = args[argument]
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
            tensors[b] = tensor
            where = addresses.get(id(tensor))
            if where is None:
                where = addresses[id(tensor)] = address(tensor)
            base[b] = where
        shown = dict(zip(self._shown, self._show(*numbers), strict=True))
        for b in self._fresh:
            made_ = self.buffers[b].made
            assert made_ is not None
            tensors[b] = made = torch.empty_strided(
                [int(shown[x]) for x in made_.sizes], [int(shown[x]) for x in made_.strides], dtype=made_.dtype
            )
            base[b] = made.data_ptr()
        s = np.array([torch.get_num_threads(), *numbers], np.int64)
        for stretch in self.stretches:
            if isinstance(stretch, Host):
                self._host(stretch, tensors, shown)
                continue
            failed = self._run(
                self._table.ctypes.data, *stretch, self._operands.ctypes.data, base.ctypes.data, s.ctypes.data
            )
            if failed:
                raise MemoryError("no memory for the scratch of an attention") if failed == 1 else OutOfRange()
        outputs = tuple(self._shown_as(leaf, tensors, shown) for leaf in self.outputs)
        if self._rows is not None and sum(x.numel() for x in self._memory) > _MOST_KEPT:
            self._memory = [torch.empty(0, dtype=torch.uint8)] * len(self.slots)
        return outputs

    def _shown_as(self, what: Any, tensors: Mapping[int, Tensor], shown: Mapping[Any, Any]) -> Any:
        """A value as a tensor, a number as Python has it."""
        if not isinstance(what, Value):
            return int(shown[what]) if isinstance(what, sympy.Basic) else what
        buffer = self.buffers[what.buffer]
        shape, strides = [int(shown[x]) for x in what.sizes], [int(shown[x]) for x in what.strides]
        offset = int(shown[what.offset])
        if buffer.slot is not None:
            flat = self._memory[buffer.slot]
            whole = flat[: flat.numel() // what.dtype.itemsize * what.dtype.itemsize].view(what.dtype)
            return whole.as_strided(shape, strides, offset)
        tensor = buffer.tensor if buffer.tensor is not None else tensors[what.buffer]
        if tensor.dtype != what.dtype:  # complex numbers that are read as real ones, or the other way round
            first = tensor.storage_offset() * tensor.element_size() // what.dtype.itemsize + offset
            return torch.empty(0, dtype=what.dtype).set_(tensor.untyped_storage(), first, shape, strides)
        if list(tensor.shape) == shape and list(tensor.stride()) == strides and offset == 0:
            return tensor
        return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)

    def _host(self, host: Host, tensors: dict[int, Tensor], shown: Mapping[Any, Any]) -> None:
        def given(x: Any) -> Any:
            return self._shown_as(x, tensors, shown)

        args, kwargs = pytree.tree_map(given, (host.args, host.kwargs), is_leaf=is_value)
        results = pytree.tree_leaves(host.target(*args, **kwargs))
        for value, result in zip(pytree.tree_leaves(host.out, is_leaf=is_value), results, strict=True):
            if not isinstance(value, Value) or value != self.buffers[value.buffer].made:
                continue  # a number, or a view of what was there before
            shape, strides = [int(shown[x]) for x in value.sizes], [int(shown[x]) for x in value.strides]
            if list(result.shape) != shape or result.dtype != value.dtype:
                raise Unexpected(f"{host.target} made {tuple(result.shape)} where {tuple(shape)} was expected")
            if list(result.stride()) != strides or self._is_scratch(result):
                copy = torch.empty_strided(shape, strides, dtype=value.dtype)
                result = copy.copy_(result)
            tensors[value.buffer] = result
            self._base[value.buffer] = address(result)

    def _is_scratch(self, tensor: Tensor) -> bool:
        """Whether an op gave back memory that other values will take."""
        storage = tensor.untyped_storage()._cdata
        return any(storage == piece.untyped_storage()._cdata for piece in self._memory)
