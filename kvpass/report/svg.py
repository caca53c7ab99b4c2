"""A picture as a standalone svg file: graphs side by side, changed boxes coloured, a legend on top."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from kvpass.report.layout import Placed, layered
from kvpass.report.picture import KINDS, Box, Cluster, Picture

_CHARACTER, _LINE, _PADDING = 6.7, 13.0, 8.0  # of an 11 pixel monospace font
_MARGIN, _TOP, _BETWEEN = 24.0, 78.0, 60.0
_STYLE = (
    "text{font-family:'DejaVu Sans Mono',Menlo,Consolas,monospace;font-size:11px;fill:#222}"
    ".head{font-weight:bold}.title{font-size:16px;font-weight:bold}.sub{font-size:13px;font-weight:bold}"
    ".box{stroke:#777;stroke-width:1}.removed{stroke-dasharray:4 3}"
    ".arrow{fill:none;stroke:#9a9a9a;stroke-width:1}"
)


def svg(pictures: Sequence[Picture]) -> str:
    """The pictures below one another."""
    body: list[str] = []
    width, top = 0.0, 0.0
    for picture in pictures:
        wide, high, text = _drawn(picture)
        body.append(f'<g transform="translate(0 {top:.0f})">{text}</g>')
        width, top = max(width, wide), top + high
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{top:.0f}" '
        f'viewBox="0 0 {width:.0f} {top:.0f}">\n<style>{_STYLE}</style>\n'
        '<defs><marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto">'
        '<path d="M0 0 L6 3 L0 6 z" fill="#9a9a9a"/></marker></defs>\n'
        f'<rect width="{width:.0f}" height="{top:.0f}" fill="#fafafa"/>\n' + "\n".join(body) + "\n</svg>"
    )


def _drawn(picture: Picture) -> tuple[float, float, str]:
    """Width, height and elements."""
    parts = [f'<text class="title" x="{_MARGIN}" y="26">{escape(picture.title)}</text>']
    legend, reach = _legend(picture.legend)
    parts.append(legend)
    x, height = _MARGIN, 0.0
    for cluster in picture.clusters:
        placed = layered({box.name: _size(box) for box in cluster.boxes}, cluster.arrows)
        parts.append(f'<text class="sub" x="{x:.0f}" y="{_TOP}">{escape(cluster.title)}</text>')
        parts.append(f'<g transform="translate({x:.1f} {_TOP + 16})">{_graph(cluster, placed)}</g>')
        x += max(placed.width, len(cluster.title) * 8.0) + _BETWEEN
        height = max(height, placed.height)
    return max(x - _BETWEEN, reach) + _MARGIN, _TOP + 16 + height + _MARGIN, "\n".join(parts)


def _legend(kinds: Sequence[str]) -> tuple[str, float]:
    parts, x = [], _MARGIN
    for kind in kinds:
        fill, meaning = KINDS[kind]
        parts.append(f'<rect class="box {kind}" x="{x:.0f}" y="38" width="14" height="14" fill="{fill}"/>')
        parts.append(f'<text x="{x + 20:.0f}" y="49">{escape(meaning)}</text>')
        x += 20 + len(meaning) * _CHARACTER + 22
    return "".join(parts), x


def _size(box: Box) -> tuple[float, float]:
    return max(map(len, box.lines)) * _CHARACTER + 2 * _PADDING, len(box.lines) * _LINE + _PADDING


def _graph(cluster: Cluster, placed: Placed) -> str:
    sizes = {box.name: _size(box) for box in cluster.boxes}
    arrows = [_arrow(sizes, placed, a, b, points) for a, b, points in placed.routes]
    return "\n".join([*arrows, *(_box(box, placed.centres[box.name]) for box in cluster.boxes)])


def _box(box: Box, centre: tuple[float, float]) -> str:
    (x, y), (width, height) = centre, _size(box)
    left, top = x - width / 2, y - height / 2
    lines = [
        f'<text{" class=" + chr(34) + "head" + chr(34) if k == 0 else ""} x="{left + _PADDING:.1f}" '
        f'y="{top + _PADDING / 2 + _LINE * (k + 0.78):.1f}">{escape(line)}</text>'
        for k, line in enumerate(box.lines)
    ]
    shape = (
        f'<rect class="box {box.kind}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4" '
        f'fill="{KINDS[box.kind][0]}"/>'
    )
    return f"<g><title>{escape(box.title)}</title>{shape}{''.join(lines)}</g>"


def _arrow(
    sizes: dict[str, tuple[float, float]], placed: Placed, a: str, b: str, points: Sequence[tuple[float, float]]
) -> str:
    """A smooth line from the foot of ``a`` through the points to the head of ``b``."""
    (ax, ay), (bx, by) = placed.centres[a], placed.centres[b]
    through = [(ax, ay + sizes[a][1] / 2), *points, (bx, by - sizes[b][1] / 2 - 1)]
    path = f"M{through[0][0]:.1f} {through[0][1]:.1f}"
    for (x0, y0), (x1, y1) in pairwise(through):
        middle = (y0 + y1) / 2
        path += f" C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    return f'<path class="arrow" marker-end="url(#tip)" d="{path}"/>'
