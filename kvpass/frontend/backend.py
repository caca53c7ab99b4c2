"""The backend that `torch.compile(model, backend="kvpass")` finds."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import convert_frame, eval_frame
from torch.fx._lazy_graph_module import _LazyGraphModule

from kvpass import errors
from kvpass.analysis.facts import Kind
from kvpass.analysis.sweep import Analyzed
from kvpass.cache import Cache
from kvpass.frontend import autocast, substitutes  # noqa: F401  (before Dynamo traces)
from kvpass.frontend.capture import captures, copied
from kvpass.frontend.higher_order import inlined
from kvpass.frontend.pipeline import incrementalise
from kvpass.frontend.verify import PlainFailed, verify
from kvpass.frontend.wrapped import unwrapped
from kvpass.ir import Captured
from kvpass.runtime import default_cache
from kvpass.runtime.program import Program
from kvpass.runtime.steps import TIERS
from kvpass.transforms.rewrite import Incremental

log = logging.getLogger("kvpass")


@dataclass(frozen=True)
class Options:
    """Options of the backend.

    Attributes:
        cache: where rows are kept; the process-wide one by default.
        verify: compare the rewritten graph with the captured one, on the real weights, before it is used.
        autotune: on a GPU, measure configurations of each attention kernel on its first call; winners stay on disk.
        tiers: when steps of a few rows are compiled on a CPU: ``auto``, in the background while calls run op by op;
            ``compiled``, before the first call that needs one; ``eager``, never. ``$KVPASS_TIERS`` is the default.
    """

    cache: Cache | None = None
    verify: bool = True
    autotune: bool = False
    tiers: str = field(default_factory=lambda: os.environ.get("KVPASS_TIERS", "auto"))

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """Options from what the user wrote.

        Raises:
            OptionError: an option does not exist, or its value has the wrong type.
        """
        known = [f.name for f in fields(cls)]
        for name in given or {}:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(known)}"
                raise errors.OptionError(f"kvpass has no option {name!r}{hint}")
        options = cls(**(given or {}))
        if options.cache is not None and not isinstance(options.cache, Cache):
            raise errors.OptionError(f"cache must be a kvpass.Cache, not {type(options.cache).__name__}")
        for name in ("verify", "autotune"):
            value = getattr(options, name)
            if not isinstance(value, bool):
                raise errors.OptionError(f"{name} must be True or False, not {value!r}")
        if options.tiers not in TIERS:
            raise errors.OptionError(f"tiers must be one of {', '.join(map(repr, TIERS))}, not {options.tiers!r}")
        return options


@dataclass(frozen=True)
class Record:
    """One compilation: what was captured, and the program or the refusal that came of it."""

    captured: Captured | None
    program: Program | None
    refusal: errors.Refusal | None


_records: deque[Record] = deque(maxlen=256)
_listeners: list[Callable[[Record], None]] = []


def records() -> list[Record]:
    """The latest compilations of this process, oldest first."""
    return list(_records)


def kvpass(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph of Dynamo's.

    Returns:
        A program over a cache, or the graph as it is where the proof does not go through.

    Raises:
        OptionError: a malformed option.
    """
    chosen = Options.of(options)
    if mode not in (None, "default"):
        raise errors.OptionError(f"kvpass has no mode {mode!r}; leave it out")
    captured: Captured | None = None
    try:
        with _defects_named(), ExitStack() as stack:
            _refuse_unsuitable(gm, example_inputs)
            whole = inlined(gm)
            around = autocast.Around.of(example_inputs)
            model, unwrap = unwrapped(whole, example_inputs)
            plain = around.on(_as_function(model))
            explicit = autocast.written(whole, around)
            if explicit is not whole:
                model, _ = unwrapped(explicit, example_inputs)
            stack.enter_context(around.off())
            inputs = unwrap(example_inputs)
            captured, incremental, written = _proven(model, inputs, autotune=chosen.autotune)
            if isinstance(incremental, errors.Refusal):
                raise incremental
            check = partial(_checked, partial(verify, captured, incremental, plain, _as_function(written)))
            unchecked = chosen.verify and not check(inputs)
            cache = chosen.cache if chosen.cache is not None else default_cache()
            rebuild = partial(_rebuild, written, autotune=chosen.autotune)
            program = Program(captured, incremental, plain, cache, rebuild, chosen.tiers, chosen.verify)
    except errors.Refusal as refusal:
        _record(Record(captured, None, refusal.kept()))
        log.warning("kvpass runs a graph unrewritten. %s", refusal)
        return _as_function(gm)
    if unchecked:
        program.check_first(check)
    _record(Record(captured, program, None))
    called = around.without(program)
    return called if unwrap.idle else lambda *args: called(*unwrap(args))


