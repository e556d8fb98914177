"""COCO's own format, and what the other JSON formats share with it.

A truthy "ignore" of an annotation, which COCO does not define but many files have, becomes
"iscrowd".
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dr2net_d2.data.coco_tables import Row, Tables, check_tables, read_json
from dr2net_d2.data.formats.base import (
    BadEntries,
    Format,
    Labelled,
    Layout,
    Source,
    attributes_of,
    measured,
)
from dr2net_d2.data.formats.samples import sample_source
from dr2net_d2.data.formats.writing import copy_image
from dr2net_d2.errors import DatasetError

_AITOD, _TINYPERSON = b'"wind-mill"', b'"uncertain"'
"""What the JSON files of the one or the other hold, and no others."""

_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\\\]|\\\\.)+")')
_TABLES = {"info", "images", "annotations", "categories", "ignore_regions"}
_IMAGE = {"id", "file_name", "width", "height", "attributes"}
_ANNOTATION = (
    *("id", "image_id", "category_id", "bbox", "area", "segmentation", "iscrowd"),
    *("keypoints", "num_keypoints"),
)


def find(path: Path) -> dict[str, Layout]:
    """A part is a JSON, directly in the folder, in annotations/, or as <part>/_annotations.coco."""
    found = {}
    patterns = ("*.json", "annotations/*.json", "*/_annotations.coco.json")
    files = [path] if path.is_file() else [f for p in patterns for f in sorted(path.glob(p))]
    for file in files:
        if file.suffix == ".json" and _kind(file) == "coco":
            part = file.parent.name if file.name.startswith("_annotations") else file.stem
            found[part] = Layout(file, image_folder(file), part=part)
    return found


def _kind(file: Path) -> str:
    data = file.read_bytes()
    if b'"images"' not in data or b'"annotations"' not in data:
        return ""
    # What a converter of ours wrote has "attributes", and is COCO whatever it was made from.
    marks = {} if b'"attributes"' in data else {"aitod": _AITOD, "tinyperson": _TINYPERSON}
    return next((kind for kind, mark in marks.items() if mark in data), "coco")


def marked_parts(path: Path, kind: str) -> dict[str, Layout]:
    """The JSON files of a kind in a folder, in its annotations/, or the one that is given."""
    files = [path] if path.is_file() else [*path.glob("annotations/*.json"), *path.glob("*.json")]
    return {
        file.stem: Layout(file, image_folder(file), part=file.stem)
        for file in sorted(files)
        if file.suffix == ".json" and _kind(file) == kind
    }


def image_folder(json_file: Path) -> Path:
    """The folder in which a JSON's first image is found, by the customs of COCO and its kin.

    Beside the JSON if it is nowhere.
    """
    # Found without parsing a JSON of some hundred megabytes.
    first = _FILE_NAME.search(json_file.read_bytes())
    try:
        name = json.loads(first[1]) if first else ""
    except ValueError:
        name = ""
    words = json_file.stem.replace("instances_", "").split("_")
    splits = {*words, json_file.stem.replace("instances_", "")}
    for root in (json_file.parent, json_file.parent.parent):
        folders = [root, root / "images"]
        for split in sorted(splits):
            folders += [root / split, root / "images" / split, root / split / "images"]
            folders += [root / "images" / split / "images"]
        for folder in folders:
            if (folder / name).is_file():
                return folder
    return json_file.parent


def read(layout: Layout, bad: BadEntries) -> Source:
    document, tables = read_tables(layout, bad)
    return Source(
        tables.categories,
        len(document["images"]),
        labelled(layout, tables, bad, _annotation),
        info=document.get("info") or {},
        tables={key: value for key, value in document.items() if key not in _TABLES},
    )


def read_tables(layout: Layout, bad: BadEntries) -> tuple[Row, Tables]:
    """The document and its good rows.

    Raises:
        DatasetError: no JSON, or one without COCO's tables.
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


def labelled(
    layout: Layout, tables: Tables, bad: BadEntries, adapt: Callable[[Row], Row]
) -> Iterator[Labelled]:
    """The images of checked tables.

    Args:
        layout: where they are from.
        tables: checked.
        bad: gets what is found to be wrong with images, and annotations for which ``adapt`` raises
            ValueError, with its message as the reason.
        adapt: makes of a row of the JSON one of ``Labelled.annotations``.
    """
    objects = _by_image(tables.objects.rows)
    regions = _by_image(tables.regions.rows)
    for row in tables.images:
        attributes = dict(attributes_of(row))
        name = attributes.pop("file_name", row["file_name"])
        file = layout.images / row["file_name"]
        size = measured(file, bad)
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
        rest = {key: value for key, value in row.items() if key not in _IMAGE - {"id"}}
        annotations = []
        for annotation in objects.get(row["id"], ()):
            try:
                annotations.append(adapt(annotation))
            except ValueError as error:
                bad.add(layout.annotations, None, f"annotation {annotation['id']}: {error}")
        yield Labelled(
            file,
            name,
            *size,
            annotations,
            [without(region, "image_id") for region in regions.get(row["id"], ())],
            attributes,
            rest,
        )


