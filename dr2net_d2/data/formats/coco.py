"""COCO's own format: one JSON per split.

COCO does not define "ignore" for annotations, but many files have it; where it is true, the
annotation becomes "iscrowd".
"""

from __future__ import annotations

import json
from pathlib import Path

from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats.base import BadEntries, DatasetFormat, LabelledDataset, Layout
from dr2net_d2.data.formats.coco_json import (
    image_folder,
    json_kind,
    read_images,
    read_tables,
    without_keys,
    write_images,
)
from dr2net_d2.data.formats.reading import attributes_of
from dr2net_d2.data.formats.samples import drawn_dataset

_TABLES = ("info", "images", "annotations", "categories", "ignore_regions")


class Coco(DatasetFormat):
    name = "coco"

    def find(self, path: Path) -> dict[str, Layout]:
        """A split is a JSON in the folder or in annotations/, or <split>/_annotations.coco.json."""
        layouts = {}
        patterns = ("*.json", "annotations/*.json", "*/_annotations.coco.json")
        files = [path] if path.is_file() else [f for p in patterns for f in sorted(path.glob(p))]
        for file in files:
            if file.suffix == ".json" and json_kind(file) == "coco":
                split = file.parent.name if file.name.startswith("_annotations") else file.stem
                layouts[split] = Layout(file, image_folder(file), split=split)
        return layouts

    def read(self, layout: Layout, bad: BadEntries) -> LabelledDataset:
        document, tables = read_tables(layout, bad)
        return LabelledDataset(
            tables.categories,
            len(document["images"]),
            read_images(layout, tables, bad, _adapt_annotation),
            info=document.get("info") or {},
            tables=without_keys(document, *_TABLES),
        )

    def write(self, dataset: LabelledDataset, folder: Path) -> list[str]:
        document, _ = write_images(dataset, folder, flatten=False)
        head = {"info": dataset.info} if dataset.info else {}
        (folder / "annotations.json").write_text(json.dumps(head | dataset.tables | document))
        return []

    def write_sample(self, folder: Path) -> None:
        """Unordered ids, an image without objects, a crowd, an ignore region, further keys."""
        with drawn_dataset(["person", "car"], ".png") as dataset:
            for image in dataset.images:
                image.name = f"images/{image.name}"
            self.write(dataset, folder)
        file = folder / "annotations.json"
        document = json.loads(file.read_text())
        document["info"] = {"year": 2017}
        document["licenses"] = [{"id": 1, "name": "CC BY 4.0", "url": ""}]
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


def _adapt_annotation(annotation: Row) -> Row:
    row = without_keys(annotation, "image_id", "ignore")
    ignore = annotation.get("ignore")
    if ignore is not None:
        row["attributes"] = {**attributes_of(annotation), "ignore": ignore}
    if ignore:
        row["iscrowd"] = 1
    return row
