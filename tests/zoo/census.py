"""A census of the architectures of transformers: which are proven, which are refused and why, which answer wrongly.

    python -m tests.zoo.census --mapping causal --attn sdpa --json zoo.json

Each row runs in a process of its own, forked from a server that has imported torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import operator
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
from torch import nn
from torch.utils import _pytree as pytree

import kvpass
from kvpass import errors
from kvpass.analysis.table import RULES
from kvpass.frontend.api import recording
from kvpass.frontend.backend import Record
from kvpass.report.reading import op_name
from tests.property.oracle import Mismatch, compare
from tests.zoo.encoders import heard, not_hoisted
from tests.zoo.tiny import Attn, Mapped, classes, has_attn, inputs, tiny_model, transformers

Task: TypeAlias = tuple[Mapped, str, Attn]

TIMEOUT = 180.0
MEMORY = 12 << 30
IMPORTED = [
    "torch._dynamo",
    "kvpass.frontend",
    "kvpass.report",
    "tests.property.oracle",
    "tests.zoo.encoders",
    "tests.zoo.tiny",
]
STATUSES = ("proven", "not hoisted", "refused", "pieces", "cannot build", "error", "WRONG")


@dataclass(frozen=True)
class Row:
    """What came of one model.

    Attributes:
        status: ``proven``: rewritten, rows were reused, and all answers are the plain model's; ``refused``: it ran as
            it was written; ``not hoisted``: proven, but the encoder is computed again for an input it has seen;
            ``pieces``: Dynamo split it; ``cannot build``: transformers raised; ``error``: the compiled
            model raised, ran out of time or took its process down; ``WRONG``: an answer differs.
        code, op, node, source, message: of the refusal, or of what was raised.
        missing: the ops of the refused graph that have no rule; the refusal names the first of them only.
        graphs: the largest number of graphs that one call was split into.
        recognised, lowered, unrecognised: attentions; those computed by a generated kernel; why others were none.
        reused: rows that were read from the cache.
        heard: how many encoder inputs there were; of a proven row, each was encoded once.
    """

    mapping: Mapped
    model_type: str
    model: str
    attn: Attn
    status: str
    code: str = ""
    op: str = ""
    node: str = ""
    source: str = ""
    message: str = ""
    missing: tuple[str, ...] = ()
    graphs: int = 0
    recognised: int = 0
    lowered: int = 0
    unrecognised: tuple[str, ...] = ()
    reused: int = 0
    heard: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        told = f"{self.code} {self.op}".strip() if self.status in ("refused", "pieces") else ""
        if self.status == "proven":
            told = f"{self.lowered}/{self.recognised} lowered, {len(self.unrecognised)} unrecognised"
            told += f", {self.heard} encoder inputs encoded once" if self.heard else ""
        if self.missing:
            told += f" (without a rule: {', '.join(self.missing)})"
        said = self.message.strip().partition("\n")[0][:110] if self.status != "proven" else ""
        return f"{self.status:12} {self.attn:5} {self.model_type:26} {self.seconds:5.1f}s  {told}  {said}".rstrip()


# --- one row --------------------------------------------------------------------------------------------------


def row(mapping: Mapped, model_type: str, attn: Attn, tell: Callable[[Row], None] = lambda _: None) -> Row:
    """Build a model, run it as it is, compile it, and compare the two over a history of calls.

    Never raises: what is raised is told in the row.

    Args:
        tell: is given what is known after each call.
    """
    told = Row(mapping, model_type, classes(mapping)[model_type], attn, "cannot build")
    start = time.monotonic()
    try:
        model = tiny_model(mapping, model_type, attn)
        with torch.no_grad():
            logits(model, inputs(model, 12, 2))
    except Exception as error:  # noqa: BLE001 (any model may raise anything)
        return replace(told, message=raised(error), seconds=time.monotonic() - start)
    for found in compiled(model):
        told = replace(told, **found, seconds=time.monotonic() - start)
        tell(told)
    return told


def history(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Calls that grow, branch, get shorter, and have another batch size."""
    yield inputs(model, 12, 2)
    yield inputs(model, 13, 2)
    yield inputs(model, 17, 2)
    branch = inputs(model, 16, 2)
    ids = branch[text_of(branch)]
    ids[:, 4] = ids[:, 4] - 1
    yield branch
    yield inputs(model, 16, 2, hears=1)
    yield inputs(model, 9, 2)
    yield inputs(model, 14, 3)
    yield inputs(model, 15, 3)
    yield inputs(model, 20, 2)


def text_of(call: Mapping[str, Any]) -> str:
    """The name of the argument that grows."""
    return "decoder_input_ids" if "decoder_input_ids" in call else "input_ids"


