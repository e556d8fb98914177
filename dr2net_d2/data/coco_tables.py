"""The tables of a COCO-format JSON, with checks for everything that can be wrong in their rows.

Besides COCO's own tables there may be "ignore_regions": rows with "id", "image_id" and "bbox" of
regions in which no object of any class is annotated.
"""

import json
import os
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dr2net_d2.errors import DatasetError

Row = dict[str, Any]
Report = Callable[[str], object]
"""Called with each problem, such as "annotation 12: bbox is ...; it must be ...". It may raise; if
it returns, the row is left out."""

_SINGULAR = {
    "images": "image",
    "annotations": "annotation",
    "categories": "category",
    "ignore_regions": "ignore region",
}
_KEYS = {
    "images": {"id", "file_name", "height", "width"},
    "annotations": {"id", "image_id", "category_id", "bbox"},
    "categories": {"id", "name"},
    "ignore_regions": {"id", "image_id", "bbox"},
}


@dataclass(frozen=True, eq=False)
class BoxTable:
    """Rows with a box, in the order of the JSON.

    Attributes:
        rows: n rows.
        boxes: ``(n, 4)`` float32, XYXY in pixels.
        empty: ``(n,)`` bool, true where a box has no width or height.
        image_index: ``(n,)`` int64, the index of each row's image.
        order: indices of the rows whose box is not empty, sorted by image.
        bounds: ``(images + 1,)``; image i has ``order[bounds[i] : bounds[i + 1]]``.
    """

    rows: list[Row]
    boxes: np.ndarray
    empty: np.ndarray
    image_index: np.ndarray
    order: np.ndarray
    bounds: np.ndarray

    def of_image(self, index: int) -> np.ndarray:
        """Indices of an image's rows whose box is not empty."""
        return self.order[self.bounds[index] : self.bounds[index + 1]]


@dataclass(frozen=True, eq=False)
class Tables:
    """The rows that can be used.

    Attributes:
        categories: by ascending id.
        images: in the order of the JSON.
        objects: the annotations.
        labels: ``(n,)`` int64, the index of each annotation's category.
        iscrowd: ``(n,)`` bool.
        regions: the ignore regions.
    """

    categories: list[Row]
    images: list[Row]
    objects: BoxTable
    labels: np.ndarray
    iscrowd: np.ndarray
    regions: BoxTable


def read_json(json_file: Path) -> Row:
    """Read a COCO-format JSON.

    Raises:
        DatasetError: the file does not exist, is not JSON, or its top level is not an object.
    """
    try:
        document = json.loads(json_file.read_bytes())
    except OSError as error:
        raise DatasetError(
            f"{json_file}: {error.strerror}; give the path of a COCO-format JSON"
            " (for coco_2017_* set DETECTRON2_DATASETS to the folder that holds coco/)"
        ) from None
    except (ValueError, RecursionError) as error:
        size = json_file.stat().st_size
        raise DatasetError(
            f"{json_file}: not JSON, or cut short at {size} bytes ({error}); restore the file"
        ) from None
    if not isinstance(document, dict):
        raise DatasetError(
            f"{json_file}: the top level is {reprlib.repr(document)}; COCO format has an object"
            ' with "images", "annotations" and "categories"'
        )
    return document


def check_tables(document: Row, report: Report) -> Tables:
    """Check all rows of all tables, but not whether the image files exist."""
    categories = sorted(_rows(document, "categories", report), key=lambda row: row["id"])
    images = [row for row in _rows(document, "images", report) if _is_image(row, report)]
    annotations = _rows(document, "annotations", report)
    regions = _rows({"ignore_regions": [], **document}, "ignore_regions", report)
    for table, rows in (("categories", categories), ("images", images)):
        if not rows:
            report(f'"{table}" is empty; name at least one')

    sizes = np.array([(row["width"], row["height"]) for row in images], dtype=np.float64)
    category_index = {row["id"]: position for position, row in enumerate(categories)}
    annotations = [
        row
        for row in annotations
        if _refers(row, "category_id", category_index, "annotations", report)
        and _has_iscrowd(row, report)
    ]
    objects = _box_table(annotations, "annotations", images, sizes, report)
    return Tables(
        categories=categories,
        images=images,
        objects=objects,
        labels=np.array([category_index[row["category_id"]] for row in objects.rows], dtype=int),
        iscrowd=np.array([row.get("iscrowd", 0) for row in objects.rows], dtype=bool),
        regions=_box_table(regions, "ignore_regions", images, sizes, report),
    )


def missing_files(files: Sequence[str]) -> list[int]:
    """Indices of the files that do not exist."""
    missing = []
    # One listing per folder, because asking for each file takes minutes on a network disk.
    listings: dict[str, set[str]] = {}
    for index, file in enumerate(files):
        folder, base = os.path.split(file)
        if folder not in listings:
            listings[folder] = _listing(folder)
        if base not in listings[folder]:
            missing.append(index)
    return missing


def judge_boxes(
    xywh: np.ndarray, image_sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Which boxes can be used.

    Args:
        xywh: ``(n, 4)`` float64, x, y, width, height in pixels.
        image_sizes: ``(n, 2)`` or ``(2,)``, width and height of each box's image.

    Returns:
        The boxes, ``(n, 4)`` float32 XYXY; which are empty, ``(n,)`` bool; and the problem of each
        box, "" if it can be used. A box may reach over the edge of its image.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)
    # In float32, as these boxes are used: there a width of 1e-6 at x = 500 is no width.
    empty = np.any(boxes[:, 2:] <= boxes[:, :2], axis=1)
    outside = np.any((boxes[:, 2:] <= 0) | (boxes[:, :2] >= image_sizes), axis=1) & ~empty
    negative = np.any(xywh[:, 2:] < 0, axis=1)
    infinite = ~np.all(np.isfinite(boxes), axis=1)
    problems = [""] * len(xywh)
    for wrong, problem in (
        (outside, "lies outside its image"),
        (negative, "has negative width or height"),
        (infinite, "is not finite"),
    ):
        for index in np.flatnonzero(wrong).tolist():
            problems[index] = problem
    return boxes, empty, problems


