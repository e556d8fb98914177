"""Formats in which detection datasets are distributed, by name."""

from __future__ import annotations

from pathlib import Path

from dr2net_d2.data.formats import aitod, coco, dota, tinyperson, visdrone, voc, yolo
from dr2net_d2.data.formats.base import BadEntries, Format, Labelled, Layout, Source
from dr2net_d2.errors import DatasetError

__all__ = ["BadEntries", "FORMATS", "Format", "Labelled", "Layout", "Source", "find_layout"]

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (visdrone, aitod, tinyperson, dota, yolo, voc, coco)
}


def find_layout(
    path: Path, format_name: str | None = None, part: str | None = None
) -> tuple[Format, Layout]:
    """What a path leads to.

    Args:
        path: a dataset's folder, or its JSON or YAML file.
        format_name: one of FORMATS; found out unless given.
        part: train, val, ...; may be left out where there is only one.

    Raises:
        DatasetError: no such path, no or more than one format or part that it may be.
    """
    if not path.exists():
        raise DatasetError(f"{path}: no such file or folder; give a dataset's folder or its JSON")
    names = [*FORMATS] if format_name is None else [format_name]
    found = {name: parts for name in names if (parts := FORMATS[name].find(path))}
    if not found:
        raise DatasetError(
            f"{path}: not laid out as {' or '.join(names)}; docs/datasets.md shows how each is"
        )
    if len(found) > 1:
        found.pop("coco", None)  # a converter may well have put its JSON there
    if len(found) > 1:
        raise DatasetError(f"{path}: may be {' or '.join(found)}; say which by --format")
    ((name, parts),) = found.items()
    if part is None and len(parts) > 1:
        raise DatasetError(f"{path}: has the parts {', '.join(parts)}; choose one by --part")
    if part is not None and part not in parts:
        has = ", ".join(map(repr, parts))
        raise DatasetError(f"{path}: no part {part!r}, only {has}; choose one by --part")
    return FORMATS[name], parts[next(iter(parts)) if part is None else part]
