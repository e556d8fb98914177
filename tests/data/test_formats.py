"""Every format: what its samples must read as, by hand, and back to what they were."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from pycocotools.coco import COCO

from dr2net_d2.data import DatasetError, load_coco
from dr2net_d2.data.conversion import convert_from, convert_to_coco
from dr2net_d2.data.formats import FORMATS, BadEntries, find_layout
from dr2net_d2.data.formats.base import LabelledImage
from dr2net_d2.data.formats.yolo import _format_line, _parse_line

SPLIT = {"yolo": "train", "voc": "train"}
COCO_FORMAT = FORMATS["coco"]


@pytest.fixture(scope="module", params=FORMATS)
def sample(request, tmp_path_factory):
    """(name of the format, its sample dataset, the COCO-format JSON made of it)."""
    name = request.param
    folder = tmp_path_factory.mktemp(name) / "original"
    folder.mkdir()
    FORMATS[name].write_sample(folder)
    found, layout = find_layout(folder, split=SPLIT.get(name))
    assert found.name == name
    json_file = folder.parent / "coco" / "out.json"
    convert_to_coco(found, layout, json_file, json_file.parent)
    return name, folder, json_file


def lines(file):
    return [line for line in file.read_text().splitlines() if line.strip()]


def visdrone_content(folder):
    return {f.name: [line.rstrip(",") for line in lines(f)] for f in folder.rglob("0*.txt")}


def dota_content(folder):
    def words(line):
        return [float(w) if re.fullmatch(r"[\d.]+", w) else w for w in line.split()]

    return {f.name: [words(line) for line in lines(f)] for f in folder.rglob("0*.txt")}


def yolo_content(folder):
    return {
        f.relative_to(folder).as_posix(): [[float(w) for w in row.split()] for row in lines(f)]
        for f in folder.rglob("0*.txt")
    }


def voc_content(folder):
    def tree(element):
        text = (element.text or "").strip()
        text = float(text) if re.fullmatch(r"[\d.]+", text) else text
        children = sorted((tree(child) for child in element), key=repr)
        return element.tag, tuple(sorted(element.attrib.items())), text, tuple(children)

    return {f.name: tree(ElementTree.parse(f).getroot()) for f in folder.rglob("0*.xml")}


def json_content(folder):
    (file,) = folder.rglob("*.json")
    document = json.loads(file.read_text())
    for table in ("images", "annotations"):
        document[table].sort(key=lambda row: row["id"])
    return document


def coco_content(folder):
    document = json_content(folder)
    for row in document["annotations"]:  # COCO has them in all rows, and so has what we write
        row.setdefault("area", row["bbox"][2] * row["bbox"][3])
        row.setdefault("iscrowd", 0)
    return document


CONTENT = {
    "visdrone": visdrone_content,
    "aitod": json_content,
    "tinyperson": json_content,
    "dota": dota_content,
    "yolo": yolo_content,
    "voc": voc_content,
    "coco": coco_content,
}


def test_nothing_is_lost_on_the_way_to_coco_and_back(sample, tmp_path):
    name, folder, json_file = sample
    found, layout = find_layout(json_file)
    assert found.name == "coco"
    left_out, bad = convert_from(COCO_FORMAT, layout, FORMATS[name], tmp_path / "back")
    assert (left_out, bad.count) == ([], 0)
    before, after = CONTENT[name](folder), CONTENT[name](tmp_path / "back")
    assert len(before) > 1
    if name == "yolo":
        assert before.keys() == after.keys()
        for file in before:
            for row, again in zip(before[file], after[file], strict=True):
                assert again == pytest.approx(row, abs=2e-12, rel=0)
    else:
        assert after == before
    for suffix in (".jpg", ".png"):
        pictures, copies = (
            {path.name: path.read_bytes() for path in place.rglob(f"*{suffix}")}
            for place in (folder, tmp_path / "back")
        )
        assert copies == pictures


def test_the_json_reads_the_same_in_pycocotools_and_in_the_loader(sample):
    _, _, json_file = sample
    truth, dataset = COCO(json_file), load_coco(json_file, json_file.parent)
    document = json.loads(json_file.read_text())
    assert not any("ignore" in row for row in document["annotations"])
    for record in dataset.records:
        assert Path(record.file_name).is_file()
        rows = [r for r in truth.imgToAnns[record.image_id] if min(r["bbox"][2:]) > 0]
        boxes = np.array([row["bbox"] for row in rows]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(record.boxes, boxes, rtol=1e-6, atol=1e-5)
        assert record.iscrowd.tolist() == [bool(row["iscrowd"]) for row in rows]
        regions = [
            [x, y, x + w, y + h]
            for x, y, w, h in (
                row["bbox"]
                for row in document.get("ignore_regions", ())
                if row["image_id"] == record.image_id
            )
        ]
        assert record.ignore_regions.tolist() == regions
        assert record.ignore_regions.dtype == np.float32
        assert record.ignore_regions.shape == (len(regions), 4)


def read(name, folder, split=None):
    """File name -> (size, rows of annotations, regions, attributes), and the categories."""
    found, layout = find_layout(folder, name, split)
    bad = BadEntries()
    source = found.read(layout, bad)
    listed = [*source.images]
    images = {image.file.name: image for image in listed}
    assert len(images) == len(listed) == source.count
    assert not bad.count, bad.listed
    return images, source.category_names()


@pytest.fixture
def written(tmp_path):
    def write(name):
        FORMATS[name].write_sample(tmp_path)
        return tmp_path

    return write


def test_visdrone_by_hand(written):
    images, names = read("visdrone", written("visdrone"))
    assert list(names.values())[3] == "car" and len(names) == 10
    image = images["0000002.jpg"]
    assert (image.width, image.height) == (97, 133)
    found = [(names[r["category_id"]], r["bbox"], r["iscrowd"]) for r in image.annotations]
    assert found == [
        ("car", [10, 10, 8, 9], 0),
        ("pedestrian", [-4, 60, 9, 9], 0),
        ("car", [50, 90, 7, 0], 0),
        ("people", [60, 20, 5, 5], 1),
    ]
    assert image.annotations[0]["attributes"] == {
        "score": 1, "truncation": 0, "occlusion": 1, "line": 1,
    }  # fmt: skip
    assert image.annotations[1]["attributes"]["occlusion"] == 2
    assert [r["bbox"] for r in image.ignore_regions] == [[0, 0, 30, 20], [90, 120, 30, 30]]
    assert [r["bbox"] for r in image.attributes["others"]] == [[40, 50, 12, 6]]
    assert images["0000003.jpg"].annotations == []


def test_dota_by_hand(written):
    images, names = read("dota", written("dota"))
    assert len(names) == 16  # version 1.5, by the name of its folder
    image = images["0000002.png"]
    assert image.attributes == {"imagesource": "GoogleEarth", "gsd": "null"}
    found = [(names[r["category_id"]], r["bbox"], r["iscrowd"]) for r in image.annotations]
    assert found == [
        ("plane", [10, 10, 30, 30], 0),
        ("ship", [50.5, 60, 20, 12.25], 1),
        ("small-vehicle", [80, 90, 24, 9], 0),
        ("helicopter", [5, 5, 0, 4], 0),
        ("container-crane", [40, 100, 20, 20], 1),
    ]
    assert image.annotations[0]["segmentation"] == [[10, 20, 30, 10, 40, 30, 20, 40]]


def test_yolo_by_hand(written):
    folder = written("yolo")
    images, names = read("yolo", folder, "train")
    assert names == {1: "person", 2: "traffic light"}
    assert images["0000003.png"].annotations == []
    boxes = [row["bbox"] for row in images["0000002.png"].annotations]
    width, height = 97, 133
    expected = [
        [(0.479297 - 0.205469 / 2) * width, (0.554861 - 0.093056 / 2) * height,
         0.205469 * width, 0.093056 * height],
        [0, 0, width, height],
        [-0.01 * width, 0.965 * height, 0.04 * width, 0.05 * height],
        [0.05 * width, 0.1 * height, 0.3 * width, 0.3 * height],
        [0.55 * width, 0.6 * height, 0.15 * width, 0.15 * height],
        [0.25 * width, 0.2 * height, 0, 0.1 * height],
    ]  # fmt: skip
    np.testing.assert_allclose(boxes, expected, atol=1e-9)
    assert list(read("yolo", folder, "val")[0]) == ["0000001.png", "0000002.png"]
    (folder / "data.yaml").unlink()
    (folder / "classes.txt").write_text("person\ntraffic light\n")
    assert read("yolo", folder)[1] == names
    assert len(read("yolo", folder)[0]) == 3


@pytest.mark.parametrize("names", ["[a, b]", "{0: a, 1: b}"])
def test_data_yaml_as_its_many_writers_have_it(written, names):
    folder = written("yolo")
    (folder / "list.txt").write_text("./images/train/0000003.png\nimages/train/day/0000001.png\n")
    (folder / "data.yaml").write_text(
        f"train: ../images/train/day\nval: list.txt\ntest: [images/train/day, list.txt]\nnc: 2\n"
        f"names: {names}\n"
    )
    counts = {"train": 2, "val": 2, "test": 3}
    for split, count in counts.items():
        images, found = read("yolo", folder / "data.yaml", split)
        assert (len(images), found) == (count, {1: "a", 2: "b"})
        assert FORMATS["yolo"].find(folder)[split].split == split


def test_voc_by_hand(written):
    folder = written("voc")
    images, names = read("voc", folder, "val")
    assert len(names) == 20 and names[15] == "person"
    (image,) = images.values()
    assert image.name == "0000002.jpg" and image.attributes["xml"]["@verified"] == "yes"
    person, dog = image.annotations
    assert (person["bbox"], person["iscrowd"]) == ([0, 9.25, 60.5, 123.75], 0)
    assert (dog["bbox"], dog["iscrowd"]) == ([96, 132, 1, 1], 1)  # the last pixel
    assert [part["name"] for part in person["attributes"]["part"]] == ["head", "foot"]
    (folder / "classes.txt").write_text("dog\nperson\n")
    assert read("voc", folder, "val")[1] == {1: "dog", 2: "person"}


def test_voc_categories_of_ones_own(written):
    folder = written("voc")
    file = folder / "Annotations" / "0000002.xml"
    file.write_text(file.read_text().replace(">dog<", ">zebra<"))
    assert list(read("voc", folder, "val")[1].values()) == ["person", "zebra"]


def test_aitod_by_hand(written):
    images, names = read("aitod", written("aitod"))
    assert names[8] == "wind-mill"
    rows = images["0000001.png"].annotations
    assert rows[1]["bbox"] == [12.5, 20.0, 3.25, 2.75] and rows[1]["area"] == 8.9375
    assert [row["iscrowd"] for row in rows] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert rows[2]["attributes"] == {"ignore": 1, "iscrowd": 0}


def test_tinyperson_by_hand(written):
    images, names = read("tinyperson", written("tinyperson"))
    assert names == {1: "person"}
    rows = images["0000001.jpg"].annotations
    # Flags count up in binary: ignore, uncertain, logo.
    assert [row["iscrowd"] for row in rows] == [0, 1, 1, 1, 1, 1]
    assert [row["attributes"]["category_id"] for row in rows] == [1, 2, 1, 2, 1, 2]
    assert rows[0]["id"] == 0


def test_coco_keeps_what_it_is_given(written):
    folder = written("coco")
    document = json.loads((folder / "annotations.json").read_text())
    document["annotations"][0]["ignore"] = 0
    document["annotations"][1]["ignore"] = 1
    (folder / "annotations.json").write_text(json.dumps(document))
    rows = read("coco", folder)[0]["0000002.png"].annotations
    assert [row["iscrowd"] for row in rows] == [1, 1, 0, 0]
    assert rows[1]["attributes"] == {"ignore": 1}
    assert rows[0]["segmentation"] == {"counts": "0", "size": [133, 97]}


@pytest.mark.parametrize("decimals", [2, 6, 12])
def test_yolo_fractions_come_back_digit_by_digit(tmp_path, decimals):
    rng = np.random.default_rng(decimals)
    for _ in range(500):
        size = tuple(rng.integers(1, 20000, 2).tolist())
        values = rng.random(4).round(decimals).tolist()
        row = _parse_line(" ".join(["3", *map(repr, values)]), 9, size)
        again = _format_line(row, 3, LabelledImage(Path(), "", *size)).split()
        assert [float(word) for word in again[1:]] == values


def test_another_format_says_what_it_cannot_hold(written, tmp_path_factory):
    out = tmp_path_factory.mktemp("other") / "yolo"
    visdrone = find_layout(written("visdrone"))
    left_out, _ = convert_from(*visdrone, FORMATS["yolo"], out)
    assert left_out == ["2 ignore regions", "1 objects to be ignored"]
    images, names = read("yolo", out, "train")
    assert names[4] == "car"
    np.testing.assert_allclose(images["0000002.jpg"].annotations[0]["bbox"], [10, 10, 8, 9])
    with pytest.raises(DatasetError, match=r"DOTA 2\.0 has no category 'awning-tricycle'"):
        convert_from(*visdrone, FORMATS["dota"], out.parent / "dota")
    assert [path.name for path in out.parent.iterdir()] == ["yolo"]


def test_ambiguous_and_unknown_places_are_refused(written, tmp_path):
    folder = written("yolo")
    with pytest.raises(DatasetError, match="has the splits train, val; choose one with --part"):
        find_layout(folder)
    with pytest.raises(DatasetError, match="no split 'test', only 'train', 'val'"):
        find_layout(folder, split="test")
    with pytest.raises(DatasetError, match="no such file or folder"):
        find_layout(folder / "nothing")
    with pytest.raises(DatasetError, match=r"not laid out as visdrone or .* or coco"):
        find_layout(folder / "images")
    (folder / "annotations").mkdir()
    (folder / "annotations" / "0000001.txt").touch()
    with pytest.raises(DatasetError, match="may be visdrone or yolo; choose one with --format"):
        find_layout(folder)


def test_dota_prefers_upright_boxes_and_names_versions(tmp_path):
    train = tmp_path / "train"
    (train / "images").mkdir(parents=True)
    for folder in ("labelTxt-v1.0/labelTxt", "labelTxt-v1.5/DOTA-v1.5_train",
                   "labelTxt-v1.5/DOTA-v1.5_train_hbb"):  # fmt: skip
        (train / folder).mkdir(parents=True)
        (train / folder / "P0001.txt").touch()
    found = FORMATS["dota"].find(tmp_path)
    assert {split: layout.annotations.name for split, layout in found.items()} == {
        "train_v1.0": "labelTxt",
        "train_v1.5": "DOTA-v1.5_train_hbb",
    }