def _rows(document: Row, table: str, report: Report) -> list[Row]:
    """The rows of a table that are objects with all keys and distinct integer ids."""
    if table not in document:
        report(
            f'key "{table}" is missing, found {reprlib.repr(sorted(document))};'
            ' COCO format has "images", "annotations" and "categories"'
        )
        return []
    rows = document[table]
    if not isinstance(rows, list):
        report(f'"{table}" is {reprlib.repr(rows)}; it must be a list of objects')
        return []
    good: dict[int, Row] = {}
    for position, row in enumerate(rows):
        problem = _row_problem(row, position, table, good)
        if problem:
            report(problem)
        else:
            good[row["id"]] = row
    return list(good.values())


def _row_problem(row: Any, position: int, table: str, seen: dict[int, Row]) -> str:
    keys, singular = _KEYS[table], _SINGULAR[table]
    if not isinstance(row, dict):
        return f'"{table}"[{position}] is {reprlib.repr(row)}; it must be an object'
    if missing := keys - row.keys():
        which = reprlib.repr(row["id"]) if "id" in row else f"at position {position}"
        return (
            f"{singular} {which}: missing {', '.join(sorted(missing))};"
            f" each {singular} needs {', '.join(sorted(keys))}"
        )
    if type(row["id"]) is not int:
        return (
            f"{singular} at position {position}: id is {reprlib.repr(row['id'])};"
            " ids must be integers"
        )
    if row["id"] in seen:
        return f'{singular} {row["id"]}: this id occurs twice in "{table}"; renumber one'
    if table == "categories" and not isinstance(row["name"], str):
        return f"category {row['id']}: name is {reprlib.repr(row['name'])}; it must be a string"
    return ""


def _is_image(row: Row, report: Report) -> bool:
    name = row["file_name"]
    if not isinstance(name, str) or not name:
        report(f"image {row['id']}: file_name is {reprlib.repr(name)}; it must be a path")
        return False
    for side in ("height", "width"):
        if type(row[side]) is not int or not 0 < row[side] < 2**31:
            report(
                f"image {row['id']}: {side} is {reprlib.repr(row[side])};"
                " it must be a positive integer, in pixels"
            )
            return False
    return True


def _listing(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()


def _refers(row: Row, key: str, index: dict[int, int], table: str, report: Report) -> bool:
    """Whether the value of a row's key is an id in ``index``, the ids of another table."""
    value = row[key]
    if type(value) is int and value in index:
        return True
    other = {"image_id": "images", "category_id": "categories"}[key]
    report(
        f"{_SINGULAR[table]} {row['id']}: {key} {reprlib.repr(value)} is not an id in"
        f' "{other}"; correct it or delete the {_SINGULAR[table]}'
    )
    return False


def _has_iscrowd(row: Row, report: Report) -> bool:
    if row.get("iscrowd", 0) in (0, 1):
        return True
    report(f"annotation {row['id']}: iscrowd is {reprlib.repr(row['iscrowd'])}; it must be 0 or 1")
    return False


def _has_box(row: Row, singular: str, report: Report) -> bool:
    box = row["bbox"]
    if isinstance(box, list) and len(box) == 4 and set(map(type, box)) <= {int, float}:
        return True
    report(
        f"{singular} {row['id']}: bbox is {reprlib.repr(box)};"
        " it must be 4 numbers, x, y, width, height in pixels"
    )
    return False


def _as_floats(boxes: list[list[float]]) -> np.ndarray:
    """``(n, 4)`` float64; integers that are too large become infinite."""
    try:
        return np.array(boxes, dtype=np.float64).reshape(-1, 4)
    except OverflowError:
        return np.array([[float(str(value)) for value in box] for box in boxes])


def _box_table(
    rows: list[Row], table: str, images: list[Row], sizes: np.ndarray, report: Report
) -> BoxTable:
    """The rows whose image exists and whose box can be used."""
    singular = _SINGULAR[table]
    index = {row["id"]: position for position, row in enumerate(images)}
    rows = [
        row
        for row in rows
        if _refers(row, "image_id", index, table, report) and _has_box(row, singular, report)
    ]
    image_index = np.array([index[row["image_id"]] for row in rows], dtype=np.int64)
    xywh = _as_floats([row["bbox"] for row in rows])
    boxes, empty, problems = judge_boxes(xywh, sizes.reshape(-1, 2)[image_index])
    for row, problem, position in zip(rows, problems, image_index, strict=True):
        if problem:
            width, height = images[position]["width"], images[position]["height"]
            report(
                f"{singular} {row['id']}: bbox {row['bbox']} {problem}"
                f" (image {row['image_id']} is {width} x {height} px);"
                f" correct it or delete the {singular}"
            )
    good = np.array([not problem for problem in problems], dtype=bool)
    rows = [row for row, is_good in zip(rows, good, strict=True) if is_good]
    boxes, empty, image_index = boxes[good], empty[good], image_index[good]
    order = np.argsort(image_index, kind="stable")
    order = order[~empty[order]]
    bounds = np.searchsorted(image_index[order], np.arange(len(images) + 1))
    return BoxTable(rows, boxes, empty, image_index, order, bounds)
