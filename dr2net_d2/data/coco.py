"""Datasets in COCO format, checked completely before any training starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np

from dr2net_d2.data.coco_tables import check_tables, missing_files, read_json
from dr2net_d2.errors import DatasetError


def _no_boxes() -> np.ndarray:
    return np.zeros((0, 4), dtype=np.float32)


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
        iscrowd: ``(n,)`` bool, true for a crowd and for whatever else the dataset wants ignored.
        ignore_regions: ``(m, 4)`` float32, XYXY in pixels: regions without annotations.
    """

    file_name: str
    image_id: int
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    iscrowd: np.ndarray
    ignore_regions: np.ndarray = field(default_factory=_no_boxes)


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A validated COCO-format dataset.

    Attributes:
        categories: category names, sorted by their ids in the JSON.
        category_ids: the id of each category in the JSON.
        records: one record per image, in the order of the JSON, with or without objects.
        dropped: number of annotations left out because their box has no width or height.
    """

    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: tuple[CocoRecord, ...]
    dropped: int

    @property
    def densest(self) -> int:
        """Number of objects, without crowds, in the image that has the most."""
        return max(int((~record.iscrowd).sum()) for record in self.records)


def load_coco(json_file: str | Path, image_root: str | Path) -> CocoDataset:
    """Load and check a COCO-format detection dataset; pixels are not read.

    Boxes without width or height, of which COCO train 2017 has a few, are left out and counted.

    Args:
        json_file: the annotation file.
        image_root: the folder that ``file_name`` in the JSON is relative to.

    Raises:
        DatasetError: the message names the file, the image or annotation, the wrong value and
            what to do, in one line.
    """
    document = read_json(Path(json_file))

    def refuse(problem: str) -> NoReturn:
        raise DatasetError(f"{json_file}: {problem}")

    tables = check_tables(document, refuse)
    files = [str(Path(image_root) / row["file_name"]) for row in tables.images]
    for index in missing_files(files):
        refuse(
            f"image {tables.images[index]['id']}: no file {files[index]!r}; add the image, correct"
            " file_name, or give another image root"
        )
    objects, regions = tables.objects, tables.regions
    records = []
    for index, (row, file) in enumerate(zip(tables.images, files, strict=True)):
        own = objects.of_image(index)
        records.append(
            CocoRecord(
                file_name=file,
                image_id=row["id"],
                height=row["height"],
                width=row["width"],
                boxes=objects.boxes[own],
                labels=tables.labels[own],
                iscrowd=tables.iscrowd[own],
                ignore_regions=regions.boxes[regions.of_image(index)],
            )
        )
    return CocoDataset(
        categories=tuple(row["name"] for row in tables.categories),
        category_ids=tuple(row["id"] for row in tables.categories),
        records=tuple(records),
        dropped=int(objects.empty.sum()),
    )


def read_image(record: CocoRecord) -> np.ndarray:
    """Read a record's pixels.

    Returns:
        ``(height, width, 3)`` uint8, BGR as in OpenCV and Detectron2. A rotation in the file's
        EXIF data is applied.

    Raises:
        DatasetError: the file cannot be read, or its size differs from that in the JSON.
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
        where: what an error calls it; the path by default.

    Raises:
        DatasetError: the file cannot be read.
    """
    where = where or str(file)
    try:
        data = np.fromfile(file, dtype=np.uint8)
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        problem = getattr(error, "strerror", None) or error
        raise DatasetError(f"{where}: {problem}; restore the file") from None
    # OpenCV raises on an empty buffer, but returns None for anything else that is not an image.
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if image is None or _is_cut_jpeg(data.tobytes()):
        raise DatasetError(
            f"{where}: {data.size} bytes that are not a readable image; restore the file"
        )
    return image


def _is_cut_jpeg(data: bytes) -> bool:
    """Whether a JPEG lacks its end marker; OpenCV 4 fills the missing part with grey."""
    if not data.startswith(b"\xff\xd8"):
        return False
    # Skip the headers, because a thumbnail in them has an end marker of its own.
    position, marker = 2, data[2:4]
    while marker[:1] == b"\xff" and marker != b"\xff\xda":  # the start of the pixels
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        marker = data[position : position + 2]
    return data.find(b"\xff\xd9", position) < 0
