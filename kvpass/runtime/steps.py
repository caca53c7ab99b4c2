"""Steps and prompts: which call takes which tape, and when a tape is there.

A call runs a tape (`kvpass.lowering.tape`) as soon as one has been made for its regime; until then, and where none can
be made, it runs the incremental graph op by op. Tapes are made in the background and taken up between two calls.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from kvpass.analysis.sweep import sym
from kvpass.forked import Locked, in_child
from kvpass.ir import Captured, Role
from kvpass.lowering.build import NoCompiler
from kvpass.lowering.tape import Operand, OutOfRange, Tape, Unexpected, Untraceable
from kvpass.runtime import huge
from kvpass.runtime.compare import difference, limits
from kvpass.runtime.weights import Weights

log = logging.getLogger("kvpass")
TIERS = ("auto", "compiled", "eager")
FEW = 16  # new rows of all sequences: with more, products of matrices are PyTorch's
_LEAST_CACHED = 2  # rows: a tape is made with a call at hand, of which no size may be zero or one by chance
_MOST_MADE = 3  # tapes for one regime, where sizes of the first ones were taken for ever
_NICER = 10  # of threads that compile

P, N = (sympy.Symbol(name, integer=True, positive=True) for name in ("start", "new"))


@dataclass(frozen=True)
class Regime:
    """What one tape is made for: one new row or several or many, one sequence or several, contexts of certain sizes.

    Attributes:
        many: whether products are PyTorch's.
        cold: whether nothing is cached.
        small: by place among the arguments, the sizes that are zero or one: broadcasting treats those alike.
        tables: by slot, the first one that has the same table of pages.
    """

    one_row: bool
    many: bool
    cold: bool
    small: tuple[tuple[int, int], ...]
    tables: tuple[int, ...]
    shapes: tuple[Any, ...]

    def __str__(self) -> str:
        rows = "one new row" if self.one_row else "many new rows" if self.many else "several new rows"
        if self.cold:
            rows += " and no other"
        return f"{rows}, {'one sequence' if self.small else 'any batch'}"


class Arguments:
    """What the arguments of an incremental graph are, over the numbers that change from call to call."""

    def __init__(self, captured: Captured, slots: int) -> None:
        nodes = {n.name: n.meta["val"] for n in captured.module.graph.nodes if n.op == "placeholder"}
        self.captured, self.slots = captured, slots
        self.first = len(captured.inputs)
        self.values = [nodes[i.name] for i in captured.inputs]
        self.fixed = {i.index for i in captured.of(Role.CONSTANT)}
        sizes = {i.index: sym(self.values[i.index]) for i in captured.of(Role.SYMBOL)}
        places = {size: k for k, size in sizes.items() if size.is_Symbol and size != captured.seq}
        self.symbols = {k: size for size, k in places.items()}  # a size may be given twice
        self.extra = self.first + 2 + 4 * slots

    def regime(self, args: Sequence[Any], start: int, new: int, many: bool = False) -> Regime:
        shapes = tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in args[self.extra :])
        small = tuple((k, int(args[k])) for k in self.symbols if args[k] <= 1)
        first: dict[int, int] = {}
        tables = tuple(first.setdefault(id(table), k) for k, table in enumerate(args[self.first + 3 : self.extra : 4]))
        return Regime(new == 1, many, many and start == 0, small, tables, shapes)

    def _table(self, slot: int) -> int:
        """The place of a slot's table among the arguments; its run stands behind it."""
        return self.first + 3 + 4 * slot

    def numbers(self, regime: Regime, args: Sequence[Any], start: int, new: int) -> list[int]:
        """The values of the symbols of a call."""
        out = [] if regime.cold else [start]
        out += [] if regime.one_row else [new]
        out += [int(args[k]) for k in self.symbols if args[k] > 1]
        for slot in dict.fromkeys(regime.tables):
            at = self._table(slot)
            out += [args[at].shape[1], args[at + 1]]
        return out

    def tape(self, regime: Regime, module: fx.GraphModule, args: Sequence[Any], start: int, new: int) -> Tape:
        """Compile the graph for a regime; ``args`` are those of a call, of which rows may differ.

        Raises:
            Untraceable, NoCompiler: it cannot be.
        """
        if any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in args):
            raise Untraceable("it is not on a CPU")
        rows, before = sympy.S.One if regime.one_row else N, sympy.S.Zero if regime.cold else P
        known: dict[sympy.Symbol, sympy.Expr] = {self.captured.seq: before + rows - self.captured.lead}
        known |= {self.symbols[k]: sympy.Integer(size) for k, size in regime.small}
        symbols = [x for x in (before, rows) if x.is_Symbol]
        symbols += [size for k, size in self.symbols.items() if args[k] > 1]
        batch = sympy.sympify(self.captured.batch).xreplace(known)
        operands = [self._operand(k, known, args) for k in range(self.first)]
        operands += [Operand(number=before + rows), Operand(number=before)]
        tables: dict[int, list[sympy.Symbol]] = {}
        for k in dict.fromkeys(regime.tables):
            pages, run = sympy.Symbol(f"pages_{k}", integer=True, positive=True), sympy.Symbol(f"run_{k}", integer=True)
            tables[k] = [pages, run]
            symbols += tables[k]
        for slot, k in enumerate(regime.tables):
            pages, run = tables[k]
            operands += [
                Operand(fixed=args[self._table(slot) - 1]),
                Operand(sizes=(batch, pages), dtype=torch.int32),
                Operand(number=run),
                Operand(sizes=(batch * rows,), dtype=torch.int64),
            ]
        for value in args[self.extra :]:
            if not isinstance(value, torch.Tensor):
                raise Untraceable("a number that depends on the context")
            operands.append(Operand(sizes=tuple(map(sympy.Integer, value.shape)), dtype=value.dtype))
        hints = dict(zip(symbols, self.numbers(regime, args, start, new), strict=True))
        return Tape(module, operands, hints, N if regime.many else None)

    def _operand(self, k: int, known: Mapping[sympy.Symbol, sympy.Expr], args: Sequence[Any]) -> Operand:
        value = self.values[k]
        if not isinstance(value, torch.Tensor):
            return Operand(number=sym(value).xreplace(known))
        if k in self.fixed:
            return Operand(fixed=args[k])
        return Operand(sizes=tuple(sym(size).xreplace(known) for size in value.shape), dtype=value.dtype)


