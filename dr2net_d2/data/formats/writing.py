"""Helpers for the writers of dataset formats."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from dr2net_d2.data.formats.base import LabelledDataset, LabelledImage
from dr2net_d2.errors import DatasetError


def category_indices(
    dataset: LabelledDataset, names: Sequence[str], format_name: str
) -> dict[int, int]:
    """Category id -> index in the format's list of names.

    Raises:
        DatasetError: the format does not have one of the categories.
    """
    own = dataset.category_names()
    if unknown := sorted({*own.values()} - {*names}):
        raise DatasetError(
            f"{format_name} has no category {', '.join(map(repr, unknown))}, only"
            f" {', '.join(names)}; write another format"
        )
    return {category_id: names.index(name) for category_id, name in own.items()}


def copy_image(image: LabelledImage, folder: Path, keep_folders: bool = False) -> Path:
    """Copy the file of an image.

    Args:
        image: the image.
        folder: where to put it; it is made if it does not exist.
        keep_folders: keep the folders in the image's name.

    Returns:
        Path of the copy.

    Raises:
        DatasetError: another image already has this name.
    """
    inside = Path(image.name)
    if not keep_folders or inside.is_absolute() or ".." in inside.parts:
        inside = Path(inside.name)
    target = folder / inside
    if target.exists():
        raise DatasetError(
            f"{image.file}: another image would also be written to {inside}; rename one"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(image.file, target)
    return target


def corners_of_box(box: Sequence[float]) -> list[float]:
    """The polygon x, y, x, y, ... of a box x, y, width, height, clockwise from the top left."""
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def describe_losses(counts: Mapping[str, int]) -> list[str]:
    """Phrases such as "2 ignore regions" for what a format could not hold, by noun."""
    return [f"{count} {noun}" for noun, count in counts.items() if count]
