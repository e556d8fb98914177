"""Detection data in COCO format, checked in full before any training starts.

No detector framework is imported: both engines read their images and boxes from here.
"""

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
        iscrowd: ``(n,)`` bool, true where a box is no object to be found: a crowd, or something
            that the dataset wants to be ignored.
        ignore_regions: ``(m, 4)`` float32, XYXY in pixels: parts where nothing is annotated.
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
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        problem = getattr(error, "strerror", None) or error
        raise DatasetError(f"{where}: {problem}; restore the file") from None
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
