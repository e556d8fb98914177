"""YOLO: data.yaml, and next to each folder images/ a folder labels/ of .txt files.

A line is ``class cx cy w h``, or ``class x1 y1 x2 y2 x3 y3 ...`` for a polygon (a turned box has
four points), in fractions of the image's width and height. An image without a file has no objects.
If there is no data.yaml, classes.txt names the classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats.base import (
    BadEntries,
    DatasetFormat,
    LabelledDataset,
    LabelledImage,
    Layout,
)
from dr2net_d2.data.formats.reading import (
    category_rows,
    enclosing_box,
    images_in,
    measure_image,
    parse_choice,
    parse_lines,
    parse_number,
    read_class_names,
    usable_rows,
)
from dr2net_d2.data.formats.samples import drawn_dataset
from dr2net_d2.data.formats.writing import copy_image, describe_losses
from dr2net_d2.errors import DatasetError

_SPLITS = ("train", "val", "test")
_TOLERANCE = 0.01
"""How far a fraction may exceed 1, because some writers round."""
_DECIMALS = 12
"""Decimals to write: enough for what was read, without the rounding error of pixels."""


class Yolo(DatasetFormat):
    name = "yolo"

    def find(self, path: Path) -> dict[str, Layout]:
        """The splits that data.yaml names; without one, images/ and labels/ are a single split."""
        if path.suffix in (".yaml", ".yml"):
            files = [path]
        else:
            files = [*path.glob("*.yaml"), *path.glob("*.yml")]
            files = [file for file in files if b"names" in file.read_bytes()]
        if files:
            # The name data.yaml is only a convention.
            file = min(files, key=lambda f: (f.name != "data.yaml", f.name))
            content = _read_yaml(file)
            splits = [split for split in _SPLITS if content.get(split)]
            return {split: Layout(file, file.parent, split=split) for split in splits}
        if (path / "images").is_dir() and (path / "labels").is_dir():
            return {"": Layout(path, path)}
        return {}

    def read(self, layout: Layout, bad: BadEntries) -> LabelledDataset:
        if layout.annotations.is_dir():
            names = _class_list(layout.annotations)
            files = _images_below(layout.annotations / "images")
        else:
            content = _read_yaml(layout.annotations)
            names = _class_names(content, layout.annotations)
            files = _images_of_split(content, layout, bad)
        pairs = [(file, _label_file(file)) for file in files]
        _check_for_lone_labels(pairs, bad)
        images = _read_images(pairs, layout.images, len(names), bad)
        return LabelledDataset(category_rows(names), len(pairs), images)

    def write(self, dataset: LabelledDataset, folder: Path) -> list[str]:
        names = dataset.category_names()
        classes = {category_id: index for index, category_id in enumerate(names)}
        regions = ignored = 0
        for image in dataset.images:
            regions += len(image.ignore_regions)
            kept = [row for row in image.annotations if not row.get("iscrowd")]
            ignored += len(image.annotations) - len(kept)
            if not image.name.startswith("images/"):
                image.name = f"images/train/{image.name}"
            labels = _label_file(copy_image(image, folder, keep_folders=True))
            if kept:
                labels.parent.mkdir(parents=True, exist_ok=True)
                lines = [_format_line(row, classes[row["category_id"]], image) for row in kept]
                labels.write_text("".join(lines))
        content: Row = {"path": ".", "train": "images", "val": "images"}
        content |= {"nc": len(names), "names": dict(enumerate(names.values()))}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (folder / "data.yaml").write_text(text)
        return describe_losses({"ignore regions": regions, "objects to be ignored": ignored})

    def write_sample(self, folder: Path) -> None:
        """Names as a dict, a nested folder, an image without labels, polygons, a turned box."""
        with drawn_dataset(["person", "traffic light"], ".png") as dataset:
            for image in dataset.images:
                subfolder = "" if image.height == 64 else "day/"
                image.name = f"images/train/{subfolder}{image.name}"
            self.write(dataset, folder)
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


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: {error}; restore the file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise DatasetError(f"{file}:{line} no YAML: {problem}; correct it") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{file}: no keys; it must have train, val and names")
    return content


def _class_names(content: dict[str, Any], file: Path) -> list[str]:
    """The class names of a data.yaml, by index.

    Raises:
        DatasetError: they are not names, or data.yaml describes poses.
    """
    names = content.get("names")
    if isinstance(names, dict) and {*names} == {*range(len(names))}:
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DatasetError(
            f"{file}:{_line_of(file, 'names')} names is {names!r}; it must be a list of classes, or"
            " 0, 1, 2, ... with a class each"
        )
    if content.get("nc", len(names)) != len(names):
        raise DatasetError(
            f"{file}:{_line_of(file, 'nc')} nc is {content['nc']} but there are {len(names)} names;"
            " correct it"
        )
    if "kpt_shape" in content:
        raise DatasetError(
            f"{file}:{_line_of(file, 'kpt_shape')} kpt_shape is set, so the labels are poses; only"
            " boxes and polygons can be read"
        )
    return [str(name) for name in names]


def _line_of(file: Path, key: str) -> str:
    """The line number of a key with a colon, as in error messages; "" if it is not found."""
    for line, text in enumerate(file.read_text().splitlines(), start=1):
        if text.startswith(f"{key}:"):
            return f"{line}:"
    return ""


def _class_list(folder: Path) -> list[str]:
    for file in (folder / "classes.txt", folder / "labels" / "classes.txt"):
        if file.is_file():
            return read_class_names(file)
    raise DatasetError(
        f"{folder}: neither a data.yaml nor a classes.txt; write the names of the classes to"
        " classes.txt, one per line"
    )


def _images_of_split(content: dict[str, Any], layout: Layout, bad: BadEntries) -> list[Path]:
    """The images of a split in data.yaml, which names folders or text files with a list."""
    here = layout.annotations.parent
    root = here / str(content.get("path") or "")
    # "path" is often a folder of the machine that wrote the file.
    root = root if root.is_dir() else here
    entries = content[layout.split]
    files: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        source = root / str(entry)
        if not source.exists() and str(entry).startswith("../"):
            source = root / str(entry).removeprefix("../")
        if source.is_file():
            files += _listed_images(source, bad)
        elif source.is_dir():
            files += _images_below(source)
        else:
            raise DatasetError(
                f"{layout.annotations}:{_line_of(layout.annotations, layout.split)} {layout.split}"
                f" is {entry!r}, but there is no {source}; correct it or add the folder"
            )
    return list(dict.fromkeys(files))


def _listed_images(listing: Path, bad: BadEntries) -> list[Path]:
    files = []
    for line, text in parse_lines(listing, bad, str):
        file = listing.parent / text
        if file.is_file():
            files.append(file)
        else:
            bad.add(listing, line, f"no image {file}; add it or delete the line")
    return files


def _images_below(folder: Path) -> list[Path]:
    inner = [path for path in folder.rglob("*") if path.is_dir()]
    return [file for place in sorted([folder, *inner]) for file in images_in(place)]


def _label_file(image: Path) -> Path:
    return _replace_folder(image, "images", "labels").with_suffix(".txt")


def _replace_folder(path: Path, old: str, new: str) -> Path:
    """The path with the last of its folders named ``old`` renamed."""
    *folders, name = path.parts
    for index in reversed(range(len(folders))):
        if folders[index] == old:
            folders[index] = new
            break
    return Path(*folders, name)


def _check_for_lone_labels(pairs: list[tuple[Path, Path]], bad: BadEntries) -> None:
    """Report labels without an image; a folder may also have the labels of other splits."""
    for folder in sorted({labels.parent for _, labels in pairs}):
        if not folder.is_dir() or "labels" not in folder.parts:
            continue
        images = _replace_folder(folder / "any", "labels", "images").parent
        stems = {file.stem for file in images_in(images)} if images.is_dir() else set()
        for file in sorted(folder.glob("*.txt")):
            if file.stem not in stems and file.name != "classes.txt":
                bad.add(file, None, f"no image {images / file.stem}.*; add it or delete this file")


def _read_images(
    pairs: list[tuple[Path, Path]], root: Path, classes: int, bad: BadEntries
) -> Iterator[LabelledImage]:
    for file, labels in pairs:
        size = measure_image(file, bad)
        if size is None:
            continue
        rows: list[tuple[int, Row]] = []
        if labels.is_file():
            rows = parse_lines(labels, bad, partial(_parse_line, classes=classes, size=size))
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        yield LabelledImage(file, name, *size, usable_rows(rows, size, labels, bad))


def _parse_line(text: str, classes: int, size: tuple[int, int]) -> Row:
    words = text.split()
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise ValueError(
            f"{len(words)} values; a line is 'class cx cy w h', or class and three or more points"
        )
    row: Row = {"category_id": parse_choice(words[0], "class", range(classes)) + 1}
    values = [float(parse_number(word, "a coordinate")) for word in words[1:]]
    for value in values:
        if not 0 <= value <= 1 + _TOLERANCE:  # nan as well
            raise ValueError(f"coordinate {value:g}; they must be fractions of the image, 0 to 1")
    width, height = size
    if len(words) == 5:
        cx, cy, w, h = values
        box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        return row | {"bbox": box}
    points = [value * side for value, side in zip(values, cycle(size))]
    return row | {"bbox": enclosing_box(points), "segmentation": [points]}


def _format_line(row: Row, class_index: int, image: LabelledImage) -> str:
    size = image.width, image.height
    polygons = row.get("segmentation")
    if isinstance(polygons, list) and len(polygons) == 1:
        points = polygons[0]
        fractions = [v / side for v, side in zip(points, cycle(size))]
    else:
        x, y, w, h = row["bbox"]
        fractions = [(x + w / 2) / size[0], (y + h / 2) / size[1], w / size[0], h / size[1]]
    words = [str(class_index), *(repr(round(value, _DECIMALS)) for value in fractions)]
    return " ".join(words) + "\n"
