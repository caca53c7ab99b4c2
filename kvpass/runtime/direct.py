"""A program called again without Dynamo: for loops in which nothing changes but the text.

`torch.compile` holds a call against its guards before it reaches the program: the kinds of all weights, the attributes
of all modules. In a loop of ours none of them can have changed since the last turn; what can, the length, is held
against the guards of the captured graph here, and weights are looked at by the program as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor

from kvpass.analysis.sweep import sym
from kvpass.ir import Role

if TYPE_CHECKING:
    from kvpass.runtime.program import Program

_here = threading.local()


@dataclass(frozen=True)
class Made:
    """One call of a program."""

    program: Program
    args: tuple[Any, ...]
    outputs: tuple[Any, ...]


@contextmanager
def watched() -> Iterator[list[Made]]:
    """Collect the calls of programs that this thread makes inside the block."""
    before, _here.made = getattr(_here, "made", None), list[Made]()
    try:
        yield _here.made
    finally:
        _here.made = before


def note(program: Program, args: Sequence[Any], outputs: tuple[Any, ...]) -> None:
    """Called by programs."""
    made: list[Made] | None = getattr(_here, "made", None)
    if made is not None:
        made.append(Made(program, tuple(args), outputs))


class Direct:
    """A program whose only sequence is one text.

    Args:
        made: a call of it. place, output: of the text among the arguments, and of the logits among the outputs.
    """

    def __init__(self, made: Made, place: int, output: int) -> None:
        self.program, self._args = made.program, list(made.args)
        self._place, self._output = place, output
        captured = made.program.captured
        values = {n.name: n.meta["val"] for n in captured.module.graph.nodes if n.op == "placeholder"}
        self._sizes = {i.index: sym(values[i.name]) for i in captured.of(Role.SYMBOL)}
        self._lengths = [k for k, size in self._sizes.items() if size == captured.seq]
        env = next((v.node.shape_env for v in values.values() if isinstance(v, torch.SymInt)), None)
        self._guards: list[sympy.Basic] = [] if env is None else [guard.expr for guard in env.guards]
        known: dict[Any, Any] = {size: sympy.Integer(made.args[k]) for k, size in self._sizes.items()}
        known.pop(captured.seq, None)
        left = [guard.xreplace(known) for guard in self._guards]
        self._holds: Callable[[int], list[Any]] = sympy.lambdify([captured.seq], left)
        self.known = all(guard.free_symbols <= {captured.seq} for guard in left)

    @classmethod
    def of(cls, made: Sequence[Made], ids: Tensor, logits: Tensor) -> Direct | None:
        """How to make a call like this one again; None where more than one text or one program took part."""
        if len(made) != 1:
            return None
        (one,) = made
        captured = one.program.captured
        sequences = captured.of(Role.SEQUENCE)
        if len(sequences) != 1 or captured.of(Role.FORM) or captured.lead != 0:
            return None
        given = one.args[sequences[0].index]
        same = given.data_ptr() == ids.data_ptr() and given.shape == ids.shape and given.dtype == ids.dtype
        places = [k for k, value in enumerate(one.outputs) if value is logits]
        if not same or not places:
            return None
        direct = cls(one, sequences[0].index, places[0])
        return direct if direct.known else None

    def __call__(self, ids: Tensor) -> Tensor | None:
        """The same output for a longer or shorter text; None where the graph is not made for its length."""
        length = ids.shape[1]
        if length < 2 or not all(self._holds(length)):
            return None
        args = list(self._args)
        args[self._place] = ids
        for k in self._lengths:
            args[k] = length
        found: Tensor = self.program(*args)[self._output]
        return found
