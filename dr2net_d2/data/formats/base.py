"""What all formats have in common: where files lie, labelled images, and what is wrong with them.

Annotations and ignore regions are rows in COCO's words. What a format knows beyond them lies in
their "attributes", so that its writer can give it back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dr2net_d2.data.coco_tables import Row, judge_boxes
from dr2net_d2.data.image_size import SUFFIXES, image_size
from dr2net_d2.errors import DatasetError

T = TypeVar("T")

_WHOLE = re.compile(r"[+-]?\d+")

LISTED = 20
"""Bad entries that are named; the others are only counted."""


@dataclass(frozen=True)
class Layout:
    """Where one part of a dataset (train, val, ...) lies.

    Attributes:
        annotations: the folder of annotation files, or the file.
        images: the folder that image names are relative to.
        listing: a file that says which of them belong to the part.
        part: its name within the dataset.
    """

    annotations: Path
    images: Path
    listing: Path | None = None
    part: str = ""


@dataclass
class Labelled:
    """One image and what is annotated in it.

    Attributes:
        file: where it lies.
        name: its path below ``Layout.images``.
        width: px.
        height: px.
        annotations: rows with "category_id", "bbox" and perhaps "iscrowd", "segmentation", "id",
            "attributes", ...
        ignore_regions: rows with "bbox" and perhaps "id", "attributes".
        attributes: what the format says of the image besides.
        row: further COCO keys of the image's row, "id" among them.
    """

    file: Path
    name: str
    width: int
    height: int
    annotations: list[Row] = field(default_factory=list)
    ignore_regions: list[Row] = field(default_factory=list)
    attributes: Row = field(default_factory=dict)
    row: Row = field(default_factory=dict)


@dataclass
class Source:
    """A dataset that is being read.

    Attributes:
        categories: COCO's rows of them, by ascending id.
        count: how many images there are, good or bad.
        images: the good ones, read one by one.
        info: for COCO's "info".
        tables: COCO's further tables, such as "licenses".
    """

    categories: list[Row]
    count: int
    images: Iterable[Labelled]
    info: Row = field(default_factory=dict)
    tables: Row = field(default_factory=dict)

    def category_names(self) -> dict[int, str]:
        return {row["id"]: row["name"] for row in self.categories}


@dataclass
class BadEntries:
    """Entries that cannot be used: the first ones by file, line and reason, and their number."""

    listed: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, file: Path, line: int | None, reason: object) -> None:
        """Note an entry; ``line`` is None where the whole file is meant or the reason has an id."""
        self.count += 1
        if len(self.listed) < LISTED:
            self.listed.append(f"{file}:{'' if line is None else f'{line}:'} {reason}")


@dataclass(frozen=True)
class Format:
    """A way in which datasets are distributed.

    Attributes:
        name: as in --format.
        find: the parts (name -> layout) of a dataset in a folder, or of a file; none if it is not
            of this format.
        read: opens a part; bad entries are noted and left out.
        write: writes a dataset into an empty folder in this format, with its images, and returns
            what it had to leave out, in words.
        samples: writes a small dataset of this format, edge cases included, into an empty folder.
    """

    name: str
    find: Callable[[Path], dict[str, Layout]]
    read: Callable[[Layout, BadEntries], Source]
    write: Callable[[Source, Path], list[str]]
    samples: Callable[[Path], object]


def named(names: Iterable[str]) -> list[Row]:
    """COCO's rows of categories: ids from 1."""
    return [{"id": index, "name": name} for index, name in enumerate(names, start=1)]


def read_names(file: Path) -> list[str]:
    """The categories of a classes.txt, one a line.

    Raises:
        DatasetError: it has none, one twice, or is no text.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: {error}; restore the file") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names or len({*names}) < len(names):
        raise DatasetError(f"{file}: no name, or one of them twice; write one a line")
    return names


def listed_images(folder: Path) -> list[Path]:
    """The images directly in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def measured(file: Path, bad: BadEntries) -> tuple[int, int] | None:
    """Width and height of an image; None, and a bad entry, if it cannot be read."""
    try:
        return image_size(file)
    except DatasetError as error:
        bad.add(file, None, str(error).removeprefix(f"{file}: "))
        return None


