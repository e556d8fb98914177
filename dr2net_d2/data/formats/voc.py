"""Pascal VOC: Annotations/*.xml, JPEGImages/, and the parts in ImageSets/Main/*.txt.

Corners count pixels from 1 and belong to the box. Difficult objects are to be ignored, as in VOC's
own evaluation. The categories are VOC's twenty; or those of classes.txt in the folder; or, where
neither fits, all that occur, by name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

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
    parse_lines,
    read_names,
    usable,
)
from dr2net_d2.data.formats.samples import sample_source
from dr2net_d2.data.formats.writing import copy_image, left_out
from dr2net_d2.data.formats.xml import Element, XmlError, read_xml
from dr2net_d2.data.image_size import SUFFIXES

CATEGORIES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find(path: Path) -> dict[str, Layout]:
    """A part is a list in ImageSets/Main; everything, where there is none or a flat folder."""
    annotations = first_folder(path / "Annotations", path)
    if not next(annotations.glob("*.xml"), None):
        return {}
    images = first_folder(path / "JPEGImages", path / "images", annotations)
    parts = [path / "ImageSets" / "Main" / f"{p}.txt" for p in ("train", "val", "trainval", "test")]
    found = {p.stem: Layout(annotations, images, p, p.stem) for p in parts if p.is_file()}
    return found or {"": Layout(annotations, images)}


def read(layout: Layout, bad: BadEntries) -> Source:
    files = _files(layout, bad)
    names = _categories(layout, files)
    return Source(named(names), len(files), _images(files, layout, names, bad))


def _files(layout: Layout, bad: BadEntries) -> list[Path]:
    if layout.listing is None:
        return sorted(layout.annotations.glob("*.xml"))
    files = []
    for line, text in parse_lines(layout.listing, bad, str):
        file = layout.annotations / f"{text.split()[0]}.xml"
        if file.is_file():
            files.append(file)
        else:
            bad.add(layout.listing, line, f"no file {file}; add it or delete the line")
    return files


def _categories(layout: Layout, files: list[Path]) -> list[str]:
    listed = layout.annotations.parent / "classes.txt"
    if listed.is_file():
        return read_names(listed)
    found = set()
    for file in files:
        try:
            found |= {child.find("name").text for child in read_xml(file).all("object")}
        except (OSError, XmlError):  # reported when its objects are read
            continue
    found.discard("")
    return [*CATEGORIES] if found <= {*CATEGORIES} else sorted(found)


def _images(
    files: list[Path], layout: Layout, names: list[str], bad: BadEntries
) -> Iterator[Labelled]:
    places = {name: place for place, name in enumerate(names, start=1)}
    for file in files:
        try:
            root = read_xml(file)
            if root.tag != "annotation":
                raise XmlError(
                    root.line, f"the outermost element is <{root.tag}>, not <annotation>"
                )
            image_file = _image_file(root, file, layout.images)
        except XmlError as error:
            bad.add(file, error.line, f"{error}; correct it or restore the file")
            continue
        except OSError as error:
            bad.add(file, None, f"{error.strerror}; restore the file")
            continue
        size = measured(image_file, bad)
        if size is None:
            continue
        if problem := _size_problem(root, size, image_file):
            bad.add(file, root.find("size").line, problem)
            continue
        rows = []
        for element in root.all("object"):
            try:
                rows.append((element.line, _object(element, places)))
            except XmlError as error:
                bad.add(file, error.line, error)
        attributes = {"xml": root.as_json("object")}
        name = image_file.relative_to(layout.images).as_posix()
        yield Labelled(
            image_file, name, *size, usable(rows, size, file, bad), attributes=attributes
        )


def _image_file(root: Element, file: Path, images: Path) -> Path:
    """The image by <filename>, or, where that is wrong or has no ending, by the XML's name."""
    name = root.find("filename").text
    candidates = [images / f"{file.stem}{suffix}" for suffix in SUFFIXES]
    if name and "/" not in name:
        candidates.insert(0, images / name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise XmlError(root.find("filename").line or root.line, f"no image {candidates[0]}")


def _size_problem(root: Element, size: tuple[int, int], image: Path) -> str:
    """Some writers put 0 x 0 where they do not know the size; any other has to be right."""
    said = tuple(root.find("size").find(side).text for side in ("width", "height"))
    if said in (("", ""), ("0", "0")) or said == tuple(map(str, size)):
        return ""
    return (
        f"size is {' x '.join(said)} but {image} is {size[0]} x {size[1]} px; correct it"
        " (EXIF rotation counts)"
    )


def _object(element: Element, places: dict[str, int]) -> Row:
    name, box = element.find("name"), element.find("bndbox")
    if name.text not in places:
        said = (
            f"name is {name.text!r}, not one of {', '.join(places)}" if name.line else "no <name>"
        )
        raise XmlError(name.line or element.line, f"{said}; correct it")
    if not box.line:
        raise XmlError(element.line, "no <bndbox> in this <object>; add it")
    corners = []
    for tag in _CORNERS:
        corner = box.find(tag)
        if not corner.line:
            raise XmlError(box.line, f"no <{tag}> in <bndbox>; add it")
        try:
            corners.append(number(corner.text, tag))
        except ValueError as error:
            raise XmlError(corner.line, str(error)) from None
    difficult = element.find("difficult")
    try:
        crowd = one_of(difficult.text or "0", "difficult", (0, 1))
    except ValueError as error:
        raise XmlError(difficult.line, str(error)) from None
    x0, y0, x1, y1 = corners
    return {
        "category_id": places[name.text],
        "bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
        "iscrowd": crowd,
        "attributes": element.as_json("name", "bndbox"),
    }


def write(source: Source, folder: Path) -> list[str]:
    names = source.category_names()
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    stems, regions = [], 0
    for image in source.images:
        regions += len(image.ignore_regions)
        copied = copy_image(image, folder / "JPEGImages")
        objects = [_object_xml(row, names[row["category_id"]]) for row in image.annotations]
        known: dict[str, Any] = {"folder": "JPEGImages", "filename": copied.name}
        known |= {"size": {"width": str(image.width), "height": str(image.height), "depth": "3"}}
        known |= image.attributes.get("xml", {})
        text = _xml("annotation", known, 0, "".join(objects))
        (folder / "Annotations" / f"{copied.stem}.xml").write_text(text)
        stems.append(copied.stem)
    (folder / "ImageSets/Main/train.txt").write_text("".join(f"{stem}\n" for stem in stems))
    if {*names.values()} != {*CATEGORIES}:
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names.values()))
    return left_out(ignore_regions=regions)


