"""Draw docs/structure.svg: the wings of the package, layer by layer, and who imports whom.

    python docs/structure.py

Layers come from the import-linter contract in pyproject.toml, arrows from the imports themselves.
An arrow that follows from others is left out, and so are those to errors.py, which all may import.
"""

from __future__ import annotations

from collections.abc import Collection
from html import escape
from itertools import chain
from pathlib import Path

import grimp
import tomllib

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "structure.svg"
PACKAGE = "dr2net_d2"

PURPOSES = {
    "plan": "does a training fit?",
    "fidelity": "is the gradient right?",
    "report": "what does a detector get wrong?",
    "anchors": "anchors from boxes",
    "convert": "weights in and out",
    "export": "ONNX, torch.export",
    "inference": "a trained detector at work: images, video, pictures",
    "d2": "the Detectron2 engine",
    "tv": "the torchvision engine",
    "weights": "files, formats, checkpoints",
    "training": "optimizer, coefficients, guards, curves",
    "commands": "options, reports",
    "config": "keys and what they mean",
    "data": "datasets, tiles",
    "evaluation": "metrics, kinds of errors",
    "core": "the method, in PyTorch alone",
    "errors": "imported by all",
}

WIDTH, HEIGHT, GAP, MARGIN = 980, 46, 30, 12
LEGEND = (
    "An arrow leads from the importer to what it imports, unless that follows from other arrows."
)
CHARACTER = 6.4  # px of the small print


def read_layers() -> list[list[str]]:
    """The wings of each layer, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in contracts["contracts"] if c["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def find_arrows(wings: Collection[str]) -> set[tuple[str, str]]:
    """(importer, imported) for all pairs of wings, errors.py aside."""
    graph = grimp.build_graph(PACKAGE)
    arrows = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = tuple(name.split(".")[1] for name in (module, imported) if "." in name)
            if len(pair) == 2 and len({*pair}) == 2 and {*pair} <= {*wings} - {"errors"}:
                arrows.add(pair)
    return arrows


def without_consequences(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The fewest arrows along which the same wings can be reached."""

    def reachable(start: str, goal: str, remaining: set[tuple[str, str]]) -> bool:
        return any(
            end == goal or reachable(end, goal, remaining)
            for begin, end in remaining
            if begin == start
        )

    return {arrow for arrow in arrows if not reachable(*arrow, arrows - {arrow})}


def draw(layers: list[list[str]], arrows: set[tuple[str, str]]) -> str:
    """An SVG of boxes in rows, with a curve for every arrow."""
    boxes: dict[str, tuple[float, float, float]] = {}  # left, top, width
    parts = []
    for row, wings in enumerate(layers):
        widths = [max(len(PURPOSES[wing]) * CHARACTER + 16, 74) for wing in wings]
        spare = (WIDTH - 2 * MARGIN - sum(widths)) / (len(wings) + 1)
        left, top = MARGIN + spare, MARGIN + row * (HEIGHT + GAP)
        for wing, width in zip(wings, widths, strict=True):
            boxes[wing] = (left, top, width)
            left += width + spare
    for importer, imported in sorted(arrows):
        (left, top, width), (left2, top2, width2) = boxes[importer], boxes[imported]
        x, y, x2, y2 = left + width / 2, top + HEIGHT, left2 + width2 / 2, top2 - 5
        bend = (y2 - y) / 2
        parts.append(
            f'<path d="M{x:.0f} {y} C{x:.0f} {y + bend} {x2:.0f} {y2 - bend} {x2:.0f} {y2}"/>'
        )
    for wing, (left, top, width) in boxes.items():
        middle = left + width / 2
        parts.append(
            f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{HEIGHT}" rx="7"/>'
            f'<text x="{middle:.0f}" y="{top + 19}" class="name">{wing}</text>'
            f'<text x="{middle:.0f}" y="{top + 36}">{escape(PURPOSES[wing])}</text>'
        )
    bottom = MARGIN + len(layers) * (HEIGHT + GAP)
    parts.append(f'<text x="{WIDTH / 2:.0f}" y="{bottom}">{LEGEND}</text>')
    height = bottom + MARGIN
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"
font-family="sans-serif">
<title>The wings of {PACKAGE}: each imports only those below it</title>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
orient="auto">
<path d="M0 0 L8 4 L0 8 z" style="fill: #5f6b7a; stroke: none"/></marker></defs>
<style>
path {{ fill: none; stroke: #5f6b7a; stroke-width: 1.3; marker-end: url(#head); }}
rect {{ fill: #eef3fb; stroke: #4a6fa5; }}
text {{ font-size: 11.5px; text-anchor: middle; fill: #333; }}
.name {{ font-size: 14px; font-weight: bold; fill: #1d3557; }}
</style>
<rect width="{WIDTH}" height="{height}" style="fill: #fff; stroke: none"/>
{body}
</svg>
"""


def picture() -> str:
    """The SVG of the package as it is."""
    layers = read_layers()
    return draw(layers, without_consequences(find_arrows([*chain(*layers)])))


if __name__ == "__main__":
    PICTURE.write_text(picture())
