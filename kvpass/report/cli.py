"""``kvpass explain``, ``dump`` and ``kernels``, given the compilations that one call of the model caused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from kvpass.errors import InputError
from kvpass.report.dot import dot
from kvpass.report.files import deliver
from kvpass.report.gather import kernels_of
from kvpass.report.kernels import Setting, architectures, data, measure, table
from kvpass.report.machine import SCHEMA, captured_data, facts_data, incremental_data, plan_data
from kvpass.report.partial import facts_of
from kvpass.report.parts import Record, incremental_of
from kvpass.report.picture import Picture, captured_picture, facts_picture, incremental_picture, plan_picture
from kvpass.report.report import Report, plain
from kvpass.report.stages import Look, captured_text, facts_text, incremental_text, plan_text
from kvpass.report.svg import svg

STAGES = ("captured", "facts", "plan", "incremental")
FORMATS = ("text", "dot", "svg", "json")
PROVEN, FAILED, REFUSED = 0, 1, 2


def explain_command(records: Sequence[Record], namespace: Namespace) -> int:
    """Print the report.

    Args:
        records: what `kvpass.frontend.api.recording` collected while the model ran once.
        namespace: of the command line; ``format`` "json" prints `Report.to_dict` instead of text.

    Returns:
        0 where everything is proven, 2 where a graph is refused, 1 after one sentence on standard error.
    """
    report = Report.of(records)
    text = json.dumps(report.to_dict(), indent=2) if getattr(namespace, "format", "text") == "json" else str(report)
    return _delivered(text, getattr(namespace, "output", None), report)


def dump_command(records: Sequence[Record], namespace: Namespace) -> int:
    """Print a stage of the compiler, or write it to a file.

    Args:
        records: as for `explain_command`.
        namespace: ``stage`` (of `STAGES`), ``format`` (of `FORMATS`), ``output`` (a path, or None for the terminal).

    Returns:
        As `explain_command`. A refused graph is shown as far as the compiler came.
    """
    stage = getattr(namespace, "stage", None) or "incremental"
    form = getattr(namespace, "format", None) or "text"
    output = getattr(namespace, "output", None)
    try:
        text = dumped(records, stage, form, Look() if output else _look())
    except InputError as error:
        return _complain(str(error))
    return _delivered(text, output, Report.of(records))


def kernels_command(records: Sequence[Record], namespace: Namespace) -> int:
    """Print what the generated kernels cost on GPUs.

    Args:
        records: as for `explain_command`.
        namespace: ``arch`` (names with commas between), ``rows``, ``new``, ``page_size`` (numbers), ``dtype`` (a name
            in torch, or None for the model's), ``format`` ("text" or "json"), ``output`` as for `dump_command`.

    Returns:
        As `explain_command`. Of a refused model the kernels of the graphs that are proven are shown, and the reasons.
    """
    report = Report.of(records)
    try:
        dtype = getattr(torch, namespace.dtype) if namespace.dtype else None
        setting = Setting(architectures(namespace.arch), namespace.rows, namespace.new, namespace.page_size, dtype)
        found = measure(filter(None, map(incremental_of, records)), setting)
    except InputError as error:
        return _complain(str(error))
    if namespace.format == "json":
        text = json.dumps(data(found, setting, report), indent=1)
    elif report.proven:
        text = table(found, setting)
    else:
        text = "\n\n".join([*([table(found, setting)] if found else []), str(report)])
    return _delivered(text, namespace.output, report)


def _delivered(text: str, output: str | None, report: Report) -> int:
    try:
        deliver(text, output)
    except InputError as error:
        return _complain(str(error))
    if report.proven:
        return PROVEN
    if output:
        print(str(report).splitlines()[0], file=sys.stderr)
    return REFUSED


def _complain(sentence: str) -> int:
    print(f"kvpass: {sentence}", file=sys.stderr)
    return FAILED


def _look() -> Look:
    """Columns and colours of the terminal, where there is one."""
    if not sys.stdout.isatty():
        return Look()
    return Look(shutil.get_terminal_size().columns, not os.environ.get("NO_COLOR"))


def dumped(records: Sequence[Record], stage: str, form: str, look: Look) -> str:
    """A stage in a format.

    Raises:
        InputError: there is no such stage or format, or nothing of the stage to draw.
    """
    for given, known, what in ((stage, (*STAGES, "kernels"), "stage"), (form, FORMATS, "format")):
        if given not in known:
            raise InputError(f"there is no {what} {given!r}; there are {', '.join(known)}")
    if stage == "kernels":
        return _kernels(records, form)
    if form == "text":
        parts = [_text(record, stage, look) for record in records]
        return "\n\n".join(parts) or "nothing was compiled"
    if form == "json":
        graphs = [_data(record, stage) for record in records]
        return json.dumps({"schema": SCHEMA, "stage": stage, "graphs": graphs}, indent=1)
    pictures = [picture for picture in (_picture(record, stage) for record in records) if picture is not None]
    if not pictures:
        why = "; ".join(refusal.message for refusal in Report.of(records).refusals) or "nothing was compiled"
        raise InputError(f"there is no {stage} graph to draw: {why}")
    return {"dot": dot, "svg": svg}[form](pictures)


def _kernels(records: Sequence[Record], form: str) -> str:
    """The generated kernels, each of them once.

    Raises:
        InputError: nothing was proven, or a format that draws.
    """
    if form not in ("text", "json"):
        raise InputError(f"kernels are text: there is no {form} of them")
    incrementals = [incremental for record in records if (incremental := incremental_of(record)) is not None]
    if not incrementals:
        raise InputError(f"there are no kernels: {'; '.join(r.message for r in Report.of(records).refusals)}")
    found = {name: source for incremental in incrementals for name, source in kernels_of(incremental).items()}
    if form == "json":
        kernels = [{"lowering": name, "source": source} for name, source in found.items()]
        return json.dumps({"schema": SCHEMA, "stage": "kernels", "kernels": kernels}, indent=1)
    return "\n".join(found.values()) or "no attention was recognised"


def _text(record: Record, stage: str, look: Look) -> str:
    incremental = incremental_of(record)
    analyzed, stopped = facts_of(record) if stage == "facts" else (None, "")
    if stage == "captured" and record.captured is not None:
        return captured_text(record.captured)
    if analyzed is not None:
        return facts_text(analyzed, stopped)
    if incremental is not None:
        return plan_text(incremental.plan, record) if stage == "plan" else incremental_text(incremental, look)
    return str(Report.of([record]))


def _data(record: Record, stage: str) -> dict[str, Any]:
    incremental, report = incremental_of(record), Report.of([record])
    data = {"proven": report.proven, "refusals": plain(report.refusals)}
    if stage == "captured" and record.captured is not None:
        return data | captured_data(record.captured)
    if stage == "facts":
        analyzed, stopped = facts_of(record)
        return data | (facts_data(analyzed, stopped) if analyzed is not None else {})
    if incremental is None:
        return data
    return data | (plan_data(incremental.plan, record) if stage == "plan" else incremental_data(incremental, record))


def _picture(record: Record, stage: str) -> Picture | None:
    incremental = incremental_of(record)
    if stage == "captured":
        return None if record.captured is None else captured_picture(record.captured)
    if stage == "facts":
        analyzed, _ = facts_of(record)
        return None if analyzed is None else facts_picture(analyzed)
    if incremental is None:
        return None
    return plan_picture(incremental.plan) if stage == "plan" else incremental_picture(incremental)
