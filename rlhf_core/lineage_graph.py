"""A pipeline's lineage as a picture: a box for each stage, in order, and a line from each artifact to what reads it.

SVG made by hand: a few KB inside a report's text, sharp at any size, without a drawing library at a flow's start. It has a
background of its own, so it can be read on a dark page. Neighbours are joined straight, others by an arc below the boxes,
deeper the further it reaches.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Tone = Literal["waiting", "running", "reused", "made", "failed"]

WIDTH, HEIGHT, GAP, MARGIN = 204, 84, 40, 14  # of a box, between boxes, around all; in px
ARC = 26  # depth that an arc gains with each box that it passes
LETTERS = 30  # that fit a line of a box
COLOURS: dict[Tone, tuple[str, str]] = {  # edge, fill
    "waiting": ("#8c959f", "#f6f8fa"),
    "running": ("#0969da", "#ddf4ff"),
    "reused": ("#57606a", "#eaeef2"),
    "made": ("#1a7f37", "#dafbe1"),
    "failed": ("#cf222e", "#ffebe9"),
}


@dataclass(frozen=True)
class Node:
    """A stage of the graph.

    Attributes:
        name: of the stage, its title.
        lines: up to three short lines below it.
        inputs: names of the nodes before it that it reads; others are passed over.
        tone: its colours.
    """

    name: str
    lines: Sequence[str]
    inputs: Sequence[str]
    tone: Tone


def lineage_svg(nodes: Sequence[Node]) -> str:
    """The picture as an SVG document."""
    places = {node.name: i for i, node in enumerate(nodes)}
    edges = [(places[name], i) for i, node in enumerate(nodes) for name in node.inputs if places.get(name, i) < i]
    reach = max((end - start for start, end in edges), default=1)
    width = 2 * MARGIN + len(nodes) * WIDTH + (len(nodes) - 1) * GAP
    height = 2 * MARGIN + HEIGHT + (reach - 1) * ARC
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui,Segoe UI,Roboto,DejaVu Sans,sans-serif">'
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#57606a"/></marker></defs>'
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
        + "".join(_edge(start, end) for start, end in edges)
        + "".join(_box(i, node) for i, node in enumerate(nodes))
        + "</svg>"
    )


def lineage_markdown(nodes: Sequence[Node]) -> str:
    """The picture as an image inside markdown."""
    return f"![lineage](data:image/svg+xml;base64,{base64.b64encode(lineage_svg(nodes).encode()).decode()})\n"


def _left(place: int) -> int:
    return MARGIN + place * (WIDTH + GAP)


def _edge(start: int, end: int) -> str:
    if end == start + 1:
        y = MARGIN + HEIGHT / 2
        path = f"M{_left(start) + WIDTH} {y}H{_left(end) - 1}"
    else:  # leaves a box right of its middle and enters one left of it, each reach at a place of its own
        reach, floor = end - start, MARGIN + HEIGHT
        a, b = _left(start) + WIDTH * 0.62 + 12 * (reach - 2), _left(end) + WIDTH * 0.38 - 12 * (reach - 2)
        depth = floor + (reach - 1) * ARC * 4 / 3  # a cubic's lowest point is at 3/4 of its handles' depth
        path = f"M{a:.0f} {floor}C{a:.0f} {depth:.0f} {b:.0f} {depth:.0f} {b:.0f} {floor + 1}"
    return f'<path d="{path}" fill="none" stroke="#57606a" stroke-width="1.3" marker-end="url(#to)"/>'


def _box(place: int, node: Node) -> str:
    edge, fill = COLOURS[node.tone]
    x = _left(place)
    rows = [_cut(line) for line in node.lines[:3]]
    lines = "".join(
        f'<text x="{x + 12}" y="{MARGIN + 42 + 16 * i}" font-size="11.5" fill="#424a53">{escape(row)}</text>'
        for i, row in enumerate(rows)
    )
    return (
        f'<rect x="{x}" y="{MARGIN}" width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{fill}" stroke="{edge}" '
        f'stroke-width="1.6"/><text x="{x + 12}" y="{MARGIN + 23}" font-size="15" font-weight="600" fill="#1f2328">'
        f"{escape(node.name)}</text>{lines}"
    )


def _cut(line: str) -> str:
    return line if len(line) <= LETTERS else line[: LETTERS - 1] + "…"
