"""Draw detections into their image with OpenCV, alike for both engines and for videos."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from dr2net_d2.data.contact_sheet import label_colour
from dr2net_d2.inference.detections import Detections

LEGIBLE = 1024
"""Side in pixels that small images are enlarged to, by a whole number."""

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


def draw_detections(
    image: np.ndarray, detections: Detections, class_names: Sequence[str]
) -> np.ndarray:
    """Draw masks, boxes and labels; labels lie beside their boxes, where they cover the least.

    Args:
        image: (H, W, 3) uint8, BGR.
        detections: the objects of the image.
        class_names: names of the categories, by label.

    Returns:
        (s * H, s * W, 3) uint8, BGR. The scale s is a whole number, about ``LEGIBLE`` over the
        longer side of the image, and 1 for large images.
    """
    scale = max(1, round(LEGIBLE / max(image.shape[:2])))
    picture = image.repeat(scale, axis=0).repeat(scale, axis=1)
    unit = max(1.0, max(picture.shape[:2]) / (1.5 * LEGIBLE))
    colours = [label_colour(label) for label in detections.labels.tolist()]
    if detections.masks is not None:
        for mask, colour in zip(detections.masks, colours, strict=True):
            _tint(picture, mask.repeat(scale, axis=0).repeat(scale, axis=1), colour)
    boxes = np.round(detections.boxes * scale).astype(int)
    texts = [
        f"{class_names[label]} {score:.2f}"
        for label, score in zip(detections.labels, detections.scores, strict=True)
    ]
    sizes = [cv2.getTextSize(text, _FONT, 0.42 * unit, round(unit))[0] for text in texts]
    margin = round(3 * unit)
    extents = [(width + 2 * margin, height + 2 * margin) for width, height in sizes]
    corners = place_labels(boxes, extents, (picture.shape[1], picture.shape[0]))
    for (x, y), (width, height), text, colour in zip(corners, extents, texts, colours, strict=True):
        cv2.rectangle(picture, (x, y), (x + width - 1, y + height - 1), colour, cv2.FILLED)
        start = (x + margin, y + height - 1 - margin)
        ink = _BLACK if np.dot(colour, (0.11, 0.59, 0.30)) > 110 else _WHITE
        cv2.putText(picture, text, start, _FONT, 0.42 * unit, ink, round(unit), cv2.LINE_AA)
    for (x0, y0, x1, y1), colour in zip(boxes.tolist(), colours, strict=True):
        # Outlines go around the objects and over the labels, so that small objects stay visible.
        cv2.rectangle(picture, (x0 - 1, y0 - 1), (x1, y1), colour, max(1, round(1.5 * unit)))
    return picture


def place_labels(
    boxes: np.ndarray, extents: Sequence[tuple[int, int]], size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Choose a position for each label beside its box, where it covers the least.

    Args:
        boxes: (n, 4) XYXY in pixels.
        extents: (width, height) of each label, in pixels.
        size: (width, height) of the picture, in pixels; labels that fit stay inside.

    Returns:
        The upper left corner of each label, which lies above its box if that is free.
    """
    occupied = boxes
    chosen = []
    for (x0, y0, x1, y1), (width, height) in zip(boxes.tolist(), extents, strict=True):
        columns = (x0 - 1, x1 + 1 - width)
        corners = np.array(
            [(x, y) for y in (y0 - 1 - height, y1 + 2) for x in columns]
            + [(x, y) for x in (x1 + 2, x0 - 1 - width) for y in (y0 - 1, y1 + 1 - height)]
        )
        extent = np.array([width, height])
        corners = np.clip(corners, 0, np.maximum(size - extent, 0))
        ends = corners + extent
        starts = np.maximum(corners[:, None], occupied[:, :2])
        overlaps = (np.minimum(ends[:, None], occupied[:, 2:]) - starts).clip(0).prod(axis=2)
        best = overlaps.sum(axis=1).argmin()
        chosen.append((int(corners[best, 0]), int(corners[best, 1])))
        occupied = np.vstack([occupied, [*corners[best], *ends[best]]])
    return chosen


def _tint(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    picture[mask] = 0.6 * picture[mask] + 0.4 * np.array(colour)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, colour, 1)