@dataclass
class _Made:
    """A tape, or why there is none."""

    tape: Tape | None
    reason: str = ""
    compared: bool = False


class Steps(Locked):
    """The tapes of one incremental graph.

    Args:
        module: the graph that a tape stands for.
        tiers: ``auto`` compiles in the background, ``compiled`` before the first call that needs it, ``eager`` never.
        compare: run the first call of each tape op by op as well, and drop the tape where they differ.
    """

    def __init__(self, captured: Captured, module: fx.GraphModule, slots: int, tiers: str, compare: bool) -> None:
        super().__init__()
        self.module, self.tiers, self.compare = module, tiers, compare
        self._limits = limits(captured.module.graph)
        self.arguments = Arguments(captured, slots)
        self._made: dict[Regime, list[_Made]] = {}
        self._pending: dict[Regime, Future[None]] = {}
        self._met: set[Regime] = set()
        self._settled: Weights | None = None
        self._settling: Future[int] | None = None
        self._said: set[str] = set()

    def run(self, args: Sequence[Any], start: int, rows: int, batch: int, weights: Weights) -> tuple[Any, ...] | None:
        """The outputs of a call, or None where it has to run op by op.

        Args:
            weights: another object where one may have moved.
        """
        new = rows - start
        if self.tiers == "eager" or rows < _LEAST_CACHED:
            return None
        if weights is not self._settled and self._made:
            self._settled = weights
            self._settling = _WORKER.submit(huge.settle, weights.tensors)
        many = new * batch > FEW
        if (many or start < _LEAST_CACHED) and batch <= FEW:
            one = self.arguments.regime(args, start, 1)
            if not self._made.get(one):
                self._want(one, args, rows, 1)  # one row is what comes next
        if start < _LEAST_CACHED and not many:
            return None
        regime = self.arguments.regime(args, start, new, many)
        if many and self.tiers == "auto" and regime not in self._met:
            self._met.add(regime)  # a program that reads one prompt has no use for a tape
            return None
        numbers = self.arguments.numbers(regime, args, start, new)
        if not self._made.get(regime):
            self._want(regime, args, start, new)
        for made in self._made.get(regime, ()):
            # Its memory is that of one call: a second thread runs op by op meanwhile.
            if made.tape is None or not (lock := made.tape.lock).acquire(blocking=False):
                return None
            try:
                if made.tape.suits(args, numbers, weights):
                    return self._taken(made, args, numbers)
            finally:
                lock.release()
        self._want(regime, args, start, new)
        return None

    def _taken(self, made: _Made, args: Sequence[Any], numbers: Sequence[int]) -> tuple[Any, ...] | None:
        if made.tape is None:
            return None
        with torch.no_grad():
            try:
                found = made.tape(args, numbers)
            except OutOfRange:  # the op itself says which index
                return None
            except Unexpected as error:
                self._drop(made, str(error))
                return None
            if made.compared or not self.compare:
                return found
            kept = [x.clone() if isinstance(x, torch.Tensor) else x for x in found]
            expected: tuple[Any, ...] = self.module.forward(*args)  # last: these are the rows that stay in the pools
        made.compared = True
        if problem := next(filter(None, map(difference, kept, expected, self._limits)), ""):
            self._drop(made, problem)
        return expected

    def _drop(self, made: _Made, problem: str) -> None:
        made.tape, made.reason = None, f"the compiled step differs: {problem}"
        self._say(f"{made.reason}; it runs op by op")

    def _want(self, regime: Regime, args: Sequence[Any], start: int, new: int) -> None:
        """See to it that there is a tape for such calls, soon or now."""
        with self._lock:
            held = self._made.get(regime, [])
            if regime in self._pending or len(held) >= _MOST_MADE or any(m.tape is None for m in held):
                return
            start = max(start, _LEAST_CACHED)
            future = self._pending[regime] = _WORKER.submit(self._prepare, regime, list(args), start, new)
        if self.tiers == "compiled":
            future.result()

    def _prepare(self, regime: Regime, args: Sequence[Any], start: int, new: int) -> None:
        made = self._make(regime, args, start, new)
        with self._lock:
            self._made.setdefault(regime, []).append(made)
            del self._pending[regime]

    def _make(self, regime: Regime, args: Sequence[Any], start: int, new: int) -> _Made:
        try:
            return _Made(self.arguments.tape(regime, self.module, args, start, new))
        except (Untraceable, NoCompiler) as error:
            return _Made(None, str(error))
        except Exception as error:  # a defect of ours costs speed, not an answer
            log.debug("a step could not be compiled", exc_info=True)
            self._say(f"a step could not be compiled, and runs op by op: {type(error).__name__}: {error}")
            return _Made(None, f"{type(error).__name__}: {error}")

    def _forked(self) -> None:
        """What was being compiled is compiled anew, and so is a tape that was running, whose memory is in use."""
        self._pending.clear()
        self._settling = None
        for held in self._made.values():
            held[:] = [made for made in held if made.tape is None or not made.tape.lock.locked()]

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)

    def pending(self) -> list[Future[Any]]:
        """What is being made now."""
        with self._lock:
            return [*self._pending.values(), *([] if self._settling is None else [self._settling])]

    def describe(self) -> list[tuple[str, Tape | None, str]]:
        """Each regime that has been asked for, with its tape or the reason why there is none."""
        with self._lock:
            return [(str(regime), made.tape, made.reason) for regime, held in self._made.items() for made in held]


def _step_aside() -> None:
    """The thread, and the compilers that it starts, take what the model leaves over."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICER)


def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="kvpass-compile", initializer=_step_aside)


def _forked() -> None:
    global _WORKER
    _WORKER = _worker()


_WORKER = _worker()  # its thread begins with the first compilation
in_child(_forked)
