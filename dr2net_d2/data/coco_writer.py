"""Writing of datasets in COCO format."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

Annotated = (
    tuple[str, np.ndarray, np.ndarray, np.ndarray]
    | tuple[str, np.ndarray, np.ndarray, np.ndarray, Sequence[np.ndarray]]
)
"""File name; image, ``(height, width, 3)`` uint8 BGR; boxes, ``(n, 4)`` XYXY in pixels; labels,
``(n,)``; optionally n masks, ``(h, w)`` bool, each as large as its box, which is then integer."""

_SUBDIVISION = 8
"""Mask pixels are divided into so many per side, so that outlines run close to their edges."""


def write_coco(
    json_file: Path,
    image_root: Path,
    images: Iterable[Annotated],
    categories: Sequence[str],
    info: Mapping[str, str] | None = None,
) -> None:
    """Write images one at a time, and the JSON at the end.

    Args:
        json_file: the annotation file. Ids of images, objects and categories start at 1.
        image_root: the folder for images; it is made if it does not exist.
        images: images and objects. The suffix of a file name decides on the file's format, which
            should be a lossless one.
        categories: category names; a label is an index into them.
        info: the JSON's "info".
    """
    image_root.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (file_name, image, boxes, labels, *masks) in enumerate(images, start=1):
        file = image_root / file_name
        file.write_bytes(cv2.imencode(file.suffix, image)[1].tobytes())
        height, width = image.shape[:2]
        rows.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for index, ((x0, y0, x1, y1), label) in enumerate(
            zip(boxes.tolist(), labels.tolist(), strict=True)
        ):
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1}
            shape = {"segmentation": _outline(masks[0][index], x0, y0)} if masks else {}
            annotations.append({**ids, **box, **shape, "iscrowd": 0})
    document = {
        "info": dict(info or {}),
        "images": rows,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, start=1)],
    }
    json_file.write_text(json.dumps(document))


def _outline(mask: np.ndarray, x0: float, y0: float) -> list[list[float]]:
    """COCO polygons x, y, x, y, ... around a mask whose top left corner is (x0, y0)."""
    fine = mask.repeat(_SUBDIVISION, axis=0).repeat(_SUBDIVISION, axis=1).astype(np.uint8)
    outlines, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((line[:, 0] + 0.5) / _SUBDIVISION + (x0, y0)).ravel().tolist() for line in outlines]
