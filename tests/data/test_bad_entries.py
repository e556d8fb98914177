"""Damage of every kind, in every format: named by file, line and reason, and nothing is written."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from dr2net_d2.data import DatasetError, load_coco
from dr2net_d2.data.conversion import convert_from, convert_to_coco
from dr2net_d2.data.formats import FORMATS, BadEntries, find_layout
from dr2net_d2.data.formats.base import MAX_LISTED

SPLIT = {"yolo": "train", "voc": "train"}


def line(number, text):
    """Replace a line of a file, keeping the number of lines."""

    def change(file):
        rows = file.read_text().split("\n")
        rows[number - 1] = text
        file.write_text("\n".join(rows))

    return change


def swap(old, new):
    def change(file):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


def row(table, index, **values):
    """Change a row of a JSON; a value of None removes the key."""

    def change(file):
        document = json.loads(file.read_text())
        for key, value in values.items():
            document[table][index].pop(key, None)
            if value is not None:
                document[table][index][key] = value
        file.write_text(json.dumps(document))

    return change


def top(**values):
    def change(file):
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def content(data):
    return lambda file: file.write_bytes(data)


def picture(width, height):
    data = cv2.imencode(".png", np.zeros((height, width, 3), np.uint8))[1].tobytes()
    return lambda file: file.write_bytes(data)


def gone(file):
    file.unlink()


V = "VisDrone2019-DET-val/annotations/0000001.txt"
VI = "VisDrone2019-DET-val/images/0000001.jpg"
D, DI = "train/labelTxt-v1.5/0000001.txt", "train/images/0000001.png"
Y, YI = "labels/train/day/0000001.txt", "images/train/day/0000001.png"
X = "Annotations/0000001.xml"
A, T = "annotations/aitod_train.json", "annotations/tiny_set_train.json"
C = "annotations.json"
GOOD = "10,10,5,5,1,4,0,0"

DAMAGE = [
    # format, what is damaged, how; where it is said to be (the file unless told), reason
    ("visdrone", V, line(2, "10,10,5,5,1,4,0"), 2, "7 values; a line is x,y,width"),
    ("visdrone", V, line(2, "10 10 5 5 1 4 0 0"), 2, "1 values"),
    ("visdrone", V, line(1, "10,ten,5,5,1,4,0,0"), 1, "y is 'ten'; it must be a number"),
    ("visdrone", V, line(3, "10,nan,5,5,1,4,0,0"), 3, "is not finite"),
    ("visdrone", V, line(3, "10,10,-5,5,1,4,0,0"), 3, "has negative width or height"),
    ("visdrone", V, line(3, "500,10,5,5,1,4,0,0"), 3, "lies outside its image"),
    ("visdrone", V, line(3, "500,10,5,5,0,0,0,0"), 3, "lies outside its image"),
    ("visdrone", V, line(4, "10,10,5,5,1,12,0,0"), 4, "category is '12'; it must be 0 to 11"),
    ("visdrone", V, line(4, "10,10,5,5,0.9,4,0,0"), 4, "score is '0.9'; it must be 0 or 1"),
    ("visdrone", V, line(4, "10,10,5,5,1,4,2,0"), 4, "truncation is '2'; it must be 0 or 1"),
    ("visdrone", V, line(4, "10,10,5,5,1,4,0,3"), 4, "occlusion is '3'; it must be 0 to 2"),
    ("visdrone", V, line(1, "10,10,5,5,1,4,-1,-1"), 1, "as in files of results"),
    ("visdrone", V, content(f"{GOOD}\n{GOOD}\xff\n".encode("latin-1")), 2, "0xff is not UTF-8"),
    ("visdrone", V, gone, None, "no such file for image"),
    ("visdrone", VI, gone, (V, None), "no image"),
    ("visdrone", VI, content(b""), None, "0 bytes that are not a readable image"),
    ("visdrone", VI, content(b"<html>"), None, "6 bytes that are not a readable image"),
    ("visdrone", VI, lambda f: shutil.copy(f, f.with_suffix(".png")), (VI[:-3] + "png", None),
     "same stem"),
    ("dota", D, line(4, "1 2 3 4 5 6 7 8"), 4, "8 values; a line is x1 y1"),
    ("dota", D, line(4, "1 2 3 4 5 6 7 z plane 0"), 4, "a corner is 'z'; it must be a number"),
    ("dota", D, line(4, "1 2 3 4 5 6 7 8 ufo 0"), 4, "category 'ufo' is not one of DOTA 1.5"),
    ("dota", D, line(5, "1 2 3 4 5 6 7 8 helipad 0"), 5, "must be named labelTxt-v<version>"),
    ("dota", D, line(5, "1 2 3 4 5 6 7 8 plane yes"), 5, "difficult is 'yes'; it must be 0 to 2"),
    ("dota", D, line(5, "-9 2 -8 2 -8 9 -9 9 plane 0"), 5, "lies outside its image"),
    ("dota", D, line(5, "1 2 inf 2 3 9 1 9 plane 0"), 5, "is not finite"),
    ("dota", D, gone, None, "no such file for image"),
    ("dota", DI, gone, (D, None), "no image"),
    ("yolo", Y, line(1, "0 0.5 0.5 0.1"), 1, "4 values; a line is 'class cx cy w h'"),
    ("yolo", Y, line(2, "0 0.5 0.5 0.1 0.1 0.9"), 2, "6 values"),
    ("yolo", Y, line(2, "2 0.5 0.5 0.1 0.1"), 2, "class is '2'; it must be 0 or 1"),
    ("yolo", Y, line(2, "person 0.5 0.5 0.1 0.1"), 2, "class is 'person'"),
    ("yolo", Y, line(2, "1.0 0.5 0.5 0.1 0.1"), 2, "class is '1.0'"),
    ("yolo", Y, line(3, "0 50 60 10 12"), 3, "coordinate 50; they must be fractions"),
    ("yolo", Y, line(3, "0 0.5 -0.5 0.1 0.1"), 3, "coordinate -0.5; they must be fractions"),
    ("yolo", Y, line(3, "0 0.5 nan 0.1 0.1"), 3, "coordinate nan"),
    ("yolo", Y, line(3, "0 0.5 0_5 0.1 0.1"), 3, "a coordinate is '0_5'; it must be a number"),
    ("yolo", YI, gone, (Y, None), "no image"),
    ("yolo", "data.yaml", swap("names:\n", "names: person\n  "), 6, "no YAML: mapping values"),
    ("yolo", "data.yaml", lambda f: f.write_text("train: images\nnames: a\n"), 2,
     "names is 'a'; it must be a list"),
    ("yolo", "data.yaml", line(6, "  1: person"), 5, "names is {1: 'traffic light'}; it must be"),
    ("yolo", "data.yaml", line(4, "nc: 3"), 4, "nc is 3 but there are 2 names"),
    ("yolo", "data.yaml", line(4, "kpt_shape: [17, 3]"), 4, "the labels are poses"),
    ("yolo", "data.yaml", line(2, "train: nowhere"), 2, "train is 'nowhere', but there is no"),
    ("voc", X, line(3, "\t<filename>a.jpg"), 57, "tag, while <filename> of line 3 is open"),
    ("voc", X, content(b""), 1, "not well-formed XML: no element found"),
    ("voc", X, content(b"\n<root/>"), 2, "is <root>, not <annotation>"),
    ("voc", X, swap("<width>160<", "<width>16<"), 4, "size is 16 x 120 but"),
    ("voc", X, swap("<name>aeroplane<", "<name><"), 10, "name is '', not one of"),
    ("voc", X, swap("<name>aeroplane</name>", ""), 9, "no <name>; correct it"),
    ("voc", X, swap("bndbox>", "box><bndbox>"), 20, "mismatched tag, while <box> of line 11"),
    ("voc", X, swap("<xmax>", "<xmin>1</xmin></bndbox><bndbox><xmax>"), 11, "no <xmax> in"),
    ("voc", X, swap("<difficult>0", "<difficult>2"), 19, "difficult is '2'; it must be 0 or 1"),
    ("voc", X, swap("<name>aeroplane</name>", "<name>bird</name></object><object>"
                    "<name>bird</name></object><object>"), 9, "no <bndbox> in this <object>"),
    ("voc", "ImageSets/Main/train.txt", line(2, "0000009"), 2, "no file"),
    ("voc", "JPEGImages/0000001.jpg", gone, (X, 3), "no image"),
    ("coco", C, row("annotations", 1, bbox=[1, 2, 3]), "annotation 7", "bbox is [1, 2, 3]; it"),
    ("coco", C, row("annotations", 1, bbox=[1, 2, -3, 4]), "annotation 7", "negative width"),
    ("coco", C, row("annotations", 1, bbox=None), "annotation 7", "missing bbox"),
    ("coco", C, row("annotations", 1, id=8), "annotation 8", "this id occurs twice"),
    ("coco", C, row("annotations", 1, image_id=99), "annotation 7", "image_id 99 is not an id"),
    ("coco", C, row("annotations", 1, category_id=99), "annotation 7", "category_id 99 is not"),
    ("coco", C, row("annotations", 1, iscrowd=7), "annotation 7", "iscrowd is 7; it must be"),
    ("coco", C, row("images", 1, height=0), "image 2", "height is 0; it must be a positive"),
    ("coco", C, row("images", 1, width=96), "image 2", "width and height are 96 x 133 but"),
    ("coco", C, row("images", 1, file_name="no.png"), ("no.png", None), "No such file"),
    ("coco", C, row("ignore_regions", 0, image_id=8), "ignore region 7", "image_id 8 is not an"),
    ("coco", C, row("ignore_regions", 0, bbox=[0, 0, 1e99, 1]), "ignore region 7", "not finite"),
    ("coco", C, top(ignore_regions=5), None, '"ignore_regions" is 5; it must be a list'),
    ("coco", C, top(categories={}), None, 'key "categories" is missing or no list'),
    ("coco", C, lambda f: f.write_bytes(f.read_bytes()[:-30]), None, "not JSON, or cut short"),
    ("coco", "images/0000002.png", picture(133, 97), (C, "image 2"), "is 133 x 97 px"),
    ("aitod", A, row("categories", 0, name="car"), None, "AI-TOD has airplane"),
    ("aitod", A, row("annotations", 4, bbox=[900, 9, 9, 9]), "annotation 5", "lies outside its"),
    ("tinyperson", T, row("annotations", 4, uncertain="no"), "annotation 4", "uncertain is 'no'"),
    ("tinyperson", T, row("images", 1, corner=[0, 0, 640, 512]), None, 'image 1 has a "corner"'),
]  # fmt: skip


def test_there_are_forty_kinds_and_all_formats():
    assert len(DAMAGE) >= 40 and {entry[0] for entry in DAMAGE} == {*FORMATS}


@pytest.fixture
def damaged(tmp_path):
    def make(name, path, change):
        folder = tmp_path / "original"
        folder.mkdir()
        FORMATS[name].write_sample(folder)
        found, layout = find_layout(folder, split=SPLIT.get(name))
        change(folder / path)
        return folder, found, layout

    return make


@pytest.mark.parametrize(("name", "path", "change", "place", "reason"), DAMAGE)
def test_damage_is_named_and_nothing_is_written(
    damaged, tmp_path, name, path, change, place, reason
):
    folder, found, layout = damaged(name, path, change)
    path, place = place if isinstance(place, tuple) else (path, place)
    end = "" if place is None else f" {place}:" if isinstance(place, str) else f"{place}:"
    where = f"{folder / path}:{end} "
    out = tmp_path / "out"
    for convert, target in (
        (lambda: convert_to_coco(found, layout, out / "set.json", out), "set.json"),
        (lambda: convert_from(found, layout, FORMATS[name], out / "copy"), "copy"),
    ):
        with pytest.raises(DatasetError) as caught:
            convert()
        message = str(caught.value)
        assert where in message and reason in message.partition(where)[2], message
        assert "\n" not in message
        assert not (out / target).exists() and [*out.iterdir()] == []


@pytest.mark.parametrize("name", FORMATS)
def test_the_rest_can_be_converted(damaged, tmp_path, name):
    """One bad entry, and what is left out is it alone."""
    damage = {
        "visdrone": (V, line(2, "x"), 1),
        "dota": (D, line(4, "x"), 1),
        "yolo": (Y, line(2, "x"), 1),
        "voc": (X, swap("<ymin>", "<ymin>x"), 1),
        "coco": (C, row("annotations", 1, bbox=[1, 2, 3]), 1),
        "aitod": (A, row("annotations", 4, bbox=None), 1),
        "tinyperson": (T, row("annotations", 4, uncertain="no"), 1),
    }
    folder, found, layout = damaged(name, damage[name][0], lambda file: None)
    whole, _ = convert_to_coco(found, layout, tmp_path / "whole.json", tmp_path)
    damage[name][1](folder / damage[name][0])
    rest, bad = convert_to_coco(found, layout, tmp_path / "rest.json", tmp_path, skip_bad=True)
    assert bad.count == 1
    counts = [sum(len(r.boxes) for r in dataset.records) for dataset in (whole, rest)]
    assert counts[1] == counts[0] - 1
    assert len(load_coco(tmp_path / "rest.json", tmp_path).records) == len(whole.records)


def test_an_image_that_cannot_be_read_is_left_out_with_its_objects(damaged, tmp_path):
    _, found, layout = damaged("visdrone", VI, content(b"x"))
    dataset, bad = convert_to_coco(found, layout, tmp_path / "a.json", tmp_path, skip_bad=True)
    assert [Path(r.file_name).stem for r in dataset.records] == ["0000002", "0000003"]
    assert bad.count == 1


def test_all_are_counted_and_the_first_are_listed(damaged, tmp_path, caplog):
    caplog.set_level("INFO")
    _, found, layout = damaged("visdrone", V, lambda f: f.write_text("x\n" * 50 + GOOD))
    with pytest.raises(DatasetError, match=r"50 bad entries, nothing is written.* and 49 more"):
        convert_to_coco(found, layout, tmp_path / "a.json", tmp_path)
    named = [text for text in caplog.messages if text.startswith("bad entry: ")]
    assert len(named) == MAX_LISTED
    assert [f"0000001.txt:{n}: " in text for n, text in enumerate(named, 1)] == [True] * MAX_LISTED


def test_nothing_left_is_no_dataset(damaged, tmp_path):
    folder, found, layout = damaged("coco", C, row("images", 0, width=-1))
    for index in (1, 2):
        row("images", index, width=-1)(folder / C)
    row("ignore_regions", 0, image_id=4)(folder / C)
    with pytest.raises(DatasetError, match=r'annotations.json: "images" is empty'):
        convert_to_coco(found, layout, tmp_path / "a.json", tmp_path, skip_bad=True)
    assert not (tmp_path / "a.json").exists()


def test_an_interrupt_leaves_the_old_file(damaged, tmp_path, monkeypatch):
    _, found, layout = damaged("visdrone", V, lambda file: None)
    target = tmp_path / "out" / "a.json"
    target.parent.mkdir()
    target.write_text("old")
    monkeypatch.setattr("dr2net_d2.data.conversion.load_coco", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_to_coco(found, layout, target, tmp_path)
    assert [path.name for path in target.parent.iterdir()] == ["a.json"]
    assert target.read_text() == "old"


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_place_that_cannot_be_written_is_told(damaged, tmp_path):
    _, found, layout = damaged("visdrone", V, lambda file: None)
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="cannot be written"):
        convert_to_coco(found, layout, tmp_path / "file" / "a.json", tmp_path)
    with pytest.raises(DatasetError, match="exists already; name a new folder"):
        convert_from(found, layout, FORMATS["yolo"], tmp_path / "file")


@pytest.mark.parametrize("text", [b"", b"a\nb\na\n", b"\xff\n"])
def test_a_list_of_classes_that_is_none(damaged, tmp_path, text):
    folder, found, layout = damaged("voc", "classes.txt", content(text))
    with pytest.raises(DatasetError, match=r"classes\.txt: (no name|'utf-8')"):
        convert_to_coco(found, layout, tmp_path / "a.json", tmp_path)
    shutil.copytree(folder / "JPEGImages", folder / "images")
    (folder / "labels").mkdir()
    with pytest.raises(DatasetError, match=r"classes\.txt: (no name|'utf-8')"):
        FORMATS["yolo"].read(find_layout(folder, "yolo")[1], BadEntries())


def test_bad_entries_are_kept_small():
    bad = BadEntries()
    for number in range(1000):
        bad.add(Path("a.txt"), number, "x")
    assert bad.count == 1000 and len(bad.listed) == MAX_LISTED
    assert bad.listed[3] == "a.txt:3: x" and os.sep not in bad.listed[3]