def paired(layout: Layout, bad: BadEntries) -> list[tuple[Path, Path]]:
    """Every image with the .txt of its annotations; either without the other is a bad entry."""
    labels = {path.stem: path for path in sorted(layout.annotations.glob("*.txt"))}
    images: dict[str, Path] = {}
    for file in listed_images(layout.images):
        if file.stem in images:
            bad.add(file, None, f"{images[file.stem].name} has the same stem; rename one")
        elif file.stem not in labels:
            missing = layout.annotations / f"{file.stem}.txt"
            bad.add(missing, None, f"no such file for image {file}; add it, empty if no object is")
        else:
            images[file.stem] = file
    for stem, path in labels.items():
        if not (stem in images or any((layout.images / f"{stem}{s}").exists() for s in SUFFIXES)):
            bad.add(path, None, f"no image {layout.images / stem}.*; add it or delete this file")
    return [(file, labels[stem]) for stem, file in sorted(images.items())]


def parse_lines(file: Path, bad: BadEntries, parse: Callable[[str], T]) -> list[tuple[int, T]]:
    """(line number, what ``parse`` makes of it) for all lines that are not blank.

    Args:
        file: UTF-8 text.
        bad: gets the lines for which ``parse`` raises ValueError, with its message as the reason.
        parse: gets a line without surrounding spaces.
    """
    parsed = []
    for number, text in enumerate(read_text(file, bad).splitlines(), start=1):
        if text.strip():
            try:
                parsed.append((number, parse(text.strip())))
            except ValueError as error:
                bad.add(file, number, error)
    return parsed


def read_text(file: Path, bad: BadEntries) -> str:
    """A file's text; "" and a bad entry if it has none."""
    try:
        data = file.read_bytes()
    except OSError as error:
        bad.add(file, None, f"{error.strerror}; restore the file")
        return ""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        bad.add(file, line, f"byte {data[error.start]:#04x} is not UTF-8 text; restore the file")
        return ""


def number(text: str, what: str) -> float:
    """An int where it is written as one, else a float; a ValueError for people if it is neither."""
    if _WHOLE.fullmatch(text) and len(text) < 16:
        return int(text)
    try:
        return float(text.replace("_", "no digit"))
    except ValueError:
        raise ValueError(f"{what} is {text!r}; it must be a number") from None


def one_of(text: str, what: str, allowed: Sequence[int]) -> int:
    """A whole number among ``allowed``; a ValueError for people if it is not."""
    if _WHOLE.fullmatch(text) and int(text) in allowed:
        return int(text)
    words = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 2 else " or ".join(map(str, allowed))
    raise ValueError(f"{what} is {text!r}; it must be {words}")


def usable(
    rows: list[tuple[int, Row]], size: tuple[int, int], file: Path, bad: BadEntries
) -> list[Row]:
    """The rows whose "bbox" can be used in an image of a size; the others become bad entries.

    Args:
        rows: with their line numbers.
        size: width and height in px.
        file: that they are from.
        bad: gets the others.
    """
    boxes = np.array([row["bbox"] for _, row in rows], dtype=np.float64).reshape(-1, 4)
    good = []
    for (line, row), problem in zip(rows, judge_boxes(boxes, np.array(size))[2], strict=True):
        if problem:
            box = [float(f"{value:.6g}") for value in row["bbox"]]
            image = f"the image is {size[0]} x {size[1]} px"
            bad.add(file, line, f"box {box} (x, y, width, height) {problem} ({image}); correct it")
        else:
            good.append(row)
    return good


def attributes_of(row: Row) -> dict[str, Any]:
    """The attributes of a row; none if there are none."""
    return row.get("attributes") or {}


def first_folder(*candidates: Path) -> Path:
    """The first folder that exists; the last one if none does."""
    return next((path for path in candidates if path.is_dir()), candidates[-1])
