"""TinyPerson: COCO-format JSON with "ignore", "uncertain", "logo" and "in_dense_image".

As in its benchmark, persons at sea and on land are one category, and what is to be ignored,
uncertain, or part of a logo is neither an object nor background.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats import coco
from dr2net_d2.data.formats.base import BadEntries, Format, Layout, Source, attributes_of, named
from dr2net_d2.data.formats.samples import sample_source
from dr2net_d2.data.formats.writing import left_out
from dr2net_d2.errors import DatasetError

_FLAGS = ("ignore", "uncertain", "logo")
_TABLES = {"images", "annotations"}


def find(path: Path) -> dict[str, Layout]:
    return coco.marked_parts(path, "tinyperson") or coco.marked_parts(
        path / "tiny_set", "tinyperson"
    )


def read(layout: Layout, bad: BadEntries) -> Source:
    document, tables = coco.read_tables(layout, bad)
    if cut := [row["id"] for row in tables.images if "corner" in row]:
        raise DatasetError(
            f'{layout.annotations}: image {cut[0]} has a "corner": it is a part that is to be cut'
            " out of an image; give the JSON of whole images, such as tiny_set_train.json"
        )
    return Source(
        named(["person"]),
        len(document["images"]),
        coco.labelled(layout, tables, bad, _annotation),
        info={"attributes": {k: v for k, v in document.items() if k not in _TABLES}},
    )


def _annotation(annotation: Row) -> Row:
    for key in _FLAGS:
        if annotation.get(key, False) not in (False, True):
            raise ValueError(f"{key} is {annotation[key]!r}; it must be true or false")
    row = coco.standard(annotation, any(annotation.get(key) for key in _FLAGS))
    attributes = {**attributes_of(row), "category_id": annotation["category_id"]}
    return {**row, "category_id": 1, "attributes": attributes}


def write(source: Source, folder: Path) -> list[str]:
    if [row["name"] for row in source.categories] != ["person"]:
        raise DatasetError(
            "TinyPerson has the one category 'person', and this dataset has"
            f" {', '.join(source.category_names().values())}; write another format"
        )
    document, regions = coco.collect(source, folder / "train", flatten=True)
    (folder / "annotations").mkdir()
    for row in document["annotations"]:
        for flag in (*_FLAGS, "in_dense_image"):
            row.setdefault(flag, flag == "ignore" and bool(row.get("iscrowd")))
    document = {**document, **source.info.get("attributes", {})}
    (folder / "annotations" / "tiny_set_train.json").write_text(json.dumps(document))
    return left_out(ignore_regions=regions)


def samples(folder: Path) -> None:
    """Persons at sea and on land; all combinations of flags, ids from 0."""
    with tempfile.TemporaryDirectory() as drawn:
        source = sample_source(Path(drawn), ["person"], objects=6)
        for image in source.images:
            image.name = f"labeled_images/{image.name}"
        write(source, folder)
    file = folder / "annotations" / "tiny_set_train.json"
    document = json.loads(file.read_text())
    document["type"] = "instance"
    document["categories"] = [
        {"id": 1, "name": "sea_person", "supercategory": "person"},
        {"id": 2, "name": "earth_person", "supercategory": "person"},
    ]
    for row in document["images"]:
        row["id"] -= 1
    for index, row in enumerate(document["annotations"]):
        x, y, w, h = (value + 0.12438931940 for value in row["bbox"])
        row |= {"id": index, "image_id": row["image_id"] - 1, "bbox": [x, y, w, h]}
        row |= {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "area": w * h}
        row |= {"iscrowd": 0, "category_id": index % 2 + 1}
        row |= {flag: bool(index >> bit & 1) for bit, flag in enumerate(_FLAGS)}
        row["in_dense_image"] = index == 9
    file.write_text(json.dumps(document))


FORMAT = Format("tinyperson", find, read, write, samples)