def _proven(
    gm: fx.GraphModule, inputs: Sequence[Any], *, autotune: bool
) -> tuple[Captured, Incremental | errors.Refusal, fx.GraphModule]:
    """The likeliest reading of the graph, or another one that is proven and answers row by row; and the graph before it
    was rewritten.
    """
    refused: tuple[Captured, errors.Refusal, fx.GraphModule] | None = None
    for captured in captures(gm, inputs):
        written = copied(captured.module)
        try:
            incremental = incrementalise(captured, autotune=autotune)
        except errors.Refusal as refusal:
            if refused is None or refused[0].rows_first or _says_more(captured, refused):
                refused = captured, refusal.kept(), written
        else:
            if refused is None or _answers_by_row(incremental.plan.analyzed):
                return captured, incremental, written
    assert refused is not None
    return refused


def _says_more(captured: Captured, refused: tuple[Captured, errors.Refusal, fx.GraphModule]) -> bool:
    """True of a reading in which a context brings rows, where another one found only that it has as many entries."""
    first, refusal, _ = refused
    return captured.aligned is not None and captured.seq == first.seq and isinstance(refusal, errors.UnsupportedShape)


def _answers_by_row(analyzed: Analyzed) -> bool:
    """True where some output holds rows: what grows is its text, and not what the text speaks of."""
    facts = [analyzed.fact(n) for n in analyzed.outputs if isinstance(n, fx.Node) and n in analyzed.steps]
    return any(f.whole is None and any(atom.kind is Kind.SEQ for atom in f.atoms) for f in facts)


def _checked(compare: Callable[[Sequence[Any]], None], args: Sequence[Any]) -> bool:
    """False where the model itself raises on these arguments: the check waits for better ones.

    Raises:
        Refusal: the two graphs differ.
    """
    with _defects_named():
        try:
            compare(args)
        except PlainFailed:
            return False
    return True


def _rebuild(written: fx.GraphModule, captured: Captured, *, autotune: bool) -> Incremental:
    """The pipeline again, for constants whose contents the proof had used, on the graph as it was captured: what was
    made of it went by their contents.
    """
    with _defects_named():
        return incrementalise(replace(captured, module=copied(written)), autotune=autotune)


@contextmanager
def _defects_named() -> Iterator[None]:
    """A defect of ours leaves the user with the plain model and a report by name, not with a traceback."""
    try:
        yield
    except errors.Refusal:
        raise
    except Exception as error:
        log.debug("kvpass failed", exc_info=True)
        raise errors.Defect(detail=f"{type(error).__name__}: {error}") from error


def _record(record: Record) -> None:
    _records.append(record)
    for listener in list(_listeners):
        listener(record)


def _as_function(gm: fx.GraphModule) -> Callable[..., Any]:
    """A graph as the function that it is.

    The ``forward`` of a graph whose code is not yet made calls the module, which prints a traceback where the model
    raises.
    """
    _LazyGraphModule.force_recompile(gm)
    return gm.forward


def _running_around() -> FrameType | None:
    """The innermost method of a module that runs in Python around the graph that Dynamo compiles now.

    Dynamo gives up a frame without a word where the break is in a loop, and compiles the functions that it calls.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != convert_frame.__file__:
        frame = frame.f_back
    while frame is not None and frame.f_code.co_filename != eval_frame.__file__:
        code = frame.f_code
        caller = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(caller, nn.Module) and code.co_name not in ("_wrapped_call_impl", "_call_impl"):
            return frame
        frame = frame.f_back
    return None


def _refuse_unsuitable(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Graphs that are not the whole model, or whose call needs gradients."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        where = reason.user_stack[-1] if reason.user_stack else None
        place = f"{where.filename}:{where.lineno} in {where.name}" if where is not None else ""
        raise errors.GraphBreak(detail=str(reason.reason).splitlines()[0], source=place)
    if any("torch_dynamo_resume_in" in (node.meta.get("stack_trace") or "") for node in gm.graph.nodes):
        raise errors.GraphBreak(detail="this is what comes after a break")
    around = _running_around()
    if around is not None:
        place = f"{around.f_code.co_filename}:{around.f_lineno} in {around.f_code.co_name}"
        raise errors.GraphBreak(detail="Dynamo runs the model in Python and compiles parts of it", source=place)
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        raise errors.NeedsGradients()
