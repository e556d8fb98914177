"""What the writers of all formats have in common."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from dr2net_d2.data.formats.base import Labelled, Source
from dr2net_d2.errors import DatasetError


def category_places(source: Source, names: Sequence[str], format_name: str) -> dict[int, int]:
    """The place in ``names`` of every category id.

    Raises:
        DatasetError: a category that the format does not have.
    """
    own = source.category_names()
    if unknown := sorted({*own.values()} - {*names}):
        raise DatasetError(
            f"{format_name} has no category {', '.join(map(repr, unknown))}, only"
            f" {', '.join(names)}; write another format"
        )
    return {category_id: names.index(name) for category_id, name in own.items()}


def copy_image(image: Labelled, folder: Path, flat: bool = True) -> Path:
    """Copy an image's file.

    Args:
        image: what to copy.
        folder: where to; it is made.
        flat: directly into the folder; otherwise to the image's name below it.

    Returns:
        The copy.

    Raises:
        DatasetError: another image has that name.
    """
    inside = Path(image.name)
    if flat or inside.is_absolute() or ".." in inside.parts:
        inside = Path(inside.name)
    target = folder / inside
    if target.exists():
        raise DatasetError(
            f"{image.file}: another image would be written to {inside}, too; rename one"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(image.file, target)
    return target


def left_out(**counts: int) -> list[str]:
    """Words for what a format cannot hold, of "<noun>" = how many; nothing for 0."""
    return [f"{count} {noun.replace('_', ' ')}" for noun, count in counts.items() if count]
