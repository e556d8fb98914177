"""DOTA as horizontal boxes: lines ``x1 y1 x2 y2 x3 y3 x4 y4 category difficult``.

A box is the smallest upright one around the four corners, which are kept as its "segmentation".
Difficult objects are to be ignored, as in DOTA's own evaluation.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats.base import (
    BadEntries,
    Format,
    Labelled,
    Layout,
    Source,
    attributes_of,
    measured,
    named,
    number,
    one_of,
    paired,
    parse_lines,
    usable,
)
from dr2net_d2.data.formats.samples import sample_source
from dr2net_d2.data.formats.writing import category_places, copy_image, left_out

CATEGORIES = (
    *("plane", "baseball-diamond", "bridge", "ground-track-field", "small-vehicle"),
    *("large-vehicle", "ship", "tennis-court", "basketball-court", "storage-tank"),
    *("soccer-ball-field", "roundabout", "harbor", "swimming-pool", "helicopter"),
    *("container-crane", "airport", "helipad"),
)
_VERSIONS = {"1.0": 15, "1.5": 16, "2.0": 18}
"""How many of the categories each version has."""

_HEADER = re.compile(r"(imagesource|gsd|acquisition dates)\s*:\s*(.*)", re.IGNORECASE)


def find(path: Path) -> dict[str, Layout]:
    """A part is a folder with images/ and labelTxt/, or labelTxt-v1.5/DOTA-v1.5_train_hbb/."""
    found: dict[str, Layout] = {}
    for folder in (path, path / "train", path / "val", path / "trainval"):
        labels = {}
        # "_hbb" and "reclabelTxt", the horizontal boxes of the distribution, sort last and win.
        for candidate in sorted(folder.glob("labelTxt*/**/")) + sorted(folder.glob("*Task2*/**/")):
            if next(candidate.glob("*.txt"), None):
                labels[_version(candidate.relative_to(folder))] = candidate
        for version, place in labels.items():
            part = "" if folder == path else folder.name
            if len(labels) > 1:
                part = f"{part}_v{version}".strip("_")
            found[part] = Layout(place, folder / "images", part=part)
    return {part: layout for part, layout in found.items() if layout.images.is_dir()}


def _version(path: Path) -> str:
    versions = [v for v in re.findall(r"v(\d\.\d)", str(path)) if v in _VERSIONS]
    return versions[-1] if versions else "1.0"


def read(layout: Layout, bad: BadEntries) -> Source:
    version = _version(Path(*layout.annotations.parts[-2:]))
    categories = CATEGORIES[: _VERSIONS[version]]
    pairs = paired(layout, bad)
    return Source(
        named(categories),
        len(pairs),
        _images(pairs, categories, version, bad),
        info={"attributes": {"version": version}},
    )


def _images(
    pairs: list[tuple[Path, Path]], categories: Sequence[str], version: str, bad: BadEntries
) -> Iterator[Labelled]:
    for file, labels in pairs:
        size = measured(file, bad)
        lines = parse_lines(labels, bad, partial(_parse, categories=categories, version=version))
        if size is None:
            continue
        rows = [(line, row) for line, row in lines if "bbox" in row]
        image = Labelled(file, file.name, *size, usable(rows, size, labels, bad))
        for _, row in lines:
            if "bbox" not in row:
                image.attributes.update(row)
        yield image


def _parse(text: str, categories: Sequence[str], version: str) -> Row:
    """An object, or, of a line of the header, attributes of the image."""
    if header := _HEADER.fullmatch(text):
        return {header[1].lower(): header[2]}
    values = text.split()
    if len(values) not in (9, 10):
        raise ValueError(
            f"{len(values)} values; a line is x1 y1 x2 y2 x3 y3 x4 y4 category difficult"
        )
    corners = [number(value, "a corner") for value in values[:8]]
    if values[8] not in categories:
        hint = "; its folder must be named labelTxt-v<version>" if values[8] in CATEGORIES else ""
        raise ValueError(f"category {values[8]!r} is not one of DOTA {version}{hint}")
    xs, ys = corners[::2], corners[1::2]
    row: Row = {
        "category_id": categories.index(values[8]) + 1,
        "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
        "segmentation": [corners],
        "iscrowd": 0,
    }
    if len(values) == 10:
        row["attributes"] = {"difficult": one_of(values[9], "difficult", (0, 1, 2))}
        row["iscrowd"] = int(row["attributes"]["difficult"] > 0)
    return row


def write(source: Source, folder: Path) -> list[str]:
    version = source.info.get("attributes", {}).get("version", "2.0")
    categories = CATEGORIES[: _VERSIONS.get(version, len(CATEGORIES))]
    places = category_places(source, categories, f"DOTA {version}")
    labels = folder / ("labelTxt" if version == "1.0" else f"labelTxt-v{version}")
    labels.mkdir()
    regions = 0
    for image in source.images:
        regions += len(image.ignore_regions)
        lines = [
            f"{key}:{value}"
            for key, value in image.attributes.items()
            if _HEADER.fullmatch(f"{key}:{value}")
        ]
        lines += [_line(row, categories[places[row["category_id"]]]) for row in image.annotations]
        copied = copy_image(image, folder / "images")
        (labels / f"{copied.stem}.txt").write_text("".join(f"{line}\n" for line in lines))
    return left_out(ignore_regions=regions)


def _line(row: Row, category: str) -> str:
    x, y, w, h = row["bbox"]
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    shape = row.get("segmentation")
    if isinstance(shape, list) and len(shape) == 1 and len(shape[0]) == 8:
        corners = shape[0]
    words = [*map(str, corners), category]
    known = attributes_of(row)
    if "difficult" in known or "segmentation" not in row or row.get("iscrowd"):
        words.append(str(known.get("difficult", row.get("iscrowd", 0))))
    return " ".join(words)


def samples(folder: Path) -> None:
    """A training part of version 1.5, with headers, turned and difficult objects."""
    folder = folder / "train"
    with tempfile.TemporaryDirectory() as drawn:
        source = sample_source(Path(drawn), [*CATEGORIES[:16]], ".png", objects=8)
        for image in source.images:
            image.attributes = {"imagesource": "GoogleEarth", "gsd": "0.146343590398"}
        source.info = {"attributes": {"version": "1.5"}}
        folder.mkdir()
        write(source, folder)
    (folder / "labelTxt-v1.5" / "0000002.txt").write_text(
        "imagesource:GoogleEarth\n"
        "gsd:null\n"
        "10 20 30 10 40 30 20 40 plane 0\n"  # turned
        "50.5 60.0 70.5 60.0 70.5 72.25 50.5 72.25 ship 1\n"  # difficult
        "80 90 104 90 104 99 80 99 small-vehicle\n"  # as the first version had it
        "5 5 5 9 5 5 5 9 helicopter 0\n"  # no width
        "40 100 60 100 60 120 40 120 container-crane 2\n"
    )


FORMAT = Format("dota", find, read, write, samples)
