"""AI-TOD and AI-TOD-v2: COCO-format JSON of eight categories, annotations/aitod_train.json ..."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats import coco
from dr2net_d2.data.formats.base import BadEntries, Format, Layout, Source
from dr2net_d2.data.formats.samples import sample_source
from dr2net_d2.data.formats.writing import category_places, left_out
from dr2net_d2.errors import DatasetError

CATEGORIES = (
    *("airplane", "bridge", "storage-tank", "ship"),
    *("swimming-pool", "vehicle", "person", "wind-mill"),
)
_TABLES = {"images", "annotations", "categories"}


def find(path: Path) -> dict[str, Layout]:
    return coco.marked_parts(path, "aitod")


def read(layout: Layout, bad: BadEntries) -> Source:
    document, tables = coco.read_tables(layout, bad)
    names = tuple(row["name"] for row in tables.categories)
    if {*names} != {*CATEGORIES}:
        raise DatasetError(
            f"{layout.annotations}: the categories are {', '.join(names)}; AI-TOD has"
            f" {', '.join(CATEGORIES)}; read other files with --format coco"
        )
    return Source(
        tables.categories,
        len(document["images"]),
        coco.labelled(layout, tables, bad, _annotation),
        info={"attributes": {k: v for k, v in document.items() if k not in _TABLES}},
    )


def _annotation(annotation: Row) -> Row:
    return coco.standard(annotation, bool(annotation.get("ignore")))


def write(source: Source, folder: Path) -> list[str]:
    category_places(source, CATEGORIES, "AI-TOD")
    document, regions = coco.collect(source, folder / "images" / "train", flatten=True)
    (folder / "annotations").mkdir()
    document = {**source.info.get("attributes", {}), **document}
    (folder / "annotations" / "aitod_train.json").write_text(json.dumps(document))
    return left_out(ignore_regions=regions)


def samples(folder: Path) -> None:
    """Objects of 3 px and more with fractions of a pixel, one of them to be ignored."""
    with tempfile.TemporaryDirectory() as drawn:
        source = sample_source(Path(drawn), [*CATEGORIES], ".png", objects=8)
        write(source, folder)
    file = folder / "annotations" / "aitod_train.json"
    document = json.loads(file.read_text())
    document["info"] = {"description": "AI-TOD", "version": "1.0"}
    for row in document["annotations"]:
        x, y, w, h = row["bbox"]
        row |= {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "area": w * h}
        row |= {"iscrowd": 0, "ignore": 0}
    document["annotations"][1] |= {"bbox": [12.5, 20.0, 3.25, 2.75], "area": 8.9375}
    document["annotations"][2]["ignore"] = 1
    document["annotations"][3] |= {"bbox": [5.0, 6.0, 0.0, 4.0], "area": 0.0}
    file.write_text(json.dumps(document))


FORMAT = Format("aitod", find, read, write, samples)
