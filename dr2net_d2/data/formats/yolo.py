"""YOLO: data.yaml, and beside each image's folder images/ one labels/ of .txt files.

A line is ``class cx cy w h``, or ``class x1 y1 x2 y2 x3 y3 ...`` for a polygon (a turned box has
four points), in fractions of the image's sides. An image without a file has no objects. Without a
data.yaml, classes.txt names the classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats.base import (
    BadEntries,
    Format,
    Labelled,
    Layout,
    Source,
    listed_images,
    measured,
    named,
    number,
    one_of,
    parse_lines,
    read_names,
    usable,
)
from dr2net_d2.data.formats.samples import sample_source
from dr2net_d2.data.formats.writing import copy_image, left_out
from dr2net_d2.errors import DatasetError

_PARTS = ("train", "val", "test")
_TOLERANCE = 0.01
"""By how much a fraction may pass 1, for files whose writers rounded."""
_DIGITS = 12
"""Decimals that are written: what was read comes back, without the noise of its way over pixels."""


def find(path: Path) -> dict[str, Layout]:
    """A part is one that data.yaml names; of a folder with images/ and labels/, all of it."""
    if path.suffix in (".yaml", ".yml"):
        files = [path]
    else:
        files = [
            f for f in (*path.glob("*.yaml"), *path.glob("*.yml")) if b"names" in f.read_bytes()
        ]
    if files:
        # Every yaml may be the one; that its name is data.yaml is only a custom.
        file = sorted(files, key=lambda f: (f.name != "data.yaml", f.name))[0]
        content = _read_yaml(file)
        return {part: Layout(file, file.parent, part=part) for part in _PARTS if content.get(part)}
    if (path / "images").is_dir() and (path / "labels").is_dir():
        return {"": Layout(path, path)}
    return {}


def read(layout: Layout, bad: BadEntries) -> Source:
    if layout.annotations.is_dir():
        names = _class_list(layout.annotations)
        files = _images_in(layout.annotations / "images")
    else:
        content = _read_yaml(layout.annotations)
        names = _names(content, layout.annotations)
        files = _part_images(content, layout, bad)
    pairs = [(file, _label_file(file)) for file in files]
    _check_labels(pairs, bad)
    return Source(named(names), len(pairs), _images(pairs, layout.images, names, bad))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: {error}; restore the file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.line + 1}:" if mark else ""
        what = getattr(error, "problem", None) or "not readable"
        raise DatasetError(f"{file}:{place} no YAML: {what}; correct it") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{file}: no keys; it must have train, val and names")
    return content


def _names(content: dict[str, Any], file: Path) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict) and {*names} == {*range(len(names))}:
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DatasetError(
            f"{file}:{_line_of(file, 'names')} names is {names!r}; it must be a list of classes, or"
            " 0, 1, 2, ... and a class each"
        )
    if content.get("nc", len(names)) != len(names):
        raise DatasetError(
            f"{file}:{_line_of(file, 'nc')} nc is {content['nc']} but there are {len(names)} names;"
            " correct it"
        )
    if "kpt_shape" in content:
        raise DatasetError(
            f"{file}:{_line_of(file, 'kpt_shape')} kpt_shape is set, so that the labels are poses;"
            " only boxes and polygons can be read"
        )
    return [str(name) for name in names]


def _line_of(file: Path, key: str) -> str:
    for line, text in enumerate(file.read_text().splitlines(), start=1):
        if text.startswith(f"{key}:"):
            return f"{line}:"
    return ""


def _class_list(folder: Path) -> list[str]:
    for file in (folder / "classes.txt", folder / "labels" / "classes.txt"):
        if file.is_file():
            return read_names(file)
    raise DatasetError(
        f"{folder}: neither a data.yaml nor a classes.txt; write the names of the classes to"
        " classes.txt, one a line"
    )


def _part_images(content: dict[str, Any], layout: Layout, bad: BadEntries) -> list[Path]:
    """The images of a part of data.yaml: of folders, or listed in text files."""
    here = layout.annotations.parent
    root = here / str(content.get("path") or "")
    # "path" is often that of the machine where the file was written.
    root = root if root.is_dir() else here
    entries = content[layout.part]
    files: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        place = root / str(entry)
        if not place.exists() and str(entry).startswith("../"):
            place = root / str(entry)[3:]
        if place.is_file():
            files += _listed(place, bad)
        elif place.is_dir():
            files += _images_in(place)
        else:
            raise DatasetError(
                f"{layout.annotations}:{_line_of(layout.annotations, layout.part)} {layout.part} is"
                f" {entry!r}, but there is no {place}; correct it or add the folder"
            )
    return list(dict.fromkeys(files))


def _listed(listing: Path, bad: BadEntries) -> list[Path]:
    files = []
    for line, text in parse_lines(listing, bad, str):
        file = listing.parent / text
        if file.is_file():
            files.append(file)
        else:
            bad.add(listing, line, f"no image {file}; add it or delete the line")
    return files


def _images_in(folder: Path) -> list[Path]:
    inner = [path for path in folder.rglob("*") if path.is_dir()]
    return [file for place in sorted([folder, *inner]) for file in listed_images(place)]


def _label_file(image: Path) -> Path:
    return _swapped(image, "images", "labels").with_suffix(".txt")


def _swapped(path: Path, name: str, other: str) -> Path:
    """The path with its last folder of a name replaced."""
    parts = [*path.parts]
    if name in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index(name)] = other
    return Path(*parts)


def _check_labels(pairs: list[tuple[Path, Path]], bad: BadEntries) -> None:
    """Find labels without an image; those of other parts may lie in the same folder."""
    for folder in sorted({labels.parent for _, labels in pairs}):
        if not folder.is_dir() or "labels" not in folder.parts:
            continue
        place = _swapped(folder / "any", "labels", "images").parent
        stems = {file.stem for file in listed_images(place)} if place.is_dir() else set()
        for file in sorted(folder.glob("*.txt")):
            if file.stem not in stems and file.name != "classes.txt":
                bad.add(file, None, f"no image {place / file.stem}.*; add it or delete this file")


def _images(
    pairs: list[tuple[Path, Path]], root: Path, names: list[str], bad: BadEntries
) -> Iterator[Labelled]:
    for file, labels in pairs:
        size = measured(file, bad)
        if size is None:
            continue
        rows: list[tuple[int, Row]] = []
        if labels.is_file():
            rows = parse_lines(labels, bad, partial(_parse, classes=len(names), size=size))
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        yield Labelled(file, name, *size, usable(rows, size, labels, bad))


def _parse(text: str, classes: int, size: tuple[int, int]) -> Row:
    words = text.split()
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise ValueError(
            f"{len(words)} values; a line is 'class cx cy w h', or class and three or more points"
        )
    row: Row = {"category_id": one_of(words[0], "class", range(classes)) + 1}
    values = [float(number(word, "a coordinate")) for word in words[1:]]
    if wrong := [v for v in values if not 0 <= v <= 1 + _TOLERANCE]:
        raise ValueError(f"coordinate {wrong[0]:g}; they must be fractions of the image, 0 to 1")
    width, height = size
    if len(words) == 5:
        cx, cy, w, h = values
        box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        return row | {"bbox": box}
    points = [value * side for value, side in zip(values, size * (len(values) // 2), strict=True)]
    xs, ys = points[::2], points[1::2]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return row | {"bbox": box, "segmentation": [points]}


def write(source: Source, folder: Path) -> list[str]:
    names = source.category_names()
    places = {category_id: place for place, category_id in enumerate(names)}
    regions = ignored = 0
    for image in source.images:
        regions += len(image.ignore_regions)
        kept = [row for row in image.annotations if not row.get("iscrowd")]
        ignored += len(image.annotations) - len(kept)
        if not image.name.startswith("images/"):
            image.name = f"images/train/{image.name}"
        copied = copy_image(image, folder, flat=False)
        labels = _label_file(copied)
        if kept:
            labels.parent.mkdir(parents=True, exist_ok=True)
            lines = [_line(row, places[row["category_id"]], image) for row in kept]
            labels.write_text("".join(lines))
    content: Row = {"path": ".", "train": "images", "val": "images"}
    content |= {"nc": len(names), "names": dict(enumerate(names.values()))}
    (folder / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return left_out(ignore_regions=regions, objects_to_be_ignored=ignored)


def _line(row: Row, place: int, image: Labelled) -> str:
    size = image.width, image.height
    shape = row.get("segmentation")
    if isinstance(shape, list) and len(shape) == 1:
        values = shape[0]
        fractions = [v / side for v, side in zip(values, size * (len(values) // 2), strict=True)]
    else:
        x, y, w, h = row["bbox"]
        fractions = [(x + w / 2) / size[0], (y + h / 2) / size[1], w / size[0], h / size[1]]
    words = [str(place), *(repr(round(value, _DIGITS)) for value in fractions)]
    return " ".join(words) + "\n"


def samples(folder: Path) -> None:
    """Names as a dict, a folder in a folder, an image without labels, polygons, a turned box."""
    with tempfile.TemporaryDirectory() as drawn:
        source = sample_source(Path(drawn), ["person", "traffic light"], ".png")
        for image in source.images:
            image.name = f"images/train/{'' if image.height == 64 else 'day/'}{image.name}"
        write(source, folder)
    (folder / "labels/train/day/0000002.txt").write_text(
        "0 0.479297 0.554861 0.205469 0.093056\n"
        "1 0.5 0.5 1.0 1.0\n"  # the whole image
        "0 0.01 0.99 0.04 0.05\n"  # over the edge
        "1 0.1 0.1 0.3 0.1 0.35 0.25 0.2 0.4 0.05 0.3\n"  # a polygon
        "0 0.6 0.6 0.7 0.65 0.65 0.75 0.55 0.7\n"  # a turned box
        "1 0.25 0.25 0 0.1\n\n"  # no width, a blank line
    )
    (folder / "data.yaml").write_text(
        "path: ../datasets/sample  # of another machine\n"
        "train: images/train\n"
        "val: images/train/day\n"
        "test:\n"
        "names:\n  0: person\n  1: traffic light\n"
    )


FORMAT = Format("yolo", find, read, write, samples)
