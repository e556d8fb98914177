"""Names of original datasets: found in their layout, converted once, and again when changed."""

import json
import os
import threading
from pathlib import Path

import pytest

from dr2net_d2.data import DatasetError, load_coco, register_coco_json, resolve_dataset
from dr2net_d2.data.formats import FORMATS
from dr2net_d2.data.originals import NAMES


@pytest.fixture
def roots(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setenv("DR2NET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "datasets", tmp_path / "cache"


def place(roots, name, folder):
    (roots[0] / folder).mkdir(parents=True)
    FORMATS[name].write_sample(roots[0] / folder)
    return roots[0] / folder


def images_of(name):
    dataset = load_coco(*resolve_dataset(name))
    assert all(Path(record.file_name).is_file() for record in dataset.records)
    return len(dataset.records)


def test_every_name_is_known_and_says_what_is_missing(roots):
    assert len(NAMES) == 13
    for name in NAMES:
        with pytest.raises(DatasetError, match=f"unpack {name} there, or set DETECTRON2_DATASETS"):
            resolve_dataset(name)
        with pytest.raises(DatasetError, match="built-in dataset"):
            register_coco_json(name, "other.json", "images")
    assert not roots[1].exists()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"), [("train", "train"), ("val", "val"), ("test_dev", "test-dev")]
)
def test_visdrone(roots, name, folder, nested):
    root = place(roots, "visdrone", "VisDrone")
    inner = f"VisDrone2019-DET-{folder}"
    (root / "VisDrone2019-DET-val").rename(root / "here")
    if nested:
        (root / inner).mkdir()
    (root / "here").rename(root / inner / inner if nested else root / inner)
    assert images_of(f"visdrone_{name}") == 3
    json_file, image_root = resolve_dataset(f"visdrone_{name}")
    assert image_root.parent.name == inner and json_file.is_relative_to(roots[1])
    assert json.loads(json_file.read_text())["images"][0]["file_name"] == "0000001.jpg"


@pytest.mark.parametrize("images", ["images/test", "test/images", "images/test/images", "test"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("aitod_test", "aitod_test.json"),
        ("aitod_test", "aitod_test_v1.json"),
        ("aitodv2_test", "aitodv2_test.json"),
    ],
)
def test_aitod(roots, images, name, file):
    root = place(roots, "aitod", "AI-TOD")
    (root / "annotations/aitod_train.json").rename(root / "annotations" / file)
    (root / "images/train").rename(root / "away")
    (root / images).parent.mkdir(exist_ok=True, parents=True)
    (root / "away").rename(root / images)
    assert images_of(name) == 3


@pytest.mark.parametrize("folder", ["TinyPerson", "TinyPerson/tiny_set"])
def test_tinyperson(roots, folder):
    place(roots, "tinyperson", folder)
    assert images_of("tinyperson_train") == 3
    with pytest.raises(DatasetError, match=r"tiny_set_test\.json: no such file"):
        resolve_dataset("tinyperson_test")


def test_it_is_converted_once_and_again_when_a_file_changes(roots, monkeypatch):
    root = place(roots, "visdrone", "VisDrone") / "VisDrone2019-DET-val"
    first, _ = resolve_dataset("visdrone_val")
    written = first.stat().st_mtime_ns
    assert resolve_dataset("visdrone_val")[0] == first and first.stat().st_mtime_ns == written
    labels = root / "annotations" / "0000003.txt"
    labels.write_text("1,1,5,5,1,1,0,0\n")
    second, _ = resolve_dataset("visdrone_val")
    assert second != first
    assert len(load_coco(second, root / "images").records[2].boxes) == 1
    os.utime(root / "images" / "0000001.jpg", (1, 1))
    assert resolve_dataset("visdrone_val")[0] not in (first, second)


def test_bad_entries_leave_nothing_in_the_cache(roots):
    root = place(roots, "visdrone", "VisDrone") / "VisDrone2019-DET-val"
    (root / "annotations" / "0000001.txt").write_text("1,2,3\n")
    with pytest.raises(DatasetError, match=r"0000001\.txt:1: 3 values"):
        resolve_dataset("visdrone_val")
    assert [path for path in roots[1].rglob("*") if path.is_file()] == []


def test_many_at_once_do_not_disturb_each_other(roots):
    place(roots, "visdrone", "VisDrone")
    counts, threads = [], []
    for _ in range(8):
        threads.append(threading.Thread(target=lambda: counts.append(images_of("visdrone_val"))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [3] * 8
    assert len([path for path in roots[1].rglob("*") if path.is_file()]) == 1


def test_a_json_is_a_name(roots, tmp_path):
    (tmp_path / "own").mkdir()
    FORMATS["coco"].write_sample(tmp_path / "own")
    name = str(tmp_path / "own" / "annotations.json")
    assert resolve_dataset(name) == (Path(name), tmp_path / "own")
    assert images_of(name) == 3
    with pytest.raises(DatasetError, match="No such file"):
        load_coco(*resolve_dataset("none.json"))
