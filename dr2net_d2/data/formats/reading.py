"""Helpers for the readers of dataset formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dr2net_d2.data.coco_tables import Row, judge_boxes
from dr2net_d2.data.formats.base import BadEntries, Layout
from dr2net_d2.data.image_size import SUFFIXES, image_size
from dr2net_d2.errors import DatasetError

T = TypeVar("T")

_INTEGER = re.compile(r"[+-]?\d+")


def category_rows(names: Iterable[str]) -> list[Row]:
    """COCO rows of categories, with ids from 1."""
    return [{"id": index, "name": name} for index, name in enumerate(names, start=1)]


def read_class_names(file: Path) -> list[str]:
    """Read a classes.txt, which has one category per line.

    Raises:
        DatasetError: it is empty, has a name twice, or cannot be read as text.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: {error}; restore the file") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names or len({*names}) < len(names):
        raise DatasetError(f"{file}: no name, or the same name twice; write one name per line")
    return names


def images_in(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def measure_image(file: Path, bad: BadEntries) -> tuple[int, int] | None:
    """Width and height of an image in pixels; None, and a bad entry, if it cannot be read."""
    try:
        return image_size(file)
    except DatasetError as error:
        bad.add(file, None, str(error).removeprefix(f"{file}: "))
        return None


def pair_images_with_labels(layout: Layout, bad: BadEntries) -> list[tuple[Path, Path]]:
    """Every image with the .txt of the same stem; either without the other is a bad entry."""
    labels = {path.stem: path for path in sorted(layout.annotations.glob("*.txt"))}
    images: dict[str, Path] = {}
    for file in images_in(layout.images):
        if file.stem in images:
            bad.add(file, None, f"{images[file.stem].name} has the same stem; rename one")
        elif file.stem not in labels:
            missing = layout.annotations / f"{file.stem}.txt"
            bad.add(missing, None, f"no such file for image {file}; add it, empty for no objects")
        else:
            images[file.stem] = file
    for stem, path in labels.items():
        if stem in images or any((layout.images / f"{stem}{s}").exists() for s in SUFFIXES):
            continue
        bad.add(path, None, f"no image {layout.images / stem}.*; add it or delete this file")
    return [(file, labels[stem]) for stem, file in sorted(images.items())]


def parse_lines(file: Path, bad: BadEntries, parse: Callable[[str], T]) -> list[tuple[int, T]]:
    """Parse the lines of a text file that are not blank.

    Args:
        file: UTF-8 text.
        bad: collects the lines for which ``parse`` raises a ValueError; its message is the reason.
        parse: called with a line without surrounding spaces.

    Returns:
        Pairs of line number, from 1, and parsed value.
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
    """The text of a file; "", and a bad entry, if it cannot be read."""
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


def parse_number(text: str, what: str) -> float:
    """An int if the text is written as one, otherwise a float.

    Raises:
        ValueError: the text is not a number; the message calls it ``what``.
    """
    # Longer integers may be too large for NumPy.
    if _INTEGER.fullmatch(text) and len(text) < 16:
        return int(text)
    value: float | None
    try:
        value = float(text)
    except ValueError:
        value = None
    # Python reads "1_0" as 10, but in an annotation file it is damage.
    if value is None or "_" in text:
        raise ValueError(f"{what} is {text!r}; it must be a number")
    return value


def parse_choice(text: str, what: str, allowed: Sequence[int]) -> int:
    """An integer out of ``allowed``, which is in ascending order.

    Raises:
        ValueError: the text is not one of them; the message calls it ``what``.
    """
    if _INTEGER.fullmatch(text) and int(text) in allowed:
        return int(text)
    words = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 2 else " or ".join(map(str, allowed))
    raise ValueError(f"{what} is {text!r}; it must be {words}")


def enclosing_box(points: Sequence[float]) -> list[float]:
    """The smallest upright box, x, y, width, height, around a polygon x, y, x, y, ..."""
    xs, ys = points[::2], points[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def usable_rows(
    rows: list[tuple[int, Row]], size: tuple[int, int], file: Path, bad: BadEntries
) -> list[Row]:
    """The rows whose "bbox" can be used.

    Args:
        rows: pairs of line number and row.
        size: width and height of the image, in pixels.
        file: the file that the rows are from.
        bad: collects the other rows.
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
    """The "attributes" of a row; empty if it has none."""
    return row.get("attributes") or {}


def first_folder(*candidates: Path) -> Path:
    """The first folder that exists; the last candidate if none does."""
    return next((path for path in candidates if path.is_dir()), candidates[-1])
