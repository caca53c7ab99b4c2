"""`Report`: what kvpass found out about a model, for people and for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kvpass.report.gather import graph_report
from kvpass.report.parts import (
    AttentionReport,
    GraphReport,
    ReadingReport,
    Record,
    RefusalReport,
    SlotReport,
    UnrecognisedReport,
)
from kvpass.report.text import render


@dataclasses.dataclass(frozen=True)
class Report:
    """The verdict on one call of a model, with its proof and its cost. ``str()`` is the text for people.

    Attributes:
        parts: one entry per graph that Dynamo made of the call.
    """

    parts: tuple[GraphReport, ...]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Report:
        """The report of the compilations that one call caused."""
        return cls(tuple(graph_report(record) for record in records))

    @property
    def proven(self) -> bool:
        """Every graph was proved causal and rewritten, and there is at least one."""
        return bool(self.parts) and all(part.proven for part in self.parts)

    @property
    def graphs(self) -> int:
        """How many graphs Dynamo made of the call; more than one means that the model was split."""
        return len(self.parts)

    @property
    def refusals(self) -> tuple[RefusalReport, ...]:
        return tuple(refusal for part in self.parts for refusal in part.refusals)

    @property
    def attention(self) -> tuple[AttentionReport, ...]:
        """The attentions that were recognised, in graph order."""
        return tuple(attention for part in self.parts for attention in part.attention)

    @property
    def unrecognised(self) -> tuple[UnrecognisedReport, ...]:
        """The attentions that run incrementally as the ops they were written in."""
        return tuple(entry for part in self.parts for entry in part.unrecognised)

    @property
    def readings(self) -> tuple[ReadingReport, ...]:
        """The ops outside attention that read other rows than their own."""
        return tuple(reading for part in self.parts for reading in part.readings)

    @property
    def slots(self) -> tuple[SlotReport, ...]:
        """The stored values, outputs among them (``is_output``)."""
        return tuple(slot for part in self.parts for slot in part.slots)

    @property
    def bytes_per_row(self) -> int:
        """What one row of one sequence costs in the cache, without the outputs' own rows."""
        return sum(slot.bytes_per_row for slot in self.slots if not slot.is_output)

    @property
    def output_bytes_per_row(self) -> int:
        """What the outputs that the caller gets in full add to that."""
        return sum(slot.bytes_per_row for slot in self.slots if slot.is_output)

    @property
    def hints(self) -> tuple[str, ...]:
        return tuple(hint for part in self.parts for hint in part.hints)

    def __str__(self) -> str:
        return render(self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dictionaries, strings and numbers: what `json` takes."""
        summary: dict[str, Any] = {
            "proven": self.proven,
            "graphs": self.graphs,
            "bytes_per_row": self.bytes_per_row,
            "output_bytes_per_row": self.output_bytes_per_row,
        }
        for name in ("refusals", "attention", "unrecognised", "readings", "slots"):
            summary[name] = [plain(entry) for entry in getattr(self, name)]
        return summary | {"hints": list(self.hints), "parts": [plain(part) for part in self.parts]}


def plain(value: Any) -> Any:
    """Dataclasses and tuples as dictionaries and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value
