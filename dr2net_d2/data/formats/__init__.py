"""Formats in which detection datasets are distributed, by name."""

from __future__ import annotations

from pathlib import Path

from dr2net_d2.data.formats.aitod import AiTod
from dr2net_d2.data.formats.base import (
    BadEntries,
    DatasetFormat,
    LabelledDataset,
    LabelledImage,
    Layout,
)
from dr2net_d2.data.formats.coco import Coco
from dr2net_d2.data.formats.dota import Dota
from dr2net_d2.data.formats.tinyperson import TinyPerson
from dr2net_d2.data.formats.visdrone import VisDrone
from dr2net_d2.data.formats.voc import PascalVoc
from dr2net_d2.data.formats.yolo import Yolo
from dr2net_d2.errors import DatasetError

__all__ = [
    "FORMATS",
    "BadEntries",
    "DatasetFormat",
    "LabelledDataset",
    "LabelledImage",
    "Layout",
    "find_layout",
]

FORMATS: dict[str, DatasetFormat] = {
    data_format.name: data_format
    for data_format in (VisDrone(), AiTod(), TinyPerson(), Dota(), Yolo(), PascalVoc(), Coco())
}


def find_layout(
    path: Path, format_name: str | None = None, split: str | None = None
) -> tuple[DatasetFormat, Layout]:
    """Find out the format of a dataset, and where its files are.

    Args:
        path: a dataset's folder, or its JSON or YAML file.
        format_name: a key of ``FORMATS``; None tries all of them.
        split: such as "train"; may be None if the dataset has only one.

    Raises:
        DatasetError: the path does not exist, or leads to no format or split, or to several.
    """
    if not path.exists():
        raise DatasetError(f"{path}: no such file or folder; give a dataset's folder or its JSON")
    names = [*FORMATS] if format_name is None else [format_name]
    layouts = {name: FORMATS[name].find(path) for name in names}
    fitting = [name for name in names if layouts[name]]
    if not fitting:
        raise DatasetError(
            f"{path}: not laid out as {' or '.join(names)}; docs/datasets.md shows the layouts"
        )
    # A converter may well have put its JSON into the folder of another format.
    if len(fitting) > 1 and "coco" in fitting:
        fitting.remove("coco")
    if len(fitting) > 1:
        raise DatasetError(f"{path}: may be {' or '.join(fitting)}; choose one with --format")
    (name,) = fitting
    splits = layouts[name]
    if split is None and len(splits) > 1:
        raise DatasetError(f"{path}: has the splits {', '.join(splits)}; choose one with --part")
    if split is None:
        (split,) = splits
    if split not in splits:
        has = ", ".join(map(repr, splits))
        raise DatasetError(f"{path}: no split {split!r}, only {has}; choose one with --part")
    return FORMATS[name], splits[split]