def compiled(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The fields of a row that compiling the model fills: what is known after each call, and at the end."""
    cache = kvpass.Cache(capacity="64MiB", page_size=4, poison=True)
    options: dict[str, Any] = {"cache": cache}
    fast = torch.compile(model, backend="kvpass", options=options)
    graphs, failed, calls = 0, dict[str, str](), list[dict[str, Any]]()
    with recording() as records:
        for number, call in enumerate(history(model)):
            before = len(records)
            failed = compared(model, fast, call, f"call {number}")
            calls.append(call)
            graphs = max(graphs, len(records) - before)
            reused = cache.stats().rows_reused
            found = verdict(records, reused) | attentions(records) | {"graphs": graphs, "reused": reused}
            found |= encoded(records, calls, found["status"]) | failed
            yield found
            if failed or settled(records):
                break
    if failed:
        torch._dynamo.reset()
        plain = torch.compile(model, backend="eager")
        alone = next(filter(None, (compared(model, plain, call, "Dynamo alone") for call in history(model))), None)
        yield found | {"message": f"{failed['message']} ({alone['message'] if alone else 'Dynamo alone is right'})"}


def compared(model: nn.Module, fast: Callable[..., Any], call: dict[str, Any], name: str) -> dict[str, str]:
    """Status and message where a call raises or is answered otherwise; else empty."""
    with torch.no_grad():
        want = logits(model, call)
        try:
            compare(logits(fast, call), want, what=name)
        except Mismatch as mismatch:
            return {"status": "WRONG", "message": str(mismatch)}
        except Exception as error:  # noqa: BLE001 (any model may raise anything)
            return {"status": "error", "message": f"{name}: {raised(error)}"}
    return {}


def settled(records: Sequence[Record]) -> bool:
    """True once a graph of any length was refused for what the model computes: no call will change that."""
    refusals = [refusal_of(record) for record in records]
    return any(refusal is not None and refusal.code.startswith("KV2") for refusal in refusals)


def logits(model: Callable[..., Any], call: dict[str, Any]) -> torch.Tensor:
    """The logits of a call, whose random numbers are those of every other call."""
    torch.manual_seed(0)
    answer = model(**call)
    found: torch.Tensor = answer.logits if hasattr(answer, "logits") else answer[0]
    return found


def verdict(records: Sequence[Record], reused: int) -> dict[str, Any]:
    """The status, and the refusal that stands for it: the first split, else the last that is not about one call."""
    refusals = [(r, refusal) for r in records if (refusal := refusal_of(r)) is not None]
    split = [pair for pair in refusals if isinstance(pair[1], errors.GraphBreak)]
    proven = any(r.program is not None and r.program.refusal is None for r in records)
    lasting = [p for p in refusals if not isinstance(p[1], (errors.StaticLength, errors.SingleRow))]
    if split:
        return {"status": "pieces"} | refusal_fields(*split[0])
    if proven and reused:
        return {"status": "proven"} | (refusal_fields(*lasting[-1]) if lasting else {})
    if not refusals:
        return {"status": "refused", "message": "nothing was reused" if proven else "no graph reached the backend"}
    return {"status": "refused"} | refusal_fields(*(lasting or refusals)[-1])


def encoded(records: Sequence[Record], calls: Sequence[Mapping[str, Any]], status: str) -> dict[str, Any]:
    """How many encoder inputs there were, and what is wrong where one of them was encoded in more calls than one."""
    inputs = heard(calls, text_of(calls[0]))
    why = not_hoisted([r.program for r in records if r.program is not None], inputs) if status == "proven" else ""
    return {"heard": inputs} | ({"status": "not hoisted", "message": why} if why else {})


def refusal_of(record: Record) -> errors.Refusal | None:
    """What was refused when the graph was compiled, or in a call of its program."""
    return record.refusal if record.program is None else record.program.refusal


def refusal_fields(record: Record, refusal: errors.Refusal) -> dict[str, Any]:
    nodes = list(record.captured.module.graph.nodes) if record.captured is not None else []
    op = next((op_name(node) for node in nodes if node.name == refusal.node), "")
    told = {"code": refusal.code, "node": refusal.node, "source": refusal.source, "message": refusal.message}
    missing = {op_name(node) for node in nodes if without_rule(node)}
    return told | {"op": op or re.sub(r"_\d+$", "", refusal.node), "missing": tuple(sorted(missing))}


def without_rule(node: torch.fx.Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    known = node.op != "call_function" or node.target in RULES or node.target is operator.getitem
    return not known and any(isinstance(value, torch.Tensor) for value in values)


def attentions(records: Sequence[Record]) -> dict[str, Any]:
    """How many attentions were recognised and lowered in the graph that has most of them."""
    report = kvpass.Report.of([r for r in records if r.program is not None])
    part = max(report.parts, key=lambda p: len(p.attention) + len(p.unrecognised), default=None)
    if part is None:
        return {}
    return {
        "recognised": len(part.attention),
        "lowered": sum(entry.lowering not in ("as written", "reference") for entry in part.attention),
        "unrecognised": tuple(entry.reason for entry in part.unrecognised),
    }


def raised(error: BaseException) -> str:
    """Type, message and place of what was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} [{Path(frame.filename).name}:{frame.lineno} {frame.line}]"


