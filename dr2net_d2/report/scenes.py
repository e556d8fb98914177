"""Images with their errors: missed objects, wrong classes, other false positives, duplicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from dr2net_d2.evaluation import CLASSIFICATION, DUPLICATE, Errors, GroundTruth, Table
from dr2net_d2.inference import place_labels

# Okabe and Ito's colours; the lines differ as well.
STYLES: dict[str, tuple[str, str, float]] = {
    "ignored": ("#BBBBBB", ":", 1.0),
    "found": ("#FFFFFF", "-", 0.9),
    "missed": ("#FF7A1A", "-", 2.2),
    "wrong class": ("#E58FC0", "-.", 2.0),
    "false positive": ("#56B4E9", "--", 2.0),
    "duplicate": ("#F0E442", ":", 2.2),
}
"""Group of boxes -> colour, line style and width in points; later groups are drawn on top."""

CROP, WHOLE = 600, 1280
"""Longer side of the pictures, in pixels."""

_DPI = 120
_MAX_CAPTIONS = 24


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and its boxes.

    Attributes:
        pixels: ``(H, W, 3)`` uint8, RGB.
        boxes: group of ``STYLES`` -> ``(n, 4)`` XYWH in pixels.
        captions: group -> text of each box; groups without captions are left out.
    """

    pixels: np.ndarray
    boxes: Mapping[str, np.ndarray]
    captions: Mapping[str, Sequence[str]]

    def window(self) -> tuple[int, int, int, int]:
        """Find the region with the most errors.

        It is a square about 12 times as wide as their boxes, so that small objects can be seen,
        or less where the image is smaller.

        Returns:
            XYWH in pixels; the whole image if there are no errors.
        """
        height, width = self.pixels.shape[:2]
        groups = ("missed", "wrong class", "false positive", "duplicate")
        boxes = np.concatenate([self.boxes[name] for name in groups])
        if not len(boxes):
            return 0, 0, width, height
        side = int(np.clip(12 * np.median(np.sqrt(boxes[:, 2:].prod(axis=1))), 64, 1600))
        size = np.minimum(side, (width, height))
        centres = boxes[:, :2] + boxes[:, 2:] / 2
        corners = np.clip(centres - size / 2, 0, (width, height) - size).round()
        inside = (centres >= corners[:, None]) & (centres < corners[:, None] + size)
        x, y = corners[inside.all(axis=2).sum(axis=1).argmax()].astype(int).tolist()
        return x, y, int(size[0]), int(size[1])


def make_scene(
    pixels: np.ndarray,
    position: int,
    errors: Errors,
    truth: GroundTruth,
    results: Table,
    minimum_score: float,
) -> Scene:
    """Show the errors in an image, with the detections from a minimum score on.

    Args:
        pixels: ``(H, W, 3)`` uint8, RGB.
        position: of the image in the ground truth.
        errors, truth, results: of the same evaluation.
        minimum_score: detections with lower scores are left out.
    """
    objects, matches = truth.objects, errors.matches
    g = np.flatnonzero(objects.image == position)
    d = np.flatnonzero(
        (results.image == position) & matches.wrong & (results.score >= minimum_score)
    )
    confused, duplicate = (d[errors.kind[d] == kind] for kind in (CLASSIFICATION, DUPLICATE))
    others = np.setdiff1d(d, [*confused, *duplicate])
    matched = errors.matched_score[g] >= minimum_score
    # An object that is taken for another class is shown by the detection alone.
    missed = np.setdiff1d(g[matches.to_find[g] & ~matched], errors.target[confused])
    regions = truth.regions[truth.region_image == position]

    def class_names(rows: np.ndarray, table: Table) -> list[str]:
        return [truth.classes[k] for k in table.category[rows].tolist()]

    actual = class_names(errors.target[confused], objects)
    predicted = class_names(confused, results)
    return Scene(
        pixels=pixels,
        boxes={
            "ignored": np.concatenate([objects.xywh[g[matches.truth_ignored[g]]], regions]),
            "found": objects.xywh[g[matches.to_find[g] & matched]],
            "missed": objects.xywh[missed],
            "wrong class": results.xywh[confused],
            "false positive": results.xywh[others],
            "duplicate": results.xywh[duplicate],
        },
        captions={
            "missed": class_names(missed, objects),
            "wrong class": [f"{a} → {b}" for a, b in zip(actual, predicted, strict=True)],
            "false positive": class_names(others, results),
            "duplicate": class_names(duplicate, results),
        },
    )


