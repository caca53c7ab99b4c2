"""The words that the whole compiler uses: what has been learnt at each stage, and the attention node.

Data flows one way: `Captured` -> `Analyzed` -> `Plan` -> `Incremental` -> `Program`. The first one and the vocabulary
that several levels share stand here; the others stand beside the pass that makes them.

Letters for sizes, everywhere: ``B`` batch, ``H`` query heads, ``K`` key/value heads, ``G = H // K`` group, ``S`` all
rows, ``P`` cached rows, ``N = S - P`` new rows, ``D`` head size.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import sympy
import torch
from torch import fx


class Role(enum.Enum):
    """What an input of the captured graph is to the cache."""

    SYMBOL = "symbol"  # a size
    CONSTANT = "constant"  # a parameter, buffer or other tensor of the model: known by identity and version
    SEQUENCE = "sequence"  # has the sequence axis: its rows are the key
    FORM = "form"  # a [S, S] mask whose closed form was recognised; compared with it at every call
    CONTEXT = "context"  # everything else: its bytes are part of the key of every row


class Entries(enum.Enum):
    """All that an input holds, as far as one call tells: padding, as a rule, and the proof may take it for that."""

    FLAGS = "zeros and ones"
    MASK = "zeros and very negative numbers"


@dataclass(frozen=True)
class Input:
    """One placeholder. ``seq_axes`` are its sequence axes, ``batch_axis`` the batch axis or None."""

    name: str
    index: int
    role: Role
    source: str = ""
    seq_axes: tuple[int, ...] = ()
    batch_axis: int | None = None
    form: sympy.Basic | None = None
    entries: Entries | None = None


@dataclass(frozen=True)
class Captured:
    """A functional ATen graph with symbolic sizes.

    Attributes:
        module: the graph; outputs are a flat tuple.
        inputs: one entry per placeholder, in order.
        seq: symbol of the sequence's length. ``batch``: size of the batch, a symbol or a number.
        constants: by placeholder name, the real tensors whose identity the graph may rely on.
        lead: how many entries a prefix of the context has where it stands before the rows, on one axis with them.
        scalars: by placeholder index, the Python numbers that Dynamo passes as 0-d tensors, as the graph has them.
        guards: what must hold of the length where the graph is one of several: blocks of 512 rows in a Python loop.
        aligned: from the arguments of a call to the last of the inputs, rows that the context brings; None where all
            inputs are arguments.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    seq: sympy.Symbol
    batch: sympy.Expr
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scalars: Mapping[int, Any] = field(default_factory=dict)
    lead: sympy.Expr = sympy.S.Zero
    guards: tuple[sympy.Basic, ...] = ()
    aligned: fx.GraphModule | None = None

    def takes(self, length: int) -> bool:
        """Whether the graph is valid for texts of so many rows."""
        return all(holds(guard, self.seq, length) for guard in self.guards)

    @property
    def rows_first(self) -> bool:
        """Whether texts stand in columns, ``[S, B]``."""
        return any(i.batch_axis is not None and i.seq_axes[0] < i.batch_axis for i in self.of(Role.SEQUENCE))

    @property
    def arguments(self) -> int:
        """How many of the inputs are arguments of a call."""
        made = () if self.aligned is None else self.aligned.graph.output_node().args[0]
        return len(self.inputs) - len(made)  # type: ignore[arg-type]

    def of(self, *roles: Role) -> list[Input]:
        return [i for i in self.inputs if i.role in roles]


def is_dense(sizes: Sequence[sympy.Expr], strides: Sequence[sympy.Expr]) -> bool:
    """Row by row, without holes, for sizes of which nothing is known (`Tensor.is_contiguous` would guard them)."""
    expected: sympy.Expr = sympy.S.One
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected and sympy.expand(stride - expected) != 0:
            return False
        expected = expected * size
    return True


def holds(guard: sympy.Basic, symbol: sympy.Symbol, number: int) -> bool:
    """Whether a guard of one symbol is true of a number."""
    try:
        return bool(guard.xreplace({symbol: sympy.Integer(number)}) == sympy.true)
    except (ZeroDivisionError, ValueError, AssertionError):
        return False  # chunks of n // 64 rows, log2(n - 9), what sizes are asserted to be: torch would have raised, too


class Step(enum.Enum):
    """How many new rows a call has."""

    ANY = "any"
    DECODE = "decode"  # few: every key is read once for all of them
    PREFILL = "prefill"  # many: blocks of queries against blocks of keys


@dataclass(frozen=True)
class Read:
    """A tensor that a score or a support reads.

    In a score it is ``name(b, h, i, j)`` and has an axis for each letter of ``axes``, in this order; its axis ``i``
    begins at the first new row. In a support it is ``name(..)`` with an axis for each argument, over all rows.
    """

    name: str
    dtype: torch.dtype
    axes: str = ""


