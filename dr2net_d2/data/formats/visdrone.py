"""VisDrone-DET: ``x,y,width,height,score,category,truncation,occlusion``, one line per object.

Category 0 is a region without annotations. Category 11, "others", is used neither in training nor
in evaluation. An object with score 0 is to be ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    first_folder,
    measure_image,
    pair_images_with_labels,
    parse_choice,
    parse_lines,
    parse_number,
    usable_rows,
)
from dr2net_d2.data.formats.samples import drawn_dataset
from dr2net_d2.data.formats.writing import category_indices, copy_image

CATEGORIES = (
    *("pedestrian", "people", "bicycle", "car", "van"),
    *("truck", "tricycle", "awning-tricycle", "bus", "motor"),
)
_REGION, _OTHERS = 0, 11
_FIELDS = ("x", "y", "width", "height", "score", "category", "truncation", "occlusion")


class VisDrone(DatasetFormat):
    name = "visdrone"

    def find(self, path: Path) -> dict[str, Layout]:
        """A split is a folder with images/ and annotations/, such as VisDrone2019-DET-train."""
        layouts = {}
        for folder in [path, *sorted(path.glob("VisDrone*-DET-*"))]:
            # Some archives contain the folder twice, one inside the other.
            inner = first_folder(folder / folder.name, folder)
            annotations, images = inner / "annotations", inner / "images"
            if images.is_dir() and next(annotations.glob("*.txt"), None):
                split = folder.name.partition("-DET-")[2].replace("-", "_")
                layouts[split] = Layout(annotations, images, split=split)
        return layouts

    def read(self, layout: Layout, bad: BadEntries) -> LabelledDataset:
        pairs = pair_images_with_labels(layout, bad)
        return LabelledDataset(category_rows(CATEGORIES), len(pairs), _read_images(pairs, bad))

    def write(self, dataset: LabelledDataset, folder: Path) -> list[str]:
        indices = category_indices(dataset, CATEGORIES, "VisDrone")
        (folder / "annotations").mkdir()
        for image in dataset.images:
            rows = [(row, indices[row["category_id"]] + 1) for row in image.annotations]
            rows += [(row, _REGION) for row in image.ignore_regions]
            rows += [(row, _OTHERS) for row in image.attributes.get("others", ())]
            rows.sort(key=lambda entry: attributes_of(entry[0]).get("line", float("inf")))
            lines = [_format_line(row, category) for row, category in rows]
            copied = copy_image(image, folder / "images")
            (folder / "annotations" / f"{copied.stem}.txt").write_text("".join(lines))
        return []

    def write_sample(self, folder: Path) -> None:
        """A validation split; its second file has everything special in the distribution."""
        folder = folder / "VisDrone2019-DET-val"
        folder.mkdir()
        with drawn_dataset(CATEGORIES) as dataset:
            self.write(dataset, folder)
        (folder / "annotations" / "0000002.txt").write_bytes(
            b"10,10,8,9,1,4,0,1,\r\n"  # a comma at the end, a Windows line end
            b"0,0,30,20,0,0,0,0\r\n"  # an ignore region
            b"40,50,12,6,0,11,0,0\r\n"  # "others"
            b"-4,60,9,9,1,1,1,2\r\n"  # over the edge, truncated, heavily occluded
            b"50,90,7,0,1,4,0,0\r\n"  # no height, as in three lines of the distribution
            b"60,20,5,5,0,2,0,0\r\n"  # an object to be ignored
            b"90,120,30,30,0,0,0,0\r\n\r\n"  # a region over the corner, a blank line
        )


def _read_images(pairs: list[tuple[Path, Path]], bad: BadEntries) -> Iterator[LabelledImage]:
    for file, labels in pairs:
        size = measure_image(file, bad)
        rows = parse_lines(labels, bad, _parse_line)
        if size is None:
            continue
        image = LabelledImage(file, file.name, *size)
        for line, row in rows:
            row["attributes"]["line"] = line
        others = []
        for row in usable_rows(rows, size, labels, bad):
            category = row.pop("category")
            if category == _REGION:
                image.ignore_regions.append(row)
            elif category == _OTHERS:
                others.append(row)
            else:
                crowd = int(row["attributes"]["score"] == 0)
                image.annotations.append({**row, "category_id": category, "iscrowd": crowd})
        if others:
            image.attributes["others"] = others
        yield image


def _parse_line(text: str) -> Row:
    values = [value.strip() for value in text.split(",")]
    # Many files of the distribution have a comma at the end of each line.
    if len(values) == len(_FIELDS) + 1 and not values[-1]:
        values.pop()
    if len(values) != len(_FIELDS):
        raise ValueError(f"{len(values)} values; a line is {','.join(_FIELDS)}")
    if "-1" in values[6:]:
        raise ValueError("truncation or occlusion is -1, as in files of results; give annotations")
    attributes = {
        "score": parse_choice(values[4], "score", (0, 1)),
        "truncation": parse_choice(values[6], "truncation", (0, 1)),
        "occlusion": parse_choice(values[7], "occlusion", (0, 1, 2)),
    }
    box = zip(values[:4], _FIELDS[:4], strict=True)
    return {
        "bbox": [parse_number(value, name) for value, name in box],
        "category": parse_choice(values[5], "category", range(12)),
        "attributes": attributes,
    }


def _format_line(row: Row, category: int) -> str:
    known = attributes_of(row)
    counts = 1 <= category <= len(CATEGORIES) and not row.get("iscrowd")
    fields = [*row["bbox"], known.get("score", int(counts)), category]
    fields += [known.get("truncation", 0), known.get("occlusion", 0)]
    return ",".join(map(str, fields)) + "\n"
