"""DOTA as upright boxes: ``x1 y1 x2 y2 x3 y3 x4 y4 category difficult``, one line per object.

A box is the smallest upright one around the four corners, which are kept as its "segmentation".
Difficult objects are to be ignored, as in DOTA's own evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats.base import (
    BadEntries,
    DatasetFormat,
    LabelledDataset,
    LabelledImage,
    Layout,
)
from dr2net_d2.data.formats.reading import (
    attributes_of,
    category_rows,
    enclosing_box,
    measure_image,
    pair_images_with_labels,
    parse_choice,
    parse_lines,
    parse_number,
    usable_rows,
)
from dr2net_d2.data.formats.samples import drawn_dataset
from dr2net_d2.data.formats.writing import (
    category_indices,
    copy_image,
    corners_of_box,
    describe_losses,
)

CATEGORIES = (
    *("plane", "baseball-diamond", "bridge", "ground-track-field", "small-vehicle"),
    *("large-vehicle", "ship", "tennis-court", "basketball-court", "storage-tank"),
    *("soccer-ball-field", "roundabout", "harbor", "swimming-pool", "helicopter"),
    *("container-crane", "airport", "helipad"),
)
_VERSIONS = {"1.0": 15, "1.5": 16, "2.0": 18}
"""Version -> number of its categories, which are the first ones of ``CATEGORIES``."""

_HEADER = re.compile(r"(imagesource|gsd|acquisition dates)\s*:\s*(.*)", re.IGNORECASE)


class Dota(DatasetFormat):
    name = "dota"

    def find(self, path: Path) -> dict[str, Layout]:
        """A split has images/ and labelTxt/, or labelTxt-v1.5/DOTA-v1.5_train_hbb/ for instance."""
        layouts: dict[str, Layout] = {}
        for folder in (path, path / "train", path / "val", path / "trainval"):
            labels = {}
            # The distribution's upright boxes, "_hbb" and "reclabelTxt", sort last and win.
            for candidate in [
                *sorted(folder.glob("labelTxt*/**/")),
                *sorted(folder.glob("*Task2*/**/")),
            ]:
                if next(candidate.glob("*.txt"), None):
                    labels[_version_of(candidate.relative_to(folder))] = candidate
            for version, label_folder in labels.items():
                split = "" if folder == path else folder.name
                if len(labels) > 1:
                    split = f"{split}_v{version}".strip("_")
                if (folder / "images").is_dir():
                    layouts[split] = Layout(label_folder, folder / "images", split=split)
        return layouts

    def read(self, layout: Layout, bad: BadEntries) -> LabelledDataset:
        version = _version_of(Path(*layout.annotations.parts[-2:]))
        categories = CATEGORIES[: _VERSIONS[version]]
        pairs = pair_images_with_labels(layout, bad)
        return LabelledDataset(
            category_rows(categories),
            len(pairs),
            _read_images(pairs, categories, version, bad),
            info={"attributes": {"version": version}},
        )

    def write(self, dataset: LabelledDataset, folder: Path) -> list[str]:
        version = dataset.info.get("attributes", {}).get("version", "2.0")
        categories = CATEGORIES[: _VERSIONS.get(version, len(CATEGORIES))]
        indices = category_indices(dataset, categories, f"DOTA {version}")
        labels = folder / ("labelTxt" if version == "1.0" else f"labelTxt-v{version}")
        labels.mkdir()
        regions = 0
        for image in dataset.images:
            regions += len(image.ignore_regions)
            header = [f"{key}:{value}" for key, value in image.attributes.items()]
            lines = [line for line in header if _HEADER.fullmatch(line)]
            for row in image.annotations:
                lines.append(_format_line(row, categories[indices[row["category_id"]]]))
            copied = copy_image(image, folder / "images")
            (labels / f"{copied.stem}.txt").write_text("".join(f"{line}\n" for line in lines))
        return describe_losses({"ignore regions": regions})

    def write_sample(self, folder: Path) -> None:
        """A training split of version 1.5, with headers, turned and difficult objects."""
        folder = folder / "train"
        folder.mkdir()
        with drawn_dataset(CATEGORIES[:16], ".png", objects=8) as dataset:
            for image in dataset.images:
                image.attributes = {"imagesource": "GoogleEarth", "gsd": "0.146343590398"}
            dataset.info = {"attributes": {"version": "1.5"}}
            self.write(dataset, folder)
        (folder / "labelTxt-v1.5" / "0000002.txt").write_text(
            "imagesource:GoogleEarth\n"
            "gsd:null\n"
            "10 20 30 10 40 30 20 40 plane 0\n"  # turned
            "50.5 60.0 70.5 60.0 70.5 72.25 50.5 72.25 ship 1\n"  # difficult
            "80 90 104 90 104 99 80 99 small-vehicle\n"  # without "difficult", as in version 1.0
            "5 5 5 9 5 5 5 9 helicopter 0\n"  # no width
            "40 100 60 100 60 120 40 120 container-crane 2\n"
        )


def _version_of(path: Path) -> str:
    """The version that is last in a path; 1.0 if there is none."""
    versions = [v for v in re.findall(r"v(\d\.\d)", str(path)) if v in _VERSIONS]
    return versions[-1] if versions else "1.0"


def _read_images(
    pairs: list[tuple[Path, Path]], categories: Sequence[str], version: str, bad: BadEntries
) -> Iterator[LabelledImage]:
    parse = partial(_parse_line, categories=categories, version=version)
    for file, labels in pairs:
        size = measure_image(file, bad)
        lines = parse_lines(labels, bad, parse)
        if size is None:
            continue
        rows = [(line, row) for line, row in lines if "bbox" in row]
        image = LabelledImage(file, file.name, *size, usable_rows(rows, size, labels, bad))
        for _, row in lines:
            if "bbox" not in row:
                image.attributes.update(row)
        yield image


def _parse_line(text: str, categories: Sequence[str], version: str) -> Row:
    """An object, or for a line of the header an attribute of the image."""
    if header := _HEADER.fullmatch(text):
        return {header[1].lower(): header[2]}
    values = text.split()
    if len(values) not in (9, 10):
        raise ValueError(
            f"{len(values)} values; a line is x1 y1 x2 y2 x3 y3 x4 y4 category difficult"
        )
    corners = [parse_number(value, "a corner") for value in values[:8]]
    if values[8] not in categories:
        hint = "; its folder must be named labelTxt-v<version>" if values[8] in CATEGORIES else ""
        raise ValueError(f"category {values[8]!r} is not one of DOTA {version}{hint}")
    row: Row = {
        "category_id": categories.index(values[8]) + 1,
        "bbox": enclosing_box(corners),
        "segmentation": [corners],
        "iscrowd": 0,
    }
    if len(values) == 10:
        difficult = parse_choice(values[9], "difficult", (0, 1, 2))
        row |= {"attributes": {"difficult": difficult}, "iscrowd": int(difficult > 0)}
    return row


def _format_line(row: Row, category: str) -> str:
    corners = corners_of_box(row["bbox"])
    polygons = row.get("segmentation")
    if isinstance(polygons, list) and len(polygons) == 1 and len(polygons[0]) == 8:
        corners = polygons[0]
    words = [*map(str, corners), category]
    known = attributes_of(row)
    if "difficult" in known or "segmentation" not in row or row.get("iscrowd"):
        words.append(str(known.get("difficult", row.get("iscrowd", 0))))
    return " ".join(words)