def draw_scene(scene: Scene, window: tuple[int, int, int, int], longest: int) -> np.ndarray:
    """Draw a region of a scene.

    Args:
        scene: the image and its boxes.
        window: XYWH of the region, in pixels.
        longest: longer side of the picture, in pixels; it is enlarged 12 times at most.

    Returns:
        ``(H, W, 3)`` uint8, RGB.
    """
    x, y, width, height = window
    scale = min(longest / max(width, height), 12)
    size = round(width * scale), round(height * scale)
    pixels = scene.pixels[y : y + height, x : x + width]
    pixels = cv2.resize(
        pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    )
    figure = Figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(pixels, extent=(0, size[0], size[1], 0), aspect="auto")
    axes.set_xlim(0, size[0])
    axes.set_ylim(size[1], 0)
    drawn, captions = [np.zeros((0, 4))], []
    for name, (colour, line, thickness) in STYLES.items():
        boxes = (scene.boxes[name] - (x, y, 0, 0)) * scale
        visible = np.all((boxes[:, :2] + boxes[:, 2:] > 0) & (boxes[:, :2] < size), axis=1)
        for left, top, w, h in boxes[visible].tolist():
            # Outside the object, so that the line does not hide it.
            axes.add_patch(
                Rectangle(
                    (left - 2, top - 2),
                    w + 4,
                    h + 4,
                    fill=False,
                    ec=colour,
                    ls=line,
                    lw=thickness,
                    path_effects=[withStroke(linewidth=thickness + 1.6, foreground="#000000")],
                )
            )
        drawn.append(boxes[visible])
        texts = scene.captions.get(name, ())
        captions += [
            (texts[i], colour) if texts else None for i in np.flatnonzero(visible).tolist()
        ]
    _write_captions(axes, np.concatenate(drawn), captions, size)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def contact_sheet(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """Arrange pictures with titles in rows of four, above a legend."""
    columns = min(4, max(len(pictures), 1))
    rows = -(-len(pictures) // columns) or 1
    figure = Figure(figsize=(3.6 * columns, 3.9 * rows + 0.5), dpi=110, layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, picture, title in zip(figure.axes, pictures, titles, strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=9, parse_math=False)
    handles = [
        Line2D([], [], color=colour, ls=line, lw=thickness + 0.5, label=name)
        for name, (colour, line, thickness) in STYLES.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), facecolor="#505860",
        labelcolor="white", fontsize=10,
    )  # fmt: skip
    return figure


def _write_captions(
    axes: Axes,
    boxes: np.ndarray,
    captions: Sequence[tuple[str, str] | None],
    size: tuple[int, int],
) -> None:
    """Write captions beside the boxes, where they cover least; none if there are too many."""
    rows = [i for i, caption in enumerate(captions) if caption is not None]
    if len(rows) > _MAX_CAPTIONS:
        return
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    # place_labels takes the first boxes for those with a caption.
    order = [*rows, *(i for i in range(len(boxes)) if i not in set(rows))]
    texts = [caption for caption in captions if caption is not None]
    extents = [(round(8.1 * len(text)) + 6, 18) for text, _ in texts]
    extents += [(0, 0)] * (len(order) - len(rows))
    places = place_labels(corners[order].round().astype(int), extents, size)
    for (left, top), (width, height), (text, colour) in zip(places, extents, texts, strict=False):
        axes.add_patch(Rectangle((left, top), width, height, fc=colour, ec="none", alpha=0.9))
        axes.text(
            left + width / 2, top + height / 2, text, fontsize=8, color="black", ha="center",
            va="center", parse_math=False, family="DejaVu Sans Mono",
        )  # fmt: skip
