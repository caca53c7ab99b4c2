"""A picture in Graphviz's language."""

from __future__ import annotations

from collections.abc import Sequence

from kvpass.report.picture import KINDS, Cluster, Picture


def dot(pictures: Sequence[Picture]) -> str:
    """One digraph with a cluster per graph; boxes are coloured by what became of them."""
    lines = [
        "digraph kvpass {",
        "  rankdir=TB; newrank=true; fontname=monospace; compound=true;",
        "  node [shape=box, style=filled, fontname=monospace, fontsize=10];",
    ]
    clusters = [(picture, cluster) for picture in pictures for cluster in picture.clusters]
    for k, (picture, cluster) in enumerate(clusters):
        lines += _cluster(k, picture, cluster)
    return "\n".join([*lines, "}"])


def _cluster(k: int, picture: Picture, cluster: Cluster) -> list[str]:
    names = {box.name for box in cluster.boxes}
    lines = [f"  subgraph cluster_{k} {{", f"    label={quoted(f'{picture.title}: {cluster.title}')};"]
    for box in cluster.boxes:
        label = "\\n".join(_escaped(line) for line in box.lines)
        lines.append(
            f'    "{k}/{_escaped(box.name)}" [label="{label}", fillcolor="{KINDS[box.kind][0]}", '
            f"tooltip={quoted(box.title)}];"
        )
    for source, target in cluster.arrows:
        if source in names:
            lines.append(f'    "{k}/{_escaped(source)}" -> "{k}/{_escaped(target)}";')
    return [*lines, "  }"]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def quoted(text: str) -> str:
    """A string of the language."""
    return f'"{_escaped(text)}"'
