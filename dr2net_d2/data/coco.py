"""Detection data in COCO format, checked in full before any training starts.

No detector framework is imported: both engines read their images and boxes from here.
"""

import json
import os
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dr2net_d2.errors import DatasetError

_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}
_KEYS = {
    "images": {"id", "file_name", "height", "width"},
    "annotations": {"id", "image_id", "category_id", "bbox"},
    "categories": {"id", "name"},
}


@dataclass(frozen=True, eq=False)
class CocoRecord:
    """One image and its objects.

    Attributes:
        file_name: full path of the image.
        image_id: the image's id in the JSON.
        height: image height in pixels.
        width: image width in pixels.
        boxes: ``(n, 4)`` float32, XYXY in pixels, as annotated: a box may reach over the edge.
        labels: ``(n,)`` int64, contiguous category indices from 0.
        iscrowd: ``(n,)`` bool, true where a box covers a crowd and not one object.
    """

    file_name: str
    image_id: int
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    iscrowd: np.ndarray


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A validated COCO-format dataset.

    Attributes:
        categories: category names in contiguous order, that of ascending JSON ids.
        category_ids: the JSON id of every contiguous category index.
        records: one record per image, in the order of the JSON, images without objects included.
        dropped: number of annotations left out because their box has zero width or height.
    """

    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: tuple[CocoRecord, ...]
    dropped: int

    @property
    def densest(self) -> int:
        """Objects of the image that has most, crowds apart."""
        return max(int((~record.iscrowd).sum()) for record in self.records)


def load_coco(json_file: str | Path, image_root: str | Path) -> CocoDataset:
    """Load and check a COCO-format detection dataset; pixels are not read.

    Boxes of zero width or height, of which COCO train 2017 has a few, are left out and counted.

    Args:
        json_file: the annotation file.
        image_root: the folder that the JSON's ``file_name`` values are relative to.

    Raises:
        DatasetError: one line that names the file, the image or annotation, the offending value
            and what to do.
    """
    document = _read_json(Path(json_file))
    try:
        categories = sorted(_rows(document, "categories"), key=lambda row: row["id"])
        images, annotations = _rows(document, "images"), _rows(document, "annotations")
        for table, rows in (("categories", categories), ("images", images)):
            if not rows:
                raise DatasetError(f'"{table}" is empty; name at least one')
        files = _image_files(images, Path(image_root))
        image_index = _positions(annotations, "image_id", images, "images")
        labels = _positions(annotations, "category_id", categories, "categories")
        sizes = np.array([(row["width"], row["height"]) for row in images], dtype=np.float64)
        boxes, empty = _boxes(annotations, sizes[image_index])
        iscrowd = _iscrowd(annotations)
    except DatasetError as error:
        raise DatasetError(f"{json_file}: {error}") from None

    order = np.argsort(image_index, kind="stable")
    order = order[~empty[order]]
    bounds = np.searchsorted(image_index[order], np.arange(len(images) + 1))
    boxes, labels, iscrowd = boxes[order], labels[order], iscrowd[order]
    records = tuple(
        CocoRecord(
            file_name=file,
            image_id=row["id"],
            height=row["height"],
            width=row["width"],
            boxes=boxes[start:stop],
            labels=labels[start:stop],
            iscrowd=iscrowd[start:stop],
        )
        for row, file, start, stop in zip(images, files, bounds[:-1], bounds[1:], strict=True)
    )
    return CocoDataset(
        categories=tuple(row["name"] for row in categories),
        category_ids=tuple(row["id"] for row in categories),
        records=records,
        dropped=int(empty.sum()),
    )


def read_image(record: CocoRecord) -> np.ndarray:
    """Read a record's pixels.

    Returns:
        ``(height, width, 3)`` uint8, BGR as OpenCV and Detectron2 have it. A rotation in the
        file's EXIF data is applied.

    Raises:
        DatasetError: the file cannot be read, or its size is not that of the JSON.
    """
    where = f"{record.file_name}: image {record.image_id}"
    image = read_pixels(record.file_name, where)
    if image.shape[:2] != (record.height, record.width):
        raise DatasetError(
            f"{where}: the file is {image.shape[1]} x {image.shape[0]} px but the JSON says"
            f" {record.width} x {record.height}; correct width and height in the JSON"
            " (EXIF rotation counts), or restore the file"
        )
    return image


def read_pixels(file: str | Path, where: str = "") -> np.ndarray:
    """Read an image file of any size, as ``read_image`` does.

    Args:
        file: its path.
        where: how an error is to name it; the path unless given.

    Raises:
        DatasetError: the file cannot be read.
    """
    where = where or str(file)
    try:
        data = np.fromfile(file, dtype=np.uint8)
    except OSError as error:
        raise DatasetError(f"{where}: {error.strerror}; restore the file") from None
    # OpenCV raises on an empty buffer and returns None on anything else that is no image.
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if image is None or _is_cut_jpeg(data.tobytes()):
        raise DatasetError(
            f"{where}: {data.size} bytes that are not a readable image; restore the file"
        )
    return image


def _is_cut_jpeg(data: bytes) -> bool:
    """Whether a JPEG lacks its end marker; OpenCV 4 fills what is missing with grey."""
    if not data.startswith(b"\xff\xd8"):
        return False
    # Headers are skipped by their length: a thumbnail in them has an end marker of its own.
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.find(b"\xff\xd9", at) < 0


def _read_json(json_file: Path) -> dict[str, Any]:
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


def _rows(document: dict[str, Any], table: str) -> list[dict[str, Any]]:
    """One table of the JSON: its rows are objects with all keys and distinct integer ids."""
    if table not in document:
        raise DatasetError(
            f'key "{table}" is missing, found {reprlib.repr(sorted(document))};'
            ' COCO format has "images", "annotations" and "categories"'
        )
    rows, keys, singular = document[table], _KEYS[table], _SINGULAR[table]
    if not isinstance(rows, list):
        raise DatasetError(f'"{table}" is {reprlib.repr(rows)}; it must be a list of objects')
    seen: set[int] = set()
    for position, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DatasetError(
                f'"{table}"[{position}] is {reprlib.repr(row)}; it must be an object'
            )
        if missing := keys - row.keys():
            which = reprlib.repr(row["id"]) if "id" in row else f"at position {position}"
            raise DatasetError(
                f"{singular} {which}: missing {', '.join(sorted(missing))};"
                f" each {singular} needs {', '.join(sorted(keys))}"
            )
        if type(row["id"]) is not int:
            raise DatasetError(
                f"{singular} at position {position}: id is {reprlib.repr(row['id'])};"
                " ids must be integers"
            )
        if row["id"] in seen:
            raise DatasetError(
                f'{singular} {row["id"]}: this id occurs twice in "{table}"; renumber one'
            )
        if table == "categories" and not isinstance(row["name"], str):
            raise DatasetError(
                f"category {row['id']}: name is {reprlib.repr(row['name'])}; it must be a string"
            )
        seen.add(row["id"])
    return rows


def _image_files(images: list[dict[str, Any]], image_root: Path) -> list[str]:
    """The full path of every image; all of them exist."""
    files = []
    # One listing a folder: asking for each file takes minutes on a network disk.
    listings: dict[str, set[str]] = {}
    for row in images:
        name = row["file_name"]
        if not isinstance(name, str) or not name:
            raise DatasetError(
                f"image {row['id']}: file_name is {reprlib.repr(name)}; it must be a path"
            )
        for side in ("height", "width"):
            if type(row[side]) is not int or row[side] <= 0:
                raise DatasetError(
                    f"image {row['id']}: {side} is {reprlib.repr(row[side])};"
                    " it must be a positive integer, in pixels"
                )
        file = str(image_root / name)
        folder, base = os.path.split(file)
        if folder not in listings:
            listings[folder] = _listing(folder)
        if base not in listings[folder]:
            raise DatasetError(
                f"image {row['id']}: no file {file!r}; add the image, correct file_name,"
                " or give another image root"
            )
        files.append(file)
    return files


def _listing(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()


def _positions(
    annotations: list[dict[str, Any]], key: str, rows: Iterable[dict[str, Any]], table: str
) -> np.ndarray:
    """The position in ``rows`` of the id that each annotation refers to: ``(n,)`` int64."""
    index = {row["id"]: position for position, row in enumerate(rows)}
    positions = np.empty(len(annotations), dtype=np.int64)
    for i, row in enumerate(annotations):
        value = row[key]
        if type(value) is not int or value not in index:
            raise DatasetError(
                f"annotation {row['id']}: {key} {reprlib.repr(value)} is not an id in"
                f' "{table}"; correct it or delete the annotation'
            )
        positions[i] = index[value]
    return positions


def _boxes(
    annotations: list[dict[str, Any]], image_sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Checked boxes.

    Args:
        annotations: n rows of the JSON.
        image_sizes: ``(n, 2)`` width and height of each annotation's image.

    Returns:
        ``(n, 4)`` float32 XYXY, and ``(n,)`` bool, true where a box is empty.
    """
    for row in annotations:
        box = row["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not set(map(type, box)) <= {int, float}:
            raise DatasetError(
                f"annotation {row['id']}: bbox is {reprlib.repr(box)};"
                " it must be 4 numbers, x, y, width, height in pixels"
            )
    xywh = np.array([row["bbox"] for row in annotations], dtype=np.float64).reshape(-1, 4)
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)

    def refuse(bad: np.ndarray, problem: str) -> None:
        if bad.any():
            i = int(bad.argmax())
            width, height = image_sizes[i].astype(int)
            raise DatasetError(
                f"annotation {annotations[i]['id']}: bbox {annotations[i]['bbox']} {problem}"
                f" (image {annotations[i]['image_id']} is {width} x {height} px);"
                " correct it or delete the annotation"
            )

    refuse(~np.all(np.isfinite(boxes), axis=1), "is not finite")
    refuse(np.any(xywh[:, 2:] < 0, axis=1), "has negative width or height")
    # Judged in float32: a width of 1e-6 at x = 500 is none for those who read these boxes.
    empty = np.any(boxes[:, 2:] <= boxes[:, :2], axis=1)
    outside = np.any((boxes[:, 2:] <= 0) | (boxes[:, :2] >= image_sizes), axis=1)
    refuse(outside & ~empty, "lies outside its image")
    return boxes, empty


def _iscrowd(annotations: list[dict[str, Any]]) -> np.ndarray:
    for row in annotations:
        if row.get("iscrowd", 0) not in (0, 1):
            raise DatasetError(
                f"annotation {row['id']}: iscrowd is {reprlib.repr(row['iscrowd'])};"
                " it must be 0 or 1"
            )
    return np.array([row.get("iscrowd", 0) for row in annotations], dtype=bool)
