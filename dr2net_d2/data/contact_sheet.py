"""One picture with images of a dataset side by side, and their boxes."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import cv2
import numpy as np

from dr2net_d2.data.coco import CocoDataset, CocoRecord, read_image

_GAP, _LINE = 8, 18
_FONT, _INK, _PAPER = cv2.FONT_HERSHEY_SIMPLEX, (40, 40, 40), (250, 250, 250)
_HATCH = (60, 60, 230)
_HATCH_STEP = 10


def label_colour(label: int) -> tuple[int, int, int]:
    """BGR colour of a class. Hues advance by the golden ratio, so neighbouring labels differ."""
    red, green, blue = colorsys.hsv_to_rgb(0.12 + label * 0.618034, 0.8, 1.0)
    return round(255 * blue), round(255 * green), round(255 * red)


def choose(records: Sequence[CocoRecord], count: int) -> list[CocoRecord]:
    """Images spread evenly over a dataset; images without annotations only if too few have any."""
    full = [record for record in records if len(record.boxes) or len(record.ignore_regions)]
    chosen = full if len(full) >= count else [*records]
    indices = np.linspace(0, len(chosen) - 1, min(count, len(chosen))).round().astype(int)
    return [chosen[index] for index in indices]


def contact_sheet(dataset: CocoDataset, count: int, side: int) -> np.ndarray:
    """Draw images in a grid. Boxes have their class's colour; boxes to be ignored are grey.

    Args:
        dataset: the dataset.
        count: number of images.
        side: side of a grid cell, in pixels. Images are scaled to fit, small ones by an integer.

    Returns:
        ``(height, width, 3)`` uint8, BGR.

    Raises:
        DatasetError: an image cannot be read.
    """
    records = choose(dataset.records, count)
    columns = math.ceil(math.sqrt(len(records)))
    legend = _legend(dataset.categories, columns * (side + _GAP) + _GAP)
    rows = []
    for start in range(0, len(records), columns):
        cells = [_cell(record, side) for record in records[start : start + columns]]
        height = max(len(cell) for cell in cells) + _GAP + _LINE
        row = np.full((height, legend.shape[1], 3), _PAPER, np.uint8)
        for column, (cell, record) in enumerate(zip(cells, records[start:], strict=False)):
            x, y = _GAP + column * (side + _GAP), _GAP + len(cell)
            row[_GAP:y, x : x + cell.shape[1]] = cell
            objects = int((~record.iscrowd).sum())
            text = f"id {record.image_id}, {record.width} x {record.height} px, {objects} objects"
            cv2.putText(row, text, (x, y + 13), _FONT, 0.4, _INK, 1, cv2.LINE_AA)
        rows.append(row)
    return np.vstack([*rows, legend])


def _cell(record: CocoRecord, side: int) -> np.ndarray:
    scale = side / max(record.width, record.height)
    if scale > 1:
        scale = math.floor(scale)
    size = max(1, round(record.width * scale)), max(1, round(record.height * scale))
    method = cv2.INTER_NEAREST if scale >= 1 else cv2.INTER_AREA
    picture = cv2.resize(read_image(record), size, interpolation=method)
    for box in np.rint(record.ignore_regions * scale).astype(int).tolist():
        _hatch(picture, box)
    order = np.argsort(~record.iscrowd, kind="stable")  # ignored ones first, so others cover them
    for index in order:
        x0, y0, x1, y1 = np.rint(record.boxes[index] * scale).astype(int).tolist()
        ignored = bool(record.iscrowd[index])
        colour = (150, 150, 150) if ignored else label_colour(int(record.labels[index]))
        # Around the object, so that a small one stays visible.
        cv2.rectangle(picture, (x0 - 1, y0 - 1), (x1, y1), colour, 1)
        if ignored:
            cv2.line(picture, (x0, y0), (x1, y1), colour, 1)
    return picture


def _hatch(picture: np.ndarray, box: list[int]) -> None:
    height, width = picture.shape[:2]
    x0, y0 = max(box[0], 0), max(box[1], 0)
    x1, y1 = min(box[2], width), min(box[3], height)
    region = picture[y0:y1, x0:x1]
    rows, columns = np.ogrid[: region.shape[0], : region.shape[1]]
    region[(rows + columns) % _HATCH_STEP < 2] = _HATCH
    cv2.rectangle(picture, (x0, y0), (x1 - 1, y1 - 1), _HATCH, 1)


def _legend(names: Sequence[str], width: int) -> np.ndarray:
    """Lines with the colour of each class, and the signs for ignored boxes and regions."""
    entries = [(name, label_colour(label)) for label, name in enumerate(names)]
    entries += [("to be ignored", (150, 150, 150)), ("ignore region", _HATCH)]
    placed, x, y = [], _GAP, 0
    for name, colour in entries:
        extent = 20 + cv2.getTextSize(name, _FONT, 0.42, 1)[0][0] + 14
        if x + extent > width and x > _GAP:
            x, y = _GAP, y + _LINE
        placed.append((name, colour, x, y))
        width = max(width, x + extent)
        x += extent
    legend = np.full((y + _LINE + _GAP, width, 3), _PAPER, np.uint8)
    for name, colour, left, top in placed:
        if colour == _HATCH:
            _hatch(legend, [left, top + 2, left + 13, top + 15])
        else:
            cv2.rectangle(legend, (left, top + 2), (left + 12, top + 14), colour, cv2.FILLED)
        cv2.putText(legend, name, (left + 18, top + 13), _FONT, 0.42, _INK, 1, cv2.LINE_AA)
    return legend
