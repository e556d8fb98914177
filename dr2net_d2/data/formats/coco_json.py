"""Reading and writing of COCO-style JSON, for the three formats that use it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dr2net_d2.data.coco_tables import Row, Tables, check_tables, read_json
from dr2net_d2.data.formats.base import BadEntries, LabelledDataset, LabelledImage, Layout
from dr2net_d2.data.formats.reading import attributes_of, measure_image
from dr2net_d2.data.formats.writing import copy_image
from dr2net_d2.errors import DatasetError

_MARKS = {"aitod": b'"wind-mill"', "tinyperson": b'"uncertain"'}
"""A string that occurs in every JSON of a format and in no other's."""

_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\\\]|\\\\.)+")')
_IMAGE_KEYS = ("file_name", "width", "height", "attributes")
_ANNOTATION_KEYS = (
    *("id", "image_id", "category_id", "bbox", "area", "segmentation", "iscrowd"),
    *("keypoints", "num_keypoints"),
)


def json_kind(file: Path) -> str:
    """Which format a JSON has: "coco", "aitod", "tinyperson", or "" for none of them."""
    data = file.read_bytes()
    if b'"images"' not in data or b'"annotations"' not in data:
        return ""
    # Only our own converter writes "attributes"; the result is COCO, whatever it was made from.
    if b'"attributes"' in data:
        return "coco"
    return next((kind for kind, mark in _MARKS.items() if mark in data), "coco")


def find_json(path: Path, kind: str) -> dict[str, Layout]:
    """The JSON files of a kind: the file itself, or those in a folder and its annotations/."""
    files = [path] if path.is_file() else [*path.glob("annotations/*.json"), *path.glob("*.json")]
    return {
        file.stem: Layout(file, image_folder(file), split=file.stem)
        for file in sorted(files)
        if file.suffix == ".json" and json_kind(file) == kind
    }


def image_folder(json_file: Path) -> Path:
    """Search the usual folders for the first image of a JSON; the JSON's own folder by default."""
    # By a regular expression, because parsing some hundred megabytes of JSON is slow.
    first = _FILE_NAME.search(json_file.read_bytes())
    try:
        name = json.loads(first[1]) if first else ""
    except ValueError:
        name = ""
    stem = json_file.stem.replace("instances_", "")
    splits = {stem, *stem.split("_")}
    for root in (json_file.parent, json_file.parent.parent):
        folders = [root, root / "images"]
        for split in sorted(splits):
            folders += [root / split, root / "images" / split, root / split / "images"]
            folders += [root / "images" / split / "images"]
        for folder in folders:
            if (folder / name).is_file():
                return folder
    return json_file.parent


def read_tables(layout: Layout, bad: BadEntries) -> tuple[Row, Tables]:
    """The whole document, and its rows that can be used.

    Raises:
        DatasetError: the file is not JSON, or lacks one of COCO's tables.
    """
    document = read_json(layout.annotations)
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            raise DatasetError(
                f'{layout.annotations}: key "{key}" is missing or no list, found'
                f' {", ".join(map(repr, document)) or "none"}; COCO format has "images",'
                ' "annotations" and "categories"'
            )
    return document, check_tables(document, lambda text: bad.add(layout.annotations, None, text))


def read_images(
    layout: Layout, tables: Tables, bad: BadEntries, adapt: Callable[[Row], Row]
) -> Iterator[LabelledImage]:
    """Read images one at a time.

    Args:
        layout: where the tables are from.
        tables: rows that can be used.
        bad: collects images that are damaged or of another size than the JSON says, and
            annotations for which ``adapt`` raises a ValueError; its message is the reason.
        adapt: turns an annotation of the JSON into a row of ``LabelledImage.annotations``.
    """
    objects = _by_image(tables.objects.rows)
    regions = _by_image(tables.regions.rows)
    for row in tables.images:
        attributes = dict(attributes_of(row))
        name = attributes.pop("file_name", row["file_name"])
        file = layout.images / row["file_name"]
        size = measure_image(file, bad)
        if size is None:
            continue
        if size != (row["width"], row["height"]):
            bad.add(
                layout.annotations,
                None,
                f"image {row['id']}: width and height are {row['width']} x {row['height']} but"
                f" {file} is {size[0]} x {size[1]} px; correct them (EXIF rotation counts)",
            )
            continue
        annotations = []
        for annotation in objects.get(row["id"], ()):
            try:
                annotations.append(adapt(annotation))
            except ValueError as error:
                bad.add(layout.annotations, None, f"annotation {annotation['id']}: {error}")
        yield LabelledImage(
            file,
            name,
            *size,
            annotations,
            [without_keys(region, "image_id") for region in regions.get(row["id"], ())],
            attributes,
            without_keys(row, *_IMAGE_KEYS),
        )


def _by_image(rows: Iterable[Row]) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["image_id"], []).append(row)
    return groups


def without_keys(row: Row, *keys: str) -> Row:
    """A copy of a row without some keys."""
    return {key: value for key, value in row.items() if key not in keys}


def nest_attributes(annotation: Row, ignored: bool) -> Row:
    """Move the keys that COCO does not have into "attributes".

    Args:
        annotation: a row of a JSON without "attributes".
        ignored: set "iscrowd" to 1; an old value is kept as an attribute.
    """
    row = {k: annotation[k] for k in _ANNOTATION_KEYS if k in annotation and k != "image_id"}
    attributes = without_keys(annotation, *_ANNOTATION_KEYS)
    if ignored and not row.get("iscrowd"):
        if "iscrowd" in row:
            attributes["iscrowd"] = row["iscrowd"]
        row["iscrowd"] = 1
    return {**row, "attributes": attributes} if attributes else row


def flatten_attributes(row: Row) -> Row:
    """Undo ``nest_attributes``."""
    attributes = attributes_of(row)
    return {**without_keys(row, "attributes"), **attributes}


def write_images(dataset: LabelledDataset, images: Path, flatten: bool) -> tuple[Row, int]:
    """Copy the images of a dataset and build the tables of its JSON.

    Args:
        dataset: its images are iterated over.
        images: the folder for the images.
        flatten: turn attributes into keys of their rows, and leave out ignore regions.

    Returns:
        The document ("images", "annotations", "categories" and perhaps "ignore_regions"), and the
        number of ignore regions that were left out.
    """
    finish = flatten_attributes if flatten else dict
    rows: list[Row] = []
    annotations: list[Row] = []
    regions: list[Row] = []
    for image in dataset.images:
        copied = copy_image(image, images, keep_folders=True)
        name = copied.relative_to(images).as_posix()
        own: Row = {"id": len(rows) + 1, **image.row, "file_name": name}
        own |= {"height": image.height, "width": image.width}
        if image.attributes:
            own["attributes"] = image.attributes
        rows.append(finish(own))
        for table, boxes in ((annotations, image.annotations), (regions, image.ignore_regions)):
            for row in boxes:
                ids = {"id": len(table) + 1, "image_id": own["id"]}
                table.append(finish({**ids, **row}))
    document: Row = {"images": rows, "annotations": annotations, "categories": dataset.categories}
    if flatten:
        return document, len(regions)
    if regions:
        document["ignore_regions"] = regions
    return document, 0
