"""Images with boxes, for the sample datasets of all formats."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats.base import LabelledDataset, LabelledImage
from dr2net_d2.data.formats.reading import category_rows

SIZES = ((160, 120), (97, 133), (64, 64))
"""Width and height of the sample images, in pixels."""


@contextmanager
def drawn_dataset(
    categories: Sequence[str], suffix: str = ".jpg", objects: int = 4
) -> Iterator[LabelledDataset]:
    """Draw three images "0000001" to "0000003" with boxes; they are deleted on exit.

    Args:
        categories: names; with few of them, each occurs.
        suffix: of the image files.
        objects: number of objects in each image but the last, which has none.
    """
    rng = np.random.default_rng(len(categories))
    images = []
    with tempfile.TemporaryDirectory() as folder:
        for index, (width, height) in enumerate(SIZES):
            pixels = np.full((height, width, 3), 90, np.uint8)
            annotations: list[Row] = []
            for number in range(objects if index < len(SIZES) - 1 else 0):
                w, h = rng.integers(3, 20, 2).tolist()
                x, y = rng.integers(0, (width - w, height - h)).tolist()
                category = (index * objects + number) % len(categories) + 1
                annotations.append({"category_id": category, "bbox": [x, y, w, h]})
                colour = rng.integers(120, 256, 3).tolist()
                cv2.rectangle(pixels, (x, y), (x + w - 1, y + h - 1), colour, cv2.FILLED)
            file = Path(folder) / f"{index + 1:07d}{suffix}"
            file.write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())
            images.append(LabelledImage(file, file.name, width, height, annotations))
        yield LabelledDataset(category_rows(categories), len(images), images)
