"""Ground truth and detections as arrays, from COCO format."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from dr2net_d2.errors import DatasetError


@dataclass(frozen=True, eq=False)
class Table:
    """n objects in the order of the JSON, or n detections in that of the results.

    Attributes:
        image, category: ``(n,)`` int64, positions among the sorted ids of the JSON.
        xywh: ``(n, 4)`` float64, in pixels.
        area: ``(n,)`` float64, in px²; of objects, as annotated.
        crowd: ``(n,)`` bool, objects that are ignored.
        score: ``(n,)`` float64; 1 for objects.
    """

    image: np.ndarray
    category: np.ndarray
    xywh: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    score: np.ndarray


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The annotations of a dataset.

    Attributes:
        image_ids, category_ids: ids of the JSON, ascending.
        classes: names of the categories.
        sizes: ``(images, 2)`` int64, width and height, in pixels.
        objects: the annotated objects.
        region_image: ``(r,)`` int64, position of each ignore region's image.
        regions: ``(r, 4)`` float64, XYWH in pixels.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    classes: tuple[str, ...]
    sizes: np.ndarray
    objects: Table
    region_image: np.ndarray
    regions: np.ndarray


def read_truth(json_file: str | Path) -> GroundTruth:
    """Read annotations in COCO format; missing ``area`` and ``iscrowd`` are filled in.

    Raises:
        DatasetError: if an annotation has an unknown image or category.
    """
    document = json.loads(Path(json_file).read_bytes())
    images = sorted(document["images"], key=lambda row: row["id"])
    categories = sorted(document["categories"], key=lambda row: row["id"])
    image_ids, category_ids = _column(images, "id"), _column(categories, "id")
    rows = document["annotations"]
    xywh = _xywh(rows)
    boxes = xywh[:, 2] * xywh[:, 3]
    area = (row.get("area", own) for row, own in zip(rows, boxes.tolist(), strict=True))
    objects = Table(
        image=_positions(image_ids, _column(rows, "image_id"), f"{json_file}: image_id"),
        category=_positions(
            category_ids, _column(rows, "category_id"), f"{json_file}: category_id"
        ),
        xywh=xywh,
        area=np.fromiter(area, float, len(rows)),
        crowd=np.fromiter((row.get("iscrowd", 0) for row in rows), bool, len(rows)),
        score=np.ones(len(rows)),
    )
    regions = document.get("ignore_regions", [])
    sizes = [(row.get("width", 0), row.get("height", 0)) for row in images]
    return GroundTruth(
        image_ids=image_ids,
        category_ids=category_ids,
        classes=tuple(row["name"] for row in categories),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        objects=objects,
        region_image=_positions(image_ids, _column(regions, "image_id"), f"{json_file}: image_id"),
        regions=_xywh(regions),
    )


def read_results(results: Sequence[dict[str, Any]], truth: GroundTruth) -> Table:
    """Convert detections in COCO format.

    Raises:
        DatasetError: if a detection has an image or a category that is not in the ground truth, or
            a box or a score that is not finite.
    """
    xywh = _xywh(results)
    score = np.fromiter(map(itemgetter("score"), results), float, len(results))
    bad = ~(np.isfinite(score) & np.isfinite(xywh).all(axis=1))
    if bad.any():
        raise DatasetError(
            f"result {reprlib.repr(results[int(bad.argmax())])} is not finite; remove it, or find "
            "out why the detector predicts it"
        )
    images, categories = _column(results, "image_id"), _column(results, "category_id")
    return Table(
        image=_positions(truth.image_ids, images, "a result's image_id"),
        category=_positions(truth.category_ids, categories, "a result's category_id"),
        xywh=xywh,
        area=xywh[:, 2] * xywh[:, 3],
        crowd=np.zeros(len(results), bool),
        score=score,
    )


def _column(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return np.fromiter(map(itemgetter(key), rows), np.int64, len(rows))


def _xywh(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    numbers = chain.from_iterable(map(itemgetter("bbox"), rows))
    return np.fromiter(numbers, float, 4 * len(rows)).reshape(-1, 4)


def _positions(ids: np.ndarray, wanted: np.ndarray, name: str) -> np.ndarray:
    """Positions among sorted ids; ``name`` says what they are, for errors."""
    if not len(wanted):
        return np.zeros(0, np.int64)
    positions = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    if (unknown := ids[positions] != wanted).any():
        raise DatasetError(
            f"{name} {wanted[unknown][0]} is not in the ground truth; give the detections and the "
            "annotations of the same dataset"
        )
    return positions
