"""Pictures and boxes for the sample datasets of all formats."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats.base import Labelled, Source, named

SIZES = ((160, 120), (97, 133), (64, 64))
"""Width and height of the sample images in px."""


def sample_source(
    folder: Path, categories: list[str], suffix: str = ".jpg", objects: int = 4
) -> Source:
    """Images written to ``folder``, with boxes drawn into them; the last one has no object.

    Args:
        folder: an empty folder, made if need be.
        categories: their names; all occur if there are few.
        suffix: of the images' names: "0000001" and so on.
        objects: how many each image but the last has.
    """
    rng = np.random.default_rng(len(categories))
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for index, (width, height) in enumerate(SIZES):
        pixels = np.full((height, width, 3), 90, np.uint8)
        annotations: list[Row] = []
        for place in range(objects if index < len(SIZES) - 1 else 0):
            w, h = rng.integers(3, 20, 2).tolist()
            x, y = rng.integers(0, (width - w, height - h)).tolist()
            category = (index * objects + place) % len(categories) + 1
            annotations.append({"category_id": category, "bbox": [x, y, w, h]})
            colour = rng.integers(120, 256, 3).tolist()
            cv2.rectangle(pixels, (x, y), (x + w - 1, y + h - 1), colour, cv2.FILLED)
        file = folder / f"{index + 1:07d}{suffix}"
        file.write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())
        images.append(Labelled(file, file.name, width, height, annotations))
    return Source(named(categories), len(images), images)
