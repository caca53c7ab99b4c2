"""What a report consists of: plain, frozen, all text and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvpass import errors
from kvpass.ir import Captured
from kvpass.transforms.rewrite import Incremental


class Compiled(Protocol):
    """The part of a program that a report looks at."""

    @property
    def incremental(self) -> Incremental | None: ...


class Record(Protocol):
    """One compilation, as the frontend records it."""

    @property
    def captured(self) -> Captured | None: ...
    @property
    def program(self) -> Compiled | None: ...
    @property
    def refusal(self) -> errors.Refusal | None: ...


def incremental_of(record: Record) -> Incremental | None:
    """The rewritten graph, where there is one."""
    return None if record.program is None else record.program.incremental


@dataclass(frozen=True)
class RefusalReport:
    """Why a graph runs as it was written. ``source``: the user's line, ``file:line in function: code``."""

    code: str
    reason: str
    message: str
    node: str
    source: str
    hint: str


@dataclass(frozen=True)
class InputReport:
    """One argument of the graph that is no weight.

    ``role``: ``sequence`` (its rows are the key), ``form`` (a mask over pairs of rows), ``context`` (its bytes are
    part of every row's key), ``rowwise`` (a context of which only what it brings for each row is read) or ``rows``
    (that). ``form``: what it is held to at every call.
    """

    name: str
    role: str
    shape: str
    dtype: str
    form: str = ""


@dataclass(frozen=True)
class OutputReport:
    """One output. ``rows``: ``all``, ``last 1``, or ``none`` (no sequence axis). ``meaningful``: where its rows mean
    anything in any implementation, ``True`` for all of them.
    """

    node: str
    shape: str
    dtype: str
    rows: str
    meaningful: str = "True"


@dataclass(frozen=True)
class LatentReport:
    """Keys and values that are made from one narrow row, and what was weighed.

    Attributes:
        stored: the narrow row is stored; else keys and values are.
        size: numbers in that row.
        latent_bytes, latent_operations: what one more cached row costs a step of one new row with the narrow row
            stored. ``bytes``, ``operations``: the same with keys and values stored.
        turn: from so many new rows on keys and values are made anew, on a long text; None: never.
    """

    stored: bool
    size: int
    latent_bytes: int
    latent_operations: int
    bytes: int
    operations: int
    turn: int | None


@dataclass(frozen=True)
class AttentionReport:
    """One attention that was recognised.

    Attributes:
        mask: which keys ``j`` row ``i`` sees, in closed form. ``proof``: why none of them lies in the future.
        score: what the softmax sees, over ``score``, the product of query and key times ``scale``.
        lowering: what computes it, for instance ``reference``.
        heads, kv_heads, head_size, value_size, dtype, scale: as in `kvpass.ir.Attention`.
        latent: the narrow row that keys and values are made from, if there is one.
    """

    mask: str
    proof: str
    score: str
    lowering: str
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    dtype: str
    scale: float
    node: str
    source: str
    latent: LatentReport | None = None


@dataclass(frozen=True)
class UnrecognisedReport:
    """An attention that runs incrementally as the ops it was written in, and where its recognition ended."""

    node: str
    reason: str
    mask: str
    proof: str
    source: str


@dataclass(frozen=True)
class ReadingReport:
    """An op outside attention that reads other rows than its own, and the proof that none is later."""

    op: str
    mask: str
    proof: str
    node: str
    source: str


@dataclass(frozen=True)
class SlotReport:
    """One stored value. ``shape``: of a row."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes_per_row: int
    is_output: bool
    source: str


@dataclass(frozen=True)
class StepReport:
    """How calls of a few new rows run.

    Attributes:
        regime: which calls. instructions: ops of a step, of which equal ones share one of ``functions`` in C++.
        written: the ops between them that run as they are written, each once.
        reason: why there is no compiled step, or empty.
    """

    regime: str
    instructions: int = 0
    functions: int = 0
    written: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class GraphReport:
    """What was learnt of one graph. Everything but ``refusals`` is empty where it was refused early."""

    proven: bool
    refusals: tuple[RefusalReport, ...] = ()
    inputs: tuple[InputReport, ...] = ()
    outputs: tuple[OutputReport, ...] = ()
    attention: tuple[AttentionReport, ...] = ()
    unrecognised: tuple[UnrecognisedReport, ...] = ()
    readings: tuple[ReadingReport, ...] = ()
    slots: tuple[SlotReport, ...] = ()
    compiled: tuple[StepReport, ...] = ()
    tensors: int = 0
    batch: str = ""
    tail: int | str = 0
    hints: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    """Ends of the first rows on which every row may depend, whatever its own: numbers of the caller's."""
