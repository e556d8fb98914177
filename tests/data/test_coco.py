"""COCO-format loading against pycocotools, and one line for every kind of damage."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from dr2net_d2.data import CocoRecord, DatasetError, load_coco, read_image

Document = dict[str, Any]
DOCUMENT: Document = {
    "images": [
        {"id": 7, "file_name": "b.png", "height": 40, "width": 60},
        {"id": 3, "file_name": "sub/a.png", "height": 30, "width": 20},
        {"id": 5, "file_name": "c.png", "height": 10, "width": 10},
    ],
    "annotations": [
        {"id": 11, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3.5, 4], "iscrowd": 0},
        {"id": 12, "image_id": 7, "category_id": 2, "bbox": [-5, 30, 70, 20], "iscrowd": 1},
        {"id": 13, "image_id": 3, "category_id": 4, "bbox": [0.25, 0, 19.75, 30]},
    ],
    "categories": [
        {"id": 9, "name": "van"},
        {"id": 2, "name": "car"},
        {"id": 4, "name": "bus"},
    ],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    rng = np.random.default_rng(0)
    for image in DOCUMENT["images"]:
        pixels = rng.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / image["file_name"]), pixels)
    (tmp_path / "set.json").write_text(json.dumps(DOCUMENT))
    return tmp_path


def write(root: Path, change: Callable[[Document], object]) -> Path:
    document = copy.deepcopy(DOCUMENT)
    change(document)
    (root / "set.json").write_text(json.dumps(document))
    return root / "set.json"


def refusal(json_file: Path, root: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        load_coco(json_file, root)
    message = str(caught.value)
    assert message.startswith(f"{json_file}: ")
    assert "\n" not in message
    return message.removeprefix(f"{json_file}: ")


def test_it_agrees_with_pycocotools(root: Path) -> None:
    dataset, truth = load_coco(root / "set.json", root), COCO(root / "set.json")
    assert dataset.categories == ("car", "bus", "van")
    assert dataset.category_ids == (2, 4, 9)
    assert dataset.dropped == 0
    assert [record.image_id for record in dataset.records] == [7, 3, 5]
    for record in dataset.records:
        image = truth.imgs[record.image_id]
        assert record.file_name == str(root / image["file_name"])
        assert (record.height, record.width) == (image["height"], image["width"])
        annotations = truth.imgToAnns[record.image_id]
        xywh = np.array([a["bbox"] for a in annotations], dtype=np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(record.boxes[:, :2], xywh[:, :2])
        np.testing.assert_array_equal(record.boxes[:, 2:], xywh[:, :2] + xywh[:, 2:])
        names = [truth.cats[a["category_id"]]["name"] for a in annotations]
        assert [dataset.categories[label] for label in record.labels] == names
        assert record.iscrowd.tolist() == [bool(a.get("iscrowd", 0)) for a in annotations]
        assert record.boxes.dtype == np.float32
        assert record.labels.dtype == np.int64
        assert record.boxes.shape == (len(annotations), 4)


def test_a_dataset_without_annotations_loads(root: Path) -> None:
    dataset = load_coco(write(root, lambda d: d.update(annotations=[])), root)
    assert [record.boxes.shape for record in dataset.records] == [(0, 4)] * 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps(DOCUMENT)[:-40], "cut short at"),
        ("", "cut short at 0 bytes"),
        ("images: []", "not JSON"),
        ("\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "the top level is [1, 2]"),
        ('{"images": []}', "key \"categories\" is missing, found ['images']"),
    ],
)
def test_a_file_that_is_no_coco_json_is_refused(root: Path, text: str, says: str) -> None:
    (root / "set.json").write_text(text, encoding="latin-1")
    assert says in refusal(root / "set.json", root)


def test_a_missing_json_is_refused(root: Path) -> None:
    assert "No such file" in refusal(root / "none.json", root)
    assert "directory" in refusal(root / "sub", root)


def test_a_missing_image_is_refused(root: Path) -> None:
    (root / "sub" / "a.png").unlink()
    assert refusal(root / "set.json", root).startswith("image 3: no file ")
    assert refusal(root / "set.json", root / "nowhere").startswith("image 7: no file ")


def put(table: str, position: int, **values: object) -> Callable[[Document], object]:
    return lambda document: document[table][position].update(values)


def take(table: str, position: int, key: str) -> Callable[[Document], object]:
    return lambda document: document[table][position].pop(key)


def box(*values: object) -> Callable[[Document], object]:
    return put("annotations", 2, bbox=list(values))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("images"), 'key "images" is missing'),
        (lambda d: d.pop("annotations"), 'key "annotations" is missing'),
        (lambda d: d.update(images={"7": {}}), "\"images\" is {'7': {}}"),
        (lambda d: d.update(images=[]), '"images" is empty'),
        (lambda d: d.update(categories=[]), '"categories" is empty'),
        (lambda d: d["annotations"].append(5), '"annotations"[3] is 5'),
        (take("images", 1, "height"), "image 3: missing height"),
        (take("images", 1, "id"), "image at position 1: missing id"),
        (take("annotations", 1, "bbox"), "annotation 12: missing bbox"),
        (take("annotations", 1, "category_id"), "annotation 12: missing category_id"),
        (take("categories", 1, "name"), "category 2: missing name"),
        (put("images", 1, id=7), 'image 7: this id occurs twice in "images"'),
        (put("annotations", 1, id=11), 'annotation 11: this id occurs twice in "annotations"'),
        (put("categories", 1, id=9), 'category 9: this id occurs twice in "categories"'),
        (put("images", 1, id="x"), "image at position 1: id is 'x'"),
        (put("images", 1, id=None), "image at position 1: id is None"),
        (put("images", 1, width=0), "image 3: width is 0"),
        (put("images", 1, width=10**400), "image 3: width is 1000"),
        (put("images", 1, height=30.5), "image 3: height is 30.5"),
        (put("images", 1, file_name=4), "image 3: file_name is 4"),
        (put("images", 1, file_name=""), "image 3: file_name is ''"),
        (put("images", 1, file_name="sub"), "image 3: no file"),
        (put("images", 1, file_name="a\0b"), "image 3: no file"),
        (put("categories", 1, name=None), "category 2: name is None"),
        (put("annotations", 1, image_id=99), "annotation 12: image_id 99 is not an id"),
        (put("annotations", 1, image_id=[7]), "annotation 12: image_id [7] is not an id"),
        (put("annotations", 1, category_id=0), "annotation 12: category_id 0 is not an id"),
        (put("annotations", 1, category_id=True), "annotation 12: category_id True is not"),
        (put("annotations", 1, iscrowd=2), "annotation 12: iscrowd is 2"),
        (put("annotations", 1, iscrowd=[]), "annotation 12: iscrowd is []"),
        (put("annotations", 2, bbox="1234"), "annotation 13: bbox is '1234'"),
        (box(1, 2, 3), "annotation 13: bbox is [1, 2, 3]"),
        (box(1, 2, 3, 4, 5), "annotation 13: bbox is [1, 2, 3, 4, 5]"),
        (box(1, 2, "3", 4), "annotation 13: bbox is [1, 2, '3', 4]"),
        (box(1, 2, None, 4), "annotation 13: bbox is [1, 2, None, 4]"),
        (box(1, 2, True, 4), "annotation 13: bbox is [1, 2, True, 4]"),
        (box(1, 2, -3, 4), "annotation 13: bbox [1, 2, -3, 4] has negative width or height"),
        (box(1, 2, 3, -4), "annotation 13: bbox [1, 2, 3, -4] has negative width or height"),
        (box(1, 2, float("nan"), 4), "annotation 13: bbox [1, 2, nan, 4] is not finite"),
        (box(1, 2, 3, float("inf")), "annotation 13: bbox [1, 2, 3, inf] is not finite"),
        (box(float("-inf"), 2, 3, 4), "annotation 13: bbox [-inf, 2, 3, 4] is not finite"),
        (box(10**400, 2, 3, 4), "is not finite"),
        (box(1e39, 2, 3, 4), "annotation 13: bbox [1e+39, 2, 3, 4] is not finite"),
        (box(20, 2, 3, 4), "bbox [20, 2, 3, 4] lies outside its image (image 3 is 20 x 30 px)"),
        (box(1, 30, 3, 4), "annotation 13: bbox [1, 30, 3, 4] lies outside its image"),
        (box(-3, 2, 3, 4), "annotation 13: bbox [-3, 2, 3, 4] lies outside its image"),
        (box(1, -9, 3, 4), "annotation 13: bbox [1, -9, 3, 4] lies outside its image"),
    ],
)
def test_damaged_entries_are_named(root: Path, change, says: str) -> None:
    message = refusal(write(root, change), root)
    assert says in message
    assert "; " in message  # what is wrong; what to do


def region(**values: object) -> Callable[[Document], object]:
    row = {"id": 1, "image_id": 3, "bbox": [2, 3, 10, 5.5], **values}
    return lambda d: d.update(ignore_regions=[row, {"id": 2, "image_id": 5, "bbox": [1, 1, 0, 4]}])


def test_ignore_regions_are_read(root: Path) -> None:
    records = load_coco(write(root, region()), root).records
    assert [record.ignore_regions.tolist() for record in records] == [[], [[2, 3, 12, 8.5]], []]
    for record in (*records, *load_coco(write(root, lambda d: None), root).records):
        assert record.ignore_regions.dtype == np.float32
        assert record.ignore_regions.shape[1:] == (4,)
    assert len(records[1].boxes) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (region(image_id=9), 'ignore region 1: image_id 9 is not an id in "images"'),
        (region(bbox=[1, 2, 3]), "ignore region 1: bbox is [1, 2, 3]"),
        (region(bbox=[1, 2, -3, 4]), "ignore region 1: bbox [1, 2, -3, 4] has negative"),
        (region(bbox=[50, 2, 3, 4]), "bbox [50, 2, 3, 4] lies outside its image (image 3 is 20"),
        (region(id=2), 'ignore region 2: this id occurs twice in "ignore_regions"'),
        (lambda d: d.update(ignore_regions={}), '"ignore_regions" is {}; it must be a list'),
        (lambda d: d.update(ignore_regions=[{}]), "missing bbox, id, image_id; each ignore region"),
    ],
)
def test_damaged_ignore_regions_are_named(root: Path, change, says: str) -> None:
    assert says in refusal(write(root, change), root)


def test_empty_boxes_are_left_out_and_counted(root: Path) -> None:
    json_file = write(root, put("annotations", 0, bbox=[3, 4, 0, 5]))
    dataset = load_coco(json_file, root)
    assert dataset.dropped == 1
    assert [len(record.boxes) for record in dataset.records] == [1, 1, 0]
    assert dataset.categories[dataset.records[1].labels[0]] == "bus"
    write(root, put("annotations", 0, bbox=[3, 4, -1, 5]))
    with pytest.raises(DatasetError, match="negative"):
        load_coco(json_file, root)


def test_read_image_returns_bgr_pixels(root: Path) -> None:
    record = load_coco(root / "set.json", root).records[0]
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[..., 0] = 200
    cv2.imwrite(record.file_name, pixels)
    image = read_image(record)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels)
    cv2.imwrite(record.file_name, pixels[..., 0])
    np.testing.assert_array_equal(read_image(record), np.full((40, 60, 3), 200))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes that are not a readable image"),
        (b"not an image", "12 bytes that are not a readable image"),
        (cv2.imencode(".png", np.zeros((41, 60, 3), np.uint8))[1].tobytes(), "60 x 41 px"),
        (None, "No such file"),
    ],
)
def test_unreadable_pixels_are_refused(root: Path, content: bytes | None, says: str) -> None:
    record: CocoRecord = load_coco(root / "set.json", root).records[0]
    file = Path(record.file_name)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        read_image(record)
    message = str(caught.value)
    assert message.startswith(f"{file}: image 7: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = cv2.imencode(suffix, pixels)[1].tobytes()
    if suffix == ".jpg":
        # An EXIF thumbnail is a whole JPEG inside the first segment.
        thumbnail = cv2.imencode(suffix, pixels[:16, :16])[1].tobytes()
        length = (len(thumbnail) + 2).to_bytes(2, "big")
        data = data[:2] + b"\xff\xe1" + length + thumbnail + data[2:]
    file, nothing = tmp_path / f"cut{suffix}", np.zeros(0)
    record = CocoRecord(str(file), 1, 64, 64, nothing, nothing, nothing)
    file.write_bytes(data + b"trailer")
    assert np.abs(read_image(record).astype(int) - pixels).mean() < 60
    file.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(DatasetError, match="not a readable image"):
        read_image(record)


def test_a_hundred_thousand_annotations_load_in_seconds(root: Path) -> None:
    def many(document: Document) -> None:
        document["annotations"] = [
            {"id": i, "image_id": (3, 5, 7)[i % 3], "category_id": 2, "bbox": [1, 1, 2, 2.5]}
            for i in range(100_000)
        ]

    json_file = write(root, many)
    start = time.perf_counter()
    dataset = load_coco(json_file, root)
    assert time.perf_counter() - start < 5
    assert sum(len(record.boxes) for record in dataset.records) == 100_000
