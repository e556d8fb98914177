"""VisDrone-DET: one line an object, ``x,y,width,height,score,category,truncation,occlusion``.

Category 0 is a region in which nothing is annotated, 11 ("others") takes part neither in training
nor in evaluation, and an object with score 0 is to be ignored.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats.base import (
    BadEntries,
    Format,
    Labelled,
    Layout,
    Source,
    attributes_of,
    first_folder,
    measured,
    named,
    number,
    one_of,
    paired,
    parse_lines,
    usable,
)
from dr2net_d2.data.formats.samples import sample_source
from dr2net_d2.data.formats.writing import category_places, copy_image

CATEGORIES = (
    *("pedestrian", "people", "bicycle", "car", "van"),
    *("truck", "tricycle", "awning-tricycle", "bus", "motor"),
)
_REGION, _OTHERS = 0, 11
_FIELDS = ("x", "y", "width", "height", "score", "category", "truncation", "occlusion")


def find(path: Path) -> dict[str, Layout]:
    """A part is a folder with images/ and annotations/, VisDrone2019-DET-train for instance."""
    found = {}
    for folder in [path, *sorted(path.glob("VisDrone*-DET-*"))]:
        # Some archives have the folder once more in itself.
        inner = first_folder(folder / folder.name, folder)
        annotations, images = inner / "annotations", inner / "images"
        if images.is_dir() and next(annotations.glob("*.txt"), None):
            part = folder.name.partition("-DET-")[2].replace("-", "_")
            found[part] = Layout(annotations, images, part=part)
    return found


def read(layout: Layout, bad: BadEntries) -> Source:
    pairs = paired(layout, bad)
    return Source(named(CATEGORIES), len(pairs), _images(pairs, bad))


def _images(pairs: list[tuple[Path, Path]], bad: BadEntries) -> Iterator[Labelled]:
    for file, labels in pairs:
        size = measured(file, bad)
        rows = parse_lines(labels, bad, _parse)
        if size is None:
            continue
        image = Labelled(file, file.name, *size)
        for line, row in rows:
            row["attributes"]["line"] = line
        others = []
        for row in usable(rows, size, labels, bad):
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


def _parse(text: str) -> Row:
    values = [value.strip() for value in text.split(",")]
    # Many files of the distribution have a comma at the end of each line.
    if len(values) == len(_FIELDS) + 1 and not values[-1]:
        values.pop()
    if len(values) != len(_FIELDS):
        raise ValueError(f"{len(values)} values; a line is {','.join(_FIELDS)}")
    if "-1" in values[6:]:
        raise ValueError("truncation or occlusion is -1, as in files of results; give annotations")
    attributes = {
        "score": one_of(values[4], "score", (0, 1)),
        "truncation": one_of(values[6], "truncation", (0, 1)),
        "occlusion": one_of(values[7], "occlusion", (0, 1, 2)),
    }
    return {
        "bbox": [number(value, name) for value, name in zip(values[:4], _FIELDS, strict=False)],
        "category": one_of(values[5], "category", range(12)),
        "attributes": attributes,
    }


def write(source: Source, folder: Path) -> list[str]:
    classes = category_places(source, CATEGORIES, "VisDrone")
    (folder / "annotations").mkdir()
    for image in source.images:
        rows = [(row, classes[row["category_id"]] + 1) for row in image.annotations]
        rows += [(row, _REGION) for row in image.ignore_regions]
        rows += [(row, _OTHERS) for row in image.attributes.get("others", ())]
        rows.sort(key=lambda entry: attributes_of(entry[0]).get("line", float("inf")))
        lines = [_line(row, category) for row, category in rows]
        copied = copy_image(image, folder / "images")
        (folder / "annotations" / f"{copied.stem}.txt").write_text("".join(lines))
    return []


def _line(row: Row, category: int) -> str:
    known = attributes_of(row)
    kept = 1 <= category <= len(CATEGORIES) and not row.get("iscrowd")
    flags = known.get("score", int(kept)), category
    extent = known.get("truncation", 0), known.get("occlusion", 0)
    return ",".join(map(str, (*row["bbox"], *flags, *extent))) + "\n"


def samples(folder: Path) -> None:
    """A validation part whose last file has all that is special in the distribution."""
    folder = folder / "VisDrone2019-DET-val"
    with tempfile.TemporaryDirectory() as drawn:
        source = sample_source(Path(drawn), [*CATEGORIES])
        folder.mkdir()
        write(source, folder)
    (folder / "annotations" / "0000002.txt").write_bytes(
        b"10,10,8,9,1,4,0,1,\r\n"  # a comma at the end, a Windows line end
        b"0,0,30,20,0,0,0,0\r\n"  # an ignore region
        b"40,50,12,6,0,11,0,0\r\n"  # "others"
        b"-4,60,9,9,1,1,1,2\r\n"  # over the edge, truncated, heavily occluded
        b"50,90,7,0,1,4,0,0\r\n"  # no height, as the distribution has three
        b"60,20,5,5,0,2,0,0\r\n"  # an object to be ignored
        b"90,120,30,30,0,0,0,0\r\n\r\n"  # a region over the corner, a blank line
    )


FORMAT = Format("visdrone", find, read, write, samples)