@dataclass(frozen=True)
class Attention:
    """Softmax attention, the waist between analysis and code generation.

    ``out[b, h, i] = sum_j softmax_j(score(q[b, h, i] . k[b, h // group, j]))[j] * v[b, h // group, j]`` over the ``j``
    inside ``support``. The reference interpreter, `kvpass.kernels.reference`, is its definition; its text form is
    `kvpass.kernels.text`.

    Attributes:
        heads, kv_heads: ``H`` and ``K``; ``group`` query heads share one key/value head.
        head_size, value_size: ``D`` of queries and keys, and of values.
        dtype: of queries, keys and values.
        scale: multiplies the raw score before ``score``.
        score: expression over ``score``, the indices ``b h i j`` (rows, not offsets) and reads ``name(b, h, i, j)``.
        support: predicate over ``b h i j`` outside which a key is not seen. ``i`` and ``j`` are rows.
        reads: the tensors that ``score`` and ``support`` read.
        softmax_dtype: in which the normaliser is computed; None leaves it to the kernel.
        empty_is_nan: a row that sees no key is NaN (a spelled-out softmax over -inf) instead of zero (ATen's SDPA).
        sink: a read of axes ``h`` whose entry joins the normaliser of each row and has no value, or None.
        batch: the number of sequences, None for any.
        page_size: rows of a page of keys and values; None where they are one table.
        step: the regime.
    """

    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    dtype: torch.dtype
    scale: float
    score: sympy.Expr
    support: sympy.Basic
    reads: tuple[Read, ...] = ()
    softmax_dtype: torch.dtype | None = None
    empty_is_nan: bool = False
    sink: str | None = None
    batch: int | None = None
    page_size: int | None = None
    step: Step = Step.ANY

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def mask(self) -> str:
        """The support as text, ``True`` where every key is seen."""
        return str(self.support)


SCORE = sympy.Symbol("score", real=True)
B, H, I, J = sympy.symbols("b h i j", integer=True, nonnegative=True)  # noqa: E741


@dataclass(frozen=True)
class Layout:
    """How a pool ``[*before, pages, page_size, *after]`` holds the keys or the values of an attention.

    Attributes:
        before: how many axes stand before the pages.
        outside: the heads stand before the pages; else behind them, inside of a row.
        factor: from head to head: in steps of the innermost axis before the pages, or in elements of a row.
    """

    before: int
    outside: bool
    factor: int


class Lowering(Protocol):
    """What makes a kernel of an attention; `kvpass.lowering` has one for each kind of device."""

    def __call__(
        self, spec: Attention, device: torch.device, key: Layout | None, value: Layout | None
    ) -> Callable[..., torch.Tensor] | None:
        """The kernel, or None where this shape is left to the reference.

        Args:
            key, value: the layouts of pools; None where the rows are one tensor ``[B, K, S, D]``.

        Returns:
            ``kernel(query, key, value, start, rows, reads)``: ``query`` is ``[B, H, N, D]``, ``key`` and ``value`` are
            ``(pool, table, run)`` or ``(tensor,)``, ``rows`` says how many keys there are and ``reads`` lists the
            tensors of ``spec.reads``. Its attribute ``lowering`` is a name for people, ``source`` the generated text.
        """
        ...


class KernelOps(Protocol):
    """What an incremental graph calls on the pools; `kvpass.kernels.ops` says what each does."""

    def append(self, pool: torch.Tensor, rows: torch.Tensor, place: torch.Tensor, before: int) -> torch.Tensor: ...

    def read(self, pool: torch.Tensor, table: torch.Tensor, run: int, length: int, before: int) -> torch.Tensor: ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor: ...

    def experts(self, x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor: ...

    def visible(
        self,
        support: sympy.Basic,
        device: torch.device,
        heads: int,
        start: int,
        rows: int,
        names: tuple[str, ...],
        loads: tuple[torch.Tensor, ...],
        keys: int | None = None,
    ) -> torch.Tensor | None: ...

    def attention(
        self,
        spec: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        start: int,
        names: tuple[str, ...],
        loads: tuple[torch.Tensor, ...],
    ) -> torch.Tensor: ...


def by_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call in the order of its schema; what it is not given is as it is by default."""
    schema = target._schema.arguments
    given = {**dict(zip((a.name for a in schema), args, strict=False)), **kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in schema if a.name in given or a.has_default_value()}


# Where the storage of a tensor begins, whatever entry of it is the tensor's first.
storage_address: Callable[[torch.Tensor], int] = torch._C._data_address  # type: ignore[attr-defined]


def address(tensor: torch.Tensor) -> int:
    """Where a tensor's first entry stands, without the writable pointer that ``data_ptr()`` asks for.

    That would copy a lent tensor, and it is how `kvpass.runtime.written` tells that somebody may write.
    """
    return storage_address(tensor) + int(tensor.storage_offset()) * tensor.element_size()
