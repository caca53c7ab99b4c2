"""A report as text: the verdict first, then its proof, then its cost. What repeats is said once and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from kvpass.report.names import line
from kvpass.report.parts import (
    AttentionReport,
    GraphReport,
    LatentReport,
    OutputReport,
    ReadingReport,
    RefusalReport,
    SlotReport,
    StepReport,
    UnrecognisedReport,
)

T = TypeVar("T")


def render(parts: Sequence[GraphReport]) -> str:
    """The text of a report, without a newline at the end."""
    lines = [_verdict(parts)]
    for k, part in enumerate(parts):
        if len(parts) > 1:
            lines += ["", f"-- graph {k + 1} of {len(parts)} --"]
        lines += _graph(part)
    return "\n".join(lines)


def _verdict(parts: Sequence[GraphReport]) -> str:
    if not parts:
        return "refused: nothing was compiled, so nothing is proved"
    proven = sum(part.proven for part in parts)
    if proven < len(parts):
        codes = ", ".join(dict.fromkeys(r.code for part in parts for r in part.refusals))
        what = (
            "the graph runs as it was written" if len(parts) == 1 else f"{len(parts) - proven} of {len(parts)} graphs"
        )
        return f"refused ({codes}): {what}" + ("" if len(parts) == 1 else " run as they were written")
    graphs = "one graph" if len(parts) == 1 else f"{len(parts)} graphs, each with a cache of its own rows"
    ends = dict.fromkeys(end for part in parts for end in part.prefixes)
    also = "".join(f", and on those below {end}," for end in ends)
    return f"proven: row i of every output depends on the inputs' rows up to i{also} only ({graphs})"


def _graph(part: GraphReport) -> list[str]:
    sections = [
        *(("Refused", _refusal(refusal)) for refusal in part.refusals),
        ("Inputs", _inputs(part)),
        ("Attention", attention_lines(part)),
        (
            "Attention that runs as it was written, over cached rows",
            [text for group in counted(part.unrecognised) for text in _unrecognised(*group)],
        ),
        ("Other ops that read earlier rows", [text for group in counted(part.readings) for text in _reading(*group)]),
        ("Stored", stored_lines(part) if part.proven else []),
        ("Outputs", _outputs(part.outputs)),
        ("Steps of a few new rows", [_step(step) for step in part.compiled]),
        ("Hints", list(part.hints)),
    ]
    return [row for title, body in sections if body for row in ("", title, *(f"  {text}" for text in body))]


def counted(entries: Iterable[T]) -> Iterator[tuple[int, T]]:
    """Entries that differ in their place only, once, with how many there are."""
    groups: dict[object, tuple[int, T]] = {}
    for entry in entries:
        blank = {name: "" for name in ("node", "source", "name") if hasattr(entry, name)}
        key = replace(entry, **blank)  # type: ignore[type-var]
        count, first = groups.get(key, (0, entry))
        groups[key] = (count + 1, first)
    yield from groups.values()


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _times(count: int) -> str:
    return f"{count} x " if count > 1 else ""


def _at(source: str, count: int, indent: str = "    ") -> list[str]:
    return [f"{indent}at {line(source)}{' (the first of them)' if count > 1 else ''}"] if source else []


def _refusal(refusal: RefusalReport) -> list[str]:
    lines = [f"{refusal.code} {refusal.reason}: {refusal.message}"]
    lines += [f"    node {refusal.node}"] if refusal.node else []
    lines += _at(refusal.source, 1)
    lines += [f"    hint: {refusal.hint}"] if refusal.hint else []
    return [*lines, f"    more: docs/refusals.md#{refusal.code}-{refusal.reason}".lower()]


_ROLES: dict[str, Callable[[str], str]] = {
    "sequence": lambda form: (
        "its rows are the sequence, and the key under which rows are kept"
        + (f"; other calls than with {form} run plain" if form else "")
    ),
    "form": lambda form: f"a mask over pairs of rows that equals {form}; compared with it at every call",
    "context": lambda _: "context: its contents are part of the key of every row",
    "rowwise": lambda _: "context: what it brings for each row is part of that row's key",
    "rows": lambda _: "what the context brings for each row",
}


def _inputs(part: GraphReport) -> list[str]:
    rows = [(x.name, f"{x.dtype} {x.shape}", _ROLES[x.role](x.form)) for x in part.inputs]
    lines = _columns(rows)
    if part.inputs:
        symbolic = not part.batch.isdigit()
        batch = f"the batch of any size {part.batch}" if symbolic else f"a batch of exactly {part.batch}"
        lines.append(f"S is the number of rows; {batch}; {part.tensors} weights and buffers")
    return lines


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def attention_lines(part: GraphReport) -> list[str]:
    """Every attention that was recognised, repeated ones once."""
    return [text for group in counted(part.attention) for text in _attention(*group)]


def _attention(count: int, a: AttentionReport) -> list[str]:
    heads = (
        f"{a.heads} heads"
        if a.heads == a.kv_heads
        else f"{a.heads} heads over {a.kv_heads} key/value {_plural('head', a.kv_heads)}"
    )
    size = f"size {a.head_size}" if a.head_size == a.value_size else f"sizes {a.head_size} (keys) and {a.value_size}"
    score = "" if a.score == "score" else f", softmax of {a.score}"
    keys = "every key" if a.mask == "True" else f"the rows j with {a.mask}"
    product = "q . k" if a.scale == 1 else f"{a.scale:.6g} * (q . k)"
    return [
        f"{_times(count)}{heads} of {size}, {a.dtype}, score = {product}{score}; lowering: {a.lowering}",
        f"    row i sees {keys}",
        f"    proof: {a.proof}" if a.proof else "    proof: see the ops below",
        *([] if a.latent is None else _latent(a.latent)),
        *_at(a.source, count),
    ]


def _latent(x: LatentReport) -> list[str]:
    kept = "that row is stored, queries are projected down to it" if x.stored else "keys and values are stored"
    turn = "" if x.turn is None or not x.stored else f"; from {x.turn:,} new rows on, keys and values are made anew"
    return [
        f"    keys and values are made from {x.size:,} numbers a row: {kept}{turn}",
        f"    a cached row costs a step {x.latent_bytes:,} bytes and {x.latent_operations:,} operations that way, "
        f"{x.bytes:,} and {x.operations:,} with keys and values stored",
    ]


def _unrecognised(count: int, u: UnrecognisedReport) -> list[str]:
    mask = [f"    row i sees the rows j with {u.mask}", f"    proof: {u.proof}"] if u.mask else []
    return [f"{_times(count)}{u.node}: {u.reason}", *mask, *_at(u.source, count)]


def _reading(count: int, r: ReadingReport) -> list[str]:
    mask = f" reads the rows j with {r.mask}" if r.mask else ""
    return [f"{_times(count)}{r.op}{mask}", f"    proof: {r.proof}", *_at(r.source, count)]


def stored_lines(part: GraphReport) -> list[str]:
    """What is kept, and what a row of it costs."""
    kept = [slot for slot in part.slots if not slot.is_output]
    outputs = [slot for slot in part.slots if slot.is_output]
    total = sum(slot.bytes_per_row for slot in kept)
    lines = [f"{total:,} bytes per row and sequence, in {len(kept)} {_plural('slot', len(kept))}"]
    lines += [_slot(count, slot) for count, slot in counted(kept)]
    if outputs:
        total = sum(slot.bytes_per_row for slot in outputs)
        lines.append(f"{total:,} bytes per row more for the outputs that the caller gets in full")
        lines += [_slot(count, slot) for count, slot in counted(outputs)]
    rows = "row is" if part.tail == 1 else f"{part.tail} rows are"
    lines.append(f"the last {rows} computed in every call, every other row once")
    return lines


def _step(step: StepReport) -> str:
    if step.reason:
        return f"{step.regime}: op by op ({step.reason.splitlines()[0]})"
    made = (
        f"{step.regime}: compiled, {step.instructions} instructions of {step.functions} functions; no weight is copied"
    )
    return made + (f"; as written in between: {', '.join(step.written)}" if step.written else "")


def _slot(count: int, slot: SlotReport) -> str:
    first = f"{slot.name}, .." if count > 1 else slot.name
    return f"    {_times(count)}{list(slot.shape)} {slot.dtype}, {slot.bytes_per_row:,} bytes ({first})"


_ROWS = {"all": "all rows", "last 1": "the last row", "none": "no sequence axis"}


def _outputs(outputs: Sequence[OutputReport]) -> list[str]:
    lines = []
    for count, output in counted(outputs):
        rows = _ROWS.get(output.rows, f"the {output.rows} rows")
        lines.append(f"{_times(count)}{output.dtype} {output.shape}: {rows}")
        if output.meaningful != "True":
            lines.append(
                f"    a row where {output.meaningful} does not hold may keep no key, and then means nothing in any "
                "implementation; no other row depends on it"
            )
    return lines
