"""Pascal VOC: Annotations/*.xml, JPEGImages/, and the splits in ImageSets/Main/*.txt.

Corners are pixels counted from 1 and belong to the box. Difficult objects are to be ignored, as in
VOC's own evaluation. The categories are those of classes.txt in the folder, if it exists; otherwise
VOC's twenty; or, if other names occur, all names that occur, sorted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

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
    parse_choice,
    parse_lines,
    parse_number,
    read_class_names,
    usable_rows,
)
from dr2net_d2.data.formats.samples import drawn_dataset
from dr2net_d2.data.formats.writing import copy_image, describe_losses
from dr2net_d2.data.formats.xml import Element, XmlError, read_xml
from dr2net_d2.data.image_size import SUFFIXES

CATEGORIES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_SPLITS = ("train", "val", "trainval", "test")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class PascalVoc(DatasetFormat):
    name = "voc"

    def find(self, path: Path) -> dict[str, Layout]:
        """A split is a list in ImageSets/Main; without one, all XML files are a single split."""
        annotations = first_folder(path / "Annotations", path)
        if not next(annotations.glob("*.xml"), None):
            return {}
        images = first_folder(path / "JPEGImages", path / "images", annotations)
        layouts = {}
        for split in _SPLITS:
            listing = path / "ImageSets" / "Main" / f"{split}.txt"
            if listing.is_file():
                layouts[split] = Layout(annotations, images, listing, split)
        return layouts or {"": Layout(annotations, images)}

    def read(self, layout: Layout, bad: BadEntries) -> LabelledDataset:
        files = _annotation_files(layout, bad)
        names = _category_names(layout, files)
        images = _read_images(files, layout, names, bad)
        return LabelledDataset(category_rows(names), len(files), images)

    def write(self, dataset: LabelledDataset, folder: Path) -> list[str]:
        names = dataset.category_names()
        (folder / "Annotations").mkdir()
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        stems, regions = [], 0
        for image in dataset.images:
            regions += len(image.ignore_regions)
            copied = copy_image(image, folder / "JPEGImages")
            stems.append(copied.stem)
            size = {"width": str(image.width), "height": str(image.height), "depth": "3"}
            content = {"folder": "JPEGImages", "filename": copied.name, "size": size}
            content |= image.attributes.get("xml", {})
            objects = [_format_object(row, names[row["category_id"]]) for row in image.annotations]
            text = _format_xml("annotation", content, 0, "".join(objects))
            (folder / "Annotations" / f"{copied.stem}.xml").write_text(text)
        (folder / "ImageSets/Main/train.txt").write_text("".join(f"{stem}\n" for stem in stems))
        if {*names.values()} != {*CATEGORIES}:
            (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names.values()))
        return describe_losses({"ignore regions": regions})

    def write_sample(self, folder: Path) -> None:
        """Fractions of a pixel, no "difficult", body parts, a size of 0, a name with no suffix."""
        with drawn_dataset(CATEGORIES) as dataset:
            for image in dataset.images:
                for row in image.annotations:
                    row["attributes"] = {"pose": "Left", "truncated": "0", "difficult": "0"}
            self.write(dataset, folder)
        (folder / "Annotations" / "0000002.xml").write_text(
            '<annotation verified="yes">\n'
            "\t<folder>VOC2012</folder>\n\t<filename>0000002</filename>\n"
            "\t<source><database>R &amp; D</database><image>flickr</image></source>\n"
            "\t<size><width>0</width><height>0</height><depth>3</depth></size>\n"
            "\t<segmented>0</segmented>\n"
            "\t<object>\n\t\t<name>person</name>\n\t\t<actions><jumping>1</jumping></actions>\n"
            "\t\t<bndbox><xmax>60.5</xmax><xmin>1</xmin><ymax>133</ymax><ymin>10.25</ymin>"
            "</bndbox>\n"
            "\t\t<part><name>head</name><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>9</xmax>"
            "<ymax>20</ymax></bndbox></part>\n"
            "\t\t<part><name>foot</name><bndbox><xmin>2</xmin><ymin>90</ymin><xmax>9</xmax>"
            "<ymax>99</ymax></bndbox></part>\n\t</object>\n"
            "\t<object>\n\t\t<name>dog</name>\n\t\t<difficult>1</difficult>\n"
            "\t\t<bndbox><xmin>97</xmin><ymin>133</ymin><xmax>97</xmax><ymax>133</ymax></bndbox>\n"
            "\t</object>\n</annotation>\n"
        )
        (folder / "ImageSets" / "Main" / "val.txt").write_text("0000002\n")


def _annotation_files(layout: Layout, bad: BadEntries) -> list[Path]:
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


def _category_names(layout: Layout, files: list[Path]) -> list[str]:
    listing = layout.annotations.parent / "classes.txt"
    if listing.is_file():
        return read_class_names(listing)
    names = set()
    for file in files:
        try:
            names |= {child.find("name").text for child in read_xml(file).all("object")}
        except (OSError, XmlError):  # reported when the objects of the file are read
            continue
    names.discard("")
    return [*CATEGORIES] if names <= {*CATEGORIES} else sorted(names)


def _read_images(
    files: list[Path], layout: Layout, names: list[str], bad: BadEntries
) -> Iterator[LabelledImage]:
    category_ids = {name: index for index, name in enumerate(names, start=1)}
    for file in files:
        try:
            root = _read_annotation(file)
            image_file = _image_file(root, file, layout.images)
        except XmlError as error:
            bad.add(file, error.line, f"{error}; correct it or restore the file")
            continue
        except OSError as error:
            bad.add(file, None, f"{error.strerror}; restore the file")
            continue
        size = measure_image(image_file, bad)
        if size is None:
            continue
        if problem := _size_problem(root, size, image_file):
            bad.add(file, root.find("size").line, problem)
            continue
        rows = []
        for element in root.all("object"):
            try:
                rows.append((element.line, _parse_object(element, category_ids)))
            except XmlError as error:
                bad.add(file, error.line, error)
        yield LabelledImage(
            image_file,
            image_file.relative_to(layout.images).as_posix(),
            *size,
            usable_rows(rows, size, file, bad),
            attributes={"xml": root.as_json("object")},
        )


def _read_annotation(file: Path) -> Element:
    root = read_xml(file)
    if root.tag != "annotation":
        raise XmlError(root.line, f"the outermost element is <{root.tag}>, not <annotation>")
    return root


def _image_file(root: Element, file: Path, images: Path) -> Path:
    """The image that <filename> names; if that is missing or wrong, the one with the XML's stem."""
    name = root.find("filename").text
    candidates = [images / f"{file.stem}{suffix}" for suffix in SUFFIXES]
    if name and "/" not in name:
        candidates.insert(0, images / name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise XmlError(root.find("filename").line or root.line, f"no image {candidates[0]}")


def _size_problem(root: Element, size: tuple[int, int], image: Path) -> str:
    """What is wrong with <size>, or ""; some writers put 0 x 0 if they do not know the size."""
    stated = tuple(root.find("size").find(side).text for side in ("width", "height"))
    if stated in (("", ""), ("0", "0")) or stated == tuple(map(str, size)):
        return ""
    return (
        f"size is {' x '.join(stated)} but {image} is {size[0]} x {size[1]} px; correct it"
        " (EXIF rotation counts)"
    )


def _parse_object(element: Element, category_ids: dict[str, int]) -> Row:
    name, box = element.find("name"), element.find("bndbox")
    if not name.line:
        raise XmlError(element.line, "no <name>; correct it")
    if name.text not in category_ids:
        known = ", ".join(category_ids)
        raise XmlError(name.line, f"name is {name.text!r}, not one of {known}; correct it")
    if not box.line:
        raise XmlError(element.line, "no <bndbox> in this <object>; add it")
    x0, y0, x1, y1 = (_parse_corner(box, tag) for tag in _CORNERS)
    difficult = element.find("difficult")
    try:
        crowd = parse_choice(difficult.text or "0", "difficult", (0, 1))
    except ValueError as error:
        raise XmlError(difficult.line, str(error)) from None
    return {
        "category_id": category_ids[name.text],
        "bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
        "iscrowd": crowd,
        "attributes": element.as_json("name", "bndbox"),
    }


def _parse_corner(box: Element, tag: str) -> float:
    corner = box.find(tag)
    if not corner.line:
        raise XmlError(box.line, f"no <{tag}> in <bndbox>; add it")
    try:
        return parse_number(corner.text, tag)
    except ValueError as error:
        raise XmlError(corner.line, str(error)) from None


def _format_object(row: Row, name: str) -> str:
    x, y, w, h = row["bbox"]
    # Rounded, because 45.7 - 1 + 1 is not 45.7 in floating point.
    corners = {
        tag: str(round(value, 9))
        for tag, value in zip(_CORNERS, (x + 1, y + 1, x + w, y + h), strict=True)
    }
    attributes = attributes_of(row)
    if row.get("iscrowd") and "difficult" not in attributes:
        attributes = {**attributes, "difficult": "1"}
    return _format_xml("object", {"name": name, "bndbox": corners, **attributes}, 1)


def _format_xml(tag: str, content: Any, depth: int, inner: str = "") -> str:
    """Undo ``Element.as_json``: an element on lines of its own.

    Args:
        tag: its name.
        content: what ``as_json`` returned.
        depth: number of elements around it, which is its indentation in tabs.
        inner: XML to put behind its children.
    """
    indent = "\t" * depth
    if isinstance(content, list):
        return "".join(_format_xml(tag, item, depth) for item in content)
    if not isinstance(content, dict):
        return f"{indent}<{tag}>{escape(str(content))}</{tag}>\n"
    attributes = "".join(f" {k[1:]}={quoteattr(v)}" for k, v in content.items() if k[0] == "@")
    if "#" in content:
        return f"{indent}<{tag}{attributes}>{escape(content['#'])}</{tag}>\n"
    children = [_format_xml(k, v, depth + 1) for k, v in content.items() if k[0] != "@"]
    return f"{indent}<{tag}{attributes}>\n{''.join(children)}{inner}{indent}</{tag}>\n"