def without(row: Row, *keys: str) -> Row:
    return {key: value for key, value in row.items() if key not in keys}


def standard(annotation: Row, ignored: bool) -> Row:
    """An annotation whose further keys have become attributes.

    Args:
        annotation: a row of a JSON that has no "attributes".
        ignored: whether "iscrowd" is to be 1.
    """
    row = {key: annotation[key] for key in _ANNOTATION if key in annotation and key != "image_id"}
    attributes = without(annotation, *_ANNOTATION)
    if ignored and not row.get("iscrowd"):
        if "iscrowd" in row:
            attributes["iscrowd"] = row["iscrowd"]
        row["iscrowd"] = 1
    return {**row, "attributes": attributes} if attributes else row


def flat(row: Row) -> Row:
    """The reverse of ``standard``."""
    attributes = attributes_of(row)
    return {**without(row, "attributes"), **attributes}


def _annotation(annotation: Row) -> Row:
    row = without(annotation, "image_id", "ignore")
    ignore = annotation.get("ignore")
    if ignore is not None:
        row["attributes"] = {**attributes_of(annotation), "ignore": ignore}
    if ignore:
        row["iscrowd"] = 1
    return row


def _by_image(rows: Iterable[Row]) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["image_id"], []).append(row)
    return groups


def collect(source: Source, images: Path, flatten: bool) -> tuple[Row, int]:
    """Copy the images of a dataset, and put its rows into tables.

    Args:
        source: read to its end.
        images: the folder for the images.
        flatten: whether attributes become keys of their row; otherwise they stay.

    Returns:
        "images", "annotations", "categories" and, unless ``flatten``, "ignore_regions"; the number
        of regions that were left out.
    """
    finish = flat if flatten else dict
    rows: list[Row] = []
    annotations: list[Row] = []
    regions: list[Row] = []
    for image in source.images:
        copied = copy_image(image, images, flat=False)
        name = copied.relative_to(images).as_posix()
        own: Row = {"id": len(rows) + 1, **image.row, "file_name": name}
        own |= {"height": image.height, "width": image.width}
        rows.append(finish(own | ({"attributes": image.attributes} if image.attributes else {})))
        for table, found in ((annotations, image.annotations), (regions, image.ignore_regions)):
            for row in found:
                ids = {"id": len(table) + 1, "image_id": own["id"]}
                table.append(finish({**ids, **row}))
    document: Row = {"images": rows, "annotations": annotations, "categories": source.categories}
    if flatten:
        return document, len(regions)
    return document | ({"ignore_regions": regions} if regions else {}), 0


def write(source: Source, folder: Path) -> list[str]:
    document, _ = collect(source, folder, flatten=False)
    head = {"info": source.info} if source.info else {}
    (folder / "annotations.json").write_text(json.dumps(head | source.tables | document))
    return []


def samples(folder: Path) -> None:
    """Ids in no order, an image without objects, a crowd, an ignore region, further keys."""
    with tempfile.TemporaryDirectory() as drawn:
        source = sample_source(Path(drawn), ["person", "car"], ".png")
        for image in source.images:
            image.name = f"images/{image.name}"
        write(source, folder)
    file = folder / "annotations.json"
    document = json.loads(file.read_text())
    document |= {"info": {"year": 2017}, "licenses": [{"id": 1, "name": "CC BY 4.0", "url": ""}]}
    document["images"].reverse()
    document["images"][0] |= {"license": 1, "date_captured": "2013-11-14 17:02:52"}
    document["ignore_regions"] = [{"id": 7, "image_id": 2, "bbox": [60, 100.5, 40, 50]}]
    rows = document["annotations"]
    rows.reverse()
    rows[0] |= {"iscrowd": 1, "segmentation": {"counts": "0", "size": [133, 97]}, "area": 30}
    rows[1] |= {"segmentation": [[10, 10, 20, 10, 20.5, 25]], "iscrowd": 0, "area": 78.75}
    rows[2] |= {"attributes": {"occluded": True}, "iscrowd": 0, "keypoints": [1, 2, 2]}
    rows[3] |= {"bbox": [-2, 100, 10.25, 0], "iscrowd": 0}
    file.write_text(json.dumps(document))


FORMAT = Format("coco", find, read, write, samples)
