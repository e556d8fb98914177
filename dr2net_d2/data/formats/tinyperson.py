"""TinyPerson: COCO-style JSON with "ignore", "uncertain", "logo" and "in_dense_image".

As in its benchmark, persons at sea and on land are one category, and an object with one of the
first three flags is to be ignored: it counts neither as an object nor as background.
"""

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
from dr2net_d2.data.formats.reading import attributes_of, category_rows
from dr2net_d2.data.formats.samples import drawn_dataset
from dr2net_d2.data.formats.writing import corners_of_box, describe_losses
from dr2net_d2.errors import DatasetError

_IGNORE_FLAGS = ("ignore", "uncertain", "logo")


class TinyPerson(DatasetFormat):
    name = "tinyperson"

    def find(self, path: Path) -> dict[str, Layout]:
        """A split is a JSON with "uncertain"; the folder may be the one around tiny_set/."""
        return find_json(path, "tinyperson") or find_json(path / "tiny_set", "tinyperson")

    def read(self, layout: Layout, bad: BadEntries) -> LabelledDataset:
        document, tables = read_tables(layout, bad)
        if cut := [row["id"] for row in tables.images if "corner" in row]:
            raise DatasetError(
                f'{layout.annotations}: image {cut[0]} has a "corner", so it is to be cut out of a'
                " larger image; give the JSON of whole images, such as tiny_set_train.json"
            )
        return LabelledDataset(
            category_rows(["person"]),
            len(document["images"]),
            read_images(layout, tables, bad, _adapt_annotation),
            info={"attributes": without_keys(document, "images", "annotations")},
        )

    def write(self, dataset: LabelledDataset, folder: Path) -> list[str]:
        names = [row["name"] for row in dataset.categories]
        if names != ["person"]:
            raise DatasetError(
                "TinyPerson has a single category, 'person', but this dataset has"
                f" {', '.join(names)}; write another format"
            )
        document, regions = write_images(dataset, folder / "train", flatten=True)
        (folder / "annotations").mkdir()
        for row in document["annotations"]:
            row.setdefault("ignore", bool(row.get("iscrowd")))
            for flag in ("uncertain", "logo", "in_dense_image"):
                row.setdefault(flag, False)
        document = {**document, **dataset.info.get("attributes", {})}
        (folder / "annotations" / "tiny_set_train.json").write_text(json.dumps(document))
        return describe_losses({"ignore regions": regions})

    def write_sample(self, folder: Path) -> None:
        """Persons at sea and on land, all combinations of flags, ids from 0."""
        with drawn_dataset(["person"], objects=6) as dataset:
            for image in dataset.images:
                image.name = f"labeled_images/{image.name}"
            self.write(dataset, folder)
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
            box = [value + 0.12438931940 for value in row["bbox"]]
            row |= {"id": index, "image_id": row["image_id"] - 1, "bbox": box}
            row |= {"segmentation": [corners_of_box(box)], "area": box[2] * box[3]}
            row |= {"iscrowd": 0, "category_id": index % 2 + 1}
            # The flags count up in binary.
            row |= {flag: bool(index >> bit & 1) for bit, flag in enumerate(_IGNORE_FLAGS)}
            row["in_dense_image"] = index == 9
        file.write_text(json.dumps(document))


def _adapt_annotation(annotation: Row) -> Row:
    for key in _IGNORE_FLAGS:
        if annotation.get(key, False) not in (False, True):
            raise ValueError(f"{key} is {annotation[key]!r}; it must be true or false")
    row = nest_attributes(annotation, ignored=any(annotation.get(key) for key in _IGNORE_FLAGS))
    attributes = {**attributes_of(row), "category_id": annotation["category_id"]}
    return {**row, "category_id": 1, "attributes": attributes}
