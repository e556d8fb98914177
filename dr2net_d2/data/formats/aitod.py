"""AI-TOD and AI-TOD-v2: COCO-style JSON with eight categories, annotations/aitod_train.json etc."""

from __future__ import annotations

import json
from pathlib import Path

from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats.base import BadEntries, DatasetFormat, LabelledDataset, Layout
from dr2net_d2.data.formats.coco_json import (
    find_json,
    nest_attributes,
    read_images,
    read_tables,
    without_keys,
    write_images,
)
from dr2net_d2.data.formats.samples import drawn_dataset
from dr2net_d2.data.formats.writing import category_indices, corners_of_box, describe_losses
from dr2net_d2.errors import DatasetError

CATEGORIES = (
    *("airplane", "bridge", "storage-tank", "ship"),
    *("swimming-pool", "vehicle", "person", "wind-mill"),
)


class AiTod(DatasetFormat):
    name = "aitod"

    def find(self, path: Path) -> dict[str, Layout]:
        """A split is a JSON with "wind-mill", which is a category of no other dataset."""
        return find_json(path, "aitod")

    def read(self, layout: Layout, bad: BadEntries) -> LabelledDataset:
        document, tables = read_tables(layout, bad)
        names = tuple(row["name"] for row in tables.categories)
        if {*names} != {*CATEGORIES}:
            raise DatasetError(
                f"{layout.annotations}: the categories are {', '.join(names)}; AI-TOD has"
                f" {', '.join(CATEGORIES)}; read other files with --format coco"
            )
        return LabelledDataset(
            tables.categories,
            len(document["images"]),
            read_images(layout, tables, bad, _adapt_annotation),
            info={"attributes": without_keys(document, "images", "annotations", "categories")},
        )

    def write(self, dataset: LabelledDataset, folder: Path) -> list[str]:
        category_indices(dataset, CATEGORIES, "AI-TOD")  # refuses other categories
        document, regions = write_images(dataset, folder / "images" / "train", flatten=True)
        (folder / "annotations").mkdir()
        document = {**dataset.info.get("attributes", {}), **document}
        (folder / "annotations" / "aitod_train.json").write_text(json.dumps(document))
        return describe_losses({"ignore regions": regions})

    def write_sample(self, folder: Path) -> None:
        """Objects from 3 px on, boxes with fractions of a pixel, one object to be ignored."""
        with drawn_dataset(CATEGORIES, ".png", objects=8) as dataset:
            self.write(dataset, folder)
        file = folder / "annotations" / "aitod_train.json"
        document = json.loads(file.read_text())
        document["info"] = {"description": "AI-TOD", "version": "1.0"}
        for row in document["annotations"]:
            _, _, width, height = row["bbox"]
            row |= {"segmentation": [corners_of_box(row["bbox"])], "area": width * height}
            row |= {"iscrowd": 0, "ignore": 0}
        document["annotations"][1] |= {"bbox": [12.5, 20.0, 3.25, 2.75], "area": 8.9375}
        document["annotations"][2]["ignore"] = 1
        document["annotations"][3] |= {"bbox": [5.0, 6.0, 0.0, 4.0], "area": 0.0}
        file.write_text(json.dumps(document))


def _adapt_annotation(annotation: Row) -> Row:
    return nest_attributes(annotation, ignored=bool(annotation.get("ignore")))