def _object_xml(row: Row, name: str) -> str:
    x, y, w, h = row["bbox"]
    # Rounded: 45.7 - 1 + 1 is not 45.7.
    corners = {
        tag: str(round(value, 9))
        for tag, value in zip(_CORNERS, (x + 1, y + 1, x + w, y + h), strict=True)
    }
    known = attributes_of(row)
    if row.get("iscrowd") and "difficult" not in known:
        known = {**known, "difficult": "1"}
    return _xml("object", {"name": name, "bndbox": corners, **known}, 1)


def _xml(tag: str, content: Any, depth: int, inner: str = "") -> str:
    """The reverse of ``Element.as_json``: an element on lines of its own."""
    indent = "\t" * depth
    if isinstance(content, list):
        return "".join(_xml(tag, part, depth) for part in content)
    if not isinstance(content, dict):
        return f"{indent}<{tag}>{escape(str(content))}</{tag}>\n"
    marks = "".join(f" {k[1:]}={quoteattr(v)}" for k, v in content.items() if k[0] == "@")
    if "#" in content:
        return f"{indent}<{tag}{marks}>{escape(content['#'])}</{tag}>\n"
    parts = [_xml(k, v, depth + 1) for k, v in content.items() if k[0] != "@"]
    return f"{indent}<{tag}{marks}>\n{''.join(parts)}{inner}{indent}</{tag}>\n"


def samples(folder: Path) -> None:
    """Boxes with fractions and without "difficult", parts, a size of 0, a name without ending."""
    with tempfile.TemporaryDirectory() as drawn:
        source = sample_source(Path(drawn), [*CATEGORIES])
        for image in source.images:
            for row in image.annotations:
                row["attributes"] = {"pose": "Left", "truncated": "0", "difficult": "0"}
        write(source, folder)
    (folder / "Annotations" / "0000002.xml").write_text(
        '<annotation verified="yes">\n'
        "\t<folder>VOC2012</folder>\n\t<filename>0000002</filename>\n"
        "\t<source><database>R &amp; D</database><image>flickr</image></source>\n"
        "\t<size><width>0</width><height>0</height><depth>3</depth></size>\n"
        "\t<segmented>0</segmented>\n"
        "\t<object>\n\t\t<name>person</name>\n\t\t<actions><jumping>1</jumping></actions>\n"
        "\t\t<bndbox><xmax>60.5</xmax><xmin>1</xmin><ymax>133</ymax><ymin>10.25</ymin></bndbox>\n"
        "\t\t<part><name>head</name><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>9</xmax>"
        "<ymax>20</ymax></bndbox></part>\n"
        "\t\t<part><name>foot</name><bndbox><xmin>2</xmin><ymin>90</ymin><xmax>9</xmax>"
        "<ymax>99</ymax></bndbox></part>\n\t</object>\n"
        "\t<object>\n\t\t<name>dog</name>\n\t\t<difficult>1</difficult>\n"
        "\t\t<bndbox><xmin>97</xmin><ymin>133</ymin><xmax>97</xmax><ymax>133</ymax></bndbox>\n"
        "\t</object>\n</annotation>\n"
    )
    (folder / "ImageSets" / "Main" / "val.txt").write_text("0000002\n")


FORMAT = Format("voc", find, read, write, samples)
