"""The census as a table of Markdown: one line per architecture, what came of each way to compute its attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.zoo.census import STATUSES, Row

_TITLES = {"causal": "Decoders", "seq2seq": "Encoders and decoders of text", "speech": "Encoders of speech"}
_SAID = {"proven": "proven and equal", "pieces": "captured in pieces"}
_WIDTH = 160

HEAD = """# Conformance

What becomes of every class in three mappings of transformers {version}: `MODEL_FOR_CAUSAL_LM_MAPPING`,
`MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING` and `MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING`. `make zoo` builds a tiny random
model of each (weights jittered, windows shorter than the texts), compiles it through the public entry point, and
compares it with itself uncompiled over calls that grow, branch, shrink and have another batch; it writes this file.

- **proven and equal**: rewritten, rows were reused, and every answer was the plain model's; *n* attentions run on
  generated kernels, of so many that were found. An encoder ran once for each input that it was given.
- **not hoisted**: proven and equal, but an encoder ran again for an input that it had seen.
- **refused**: runs as it was written; [the code](refusals.md) and what it says.
- **captured in pieces**: Dynamo splits the model; it runs, and nothing is cached.
- **cannot build**: transformers does not build the class from a configuration and token ids alone.
- **error**, **WRONG**: it raised, or an answer differed.
"""


def markdown(rows: Sequence[Row], version: str) -> str:
    """The whole page."""
    out = [HEAD.format(version=version)]
    for mapping, title in _TITLES.items():
        mine = [row for row in rows if row.mapping == mapping]
        if mine:
            out += [f"## {title}", "", *_counts(mine), "", *_lines(mine), ""]
    return "\n".join(out)


def _counts(rows: Sequence[Row]) -> Iterable[str]:
    yield "| attention | " + " | ".join(_SAID.get(status, status) for status in STATUSES) + " |"
    yield "| --- |" + " ---: |" * len(STATUSES)
    for attn in sorted({row.attn for row in rows}, reverse=True):
        counts = Counter(row.status for row in rows if row.attn == attn)
        yield f"| {attn} | " + " | ".join(str(counts[status]) for status in STATUSES) + " |"


def _lines(rows: Sequence[Row]) -> Iterable[str]:
    yield "| model | class | attention | result | attentions on kernels |"
    yield "| --- | --- | --- | --- | ---: |"
    for row in sorted(rows, key=lambda row: (row.model_type, row.attn != "sdpa")):
        kernels = f"{row.lowered} of {row.recognised + len(row.unrecognised)}" if row.status == "proven" else ""
        yield f"| {row.model_type} | {row.model} | {row.attn} | {_result(row)} | {kernels} |"


def _result(row: Row) -> str:
    if row.status == "proven":
        return _SAID[row.status]
    first = row.message.strip().partition("\n")[0].replace("|", "\\|")
    told = first if len(first) <= _WIDTH else first[: _WIDTH - 2] + " …"
    return f"{_SAID.get(row.status, row.status)}{f' ({row.code})' if row.code else ''}: {told}"