# --- many rows ------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A row that is being worked on."""

    task: Task
    process: ForkServerProcess
    answer: Connection
    since: float = field(default_factory=time.monotonic)
    told: Row | None = None

    def result(self) -> Row | None:
        """The row, None while it is not known."""
        try:
            while self.answer.poll():
                self.told, last = self.answer.recv()
                if last:
                    return self.told
        except EOFError:
            self.process.join()
            return self._cut_short(f"the process ended with {self.process.exitcode}")
        if time.monotonic() - self.since > TIMEOUT:
            return self._cut_short(f"took longer than {TIMEOUT:.0f} s")
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.answer.close()

    def _cut_short(self, why: str) -> Row:
        """What was known so far; an error only where that is nothing, or a crash."""
        mapping, model_type, attn = self.task
        if self.told is not None and self.process.is_alive():
            return replace(self.told, message=f"{self.told.message} ({why})".strip())
        told = Row(mapping, model_type, classes(mapping)[model_type], attn, "error", message=why)
        return replace(told, seconds=time.monotonic() - self.since)


def rows(tasks: Iterable[Task], jobs: int) -> Iterator[Row]:
    """The rows of the tasks as they are done, each from a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    left, running = list(tasks), list[Running]()
    try:
        while left or running:
            while left and len(running) < jobs:
                here, there = context.Pipe(duplex=False)
                task = left.pop(0)
                process = context.Process(target=work, args=(task, there), daemon=True)
                process.start()
                there.close()
                running.append(Running(task, process, here))
            wait([one.answer for one in running], timeout=1.0)
            for one in list(running):
                if (told := one.result()) is not None:
                    running.remove(one)
                    one.end()
                    yield told
    finally:
        for one in running:
            one.end()


def work(task: Task, answer: Connection) -> None:
    """What a process does: one row, in silence."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    answer.send((row(*task, lambda told: answer.send((told, False))), True))
    answer.close()


# --- the table ------------------------------------------------------------------------------------------------


def summary(found: Sequence[Row]) -> str:
    """Counts per status, and what stands in the way, grouped by code and op."""
    out = [""]
    for mapping, attn in sorted({(r.mapping, r.attn) for r in found}):
        counts = Counter(r.status for r in found if (r.mapping, r.attn) == (mapping, attn))
        told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
        out.append(f"{mapping} {attn}: {told}")
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for r in found:
        if r.status in ("refused", "pieces"):
            groups[r.status, r.code, r.op].append(r)
    for key, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        names = ", ".join(dict.fromkeys(r.model_type for r in members))
        out.append(f"\n{len(members):4} {' '.join(key)}: {names}\n     {members[0].message.partition(chr(10))[0]}")
    missing = Counter(op for r in found for op in r.missing)
    for op, count in missing.most_common():
        alone = sum(r.missing == (op,) for r in found)
        out.append(f"\n{count:4} without a rule for {op}, {alone} of them for nothing else")
    for status in ("cannot build", "error", "WRONG"):
        out += [f"\n{status} {r.mapping} {r.model_type} {r.attn}: {r.message}" for r in found if r.status == status]
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.census", description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="model types that this is found in")
    parser.add_argument("--mapping", default="causal,seq2seq,speech", help="some of causal, seq2seq, speech")
    parser.add_argument("--attn", default="sdpa", help="sdpa, eager, or both")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="where the table is written (docs/conformance.md)"
    )
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args(argv)
    mappings = [m for m in get_args(Mapped) if m in args.mapping.split(",")]
    attns = [a for a in get_args(Attn) if a in args.attn.split(",")]
    tasks = [
        (m, t, a) for a in attns for m in mappings for t in classes(m) if re.search(args.only, t) and has_attn(m, t, a)
    ]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("KVPASS_CXXFLAGS", "-O0")  # hundreds of kernels that run for microseconds
    found: list[Row] = []
    try:
        for told in rows(tasks, args.jobs):
            found.append(told)
            print(f"{len(found):4}/{len(tasks)} {told}", flush=True)
    except KeyboardInterrupt:
        print(f"interrupted after {len(found)} of {len(tasks)} rows")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(r) for r in found], indent=1) + "\n")
    if args.markdown is not None:
        from tests.zoo.table import markdown

        args.markdown.write_text(markdown(found, transformers.__version__))
    print(summary(found))
    return int(any(r.status == "WRONG" for r in found))


if __name__ == "__main__":
    sys.exit(main())
