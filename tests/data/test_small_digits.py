"""SmallDigits: truth against the pixels, determinism, and a cache that survives damage."""

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from dr2net_d2.data import (
    DatasetError,
    SmallDigitsConfig,
    digit_samples,
    draw_canvas,
    load_coco,
    make_small_digits,
    read_image,
    register_coco_json,
    resolve_dataset,
    small_digits,
    small_digits_from_name,
)

SMALL = SmallDigitsConfig("train", num_images=3, size=128)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def background(config: SmallDigitsConfig, index: int) -> np.ndarray:
    """The canvas before any digit: the generator draws the background first."""
    rng = np.random.default_rng((config.seed, ("train", "val").index(config.split), index))
    return small_digits._draw_background(config.shape, rng)


def largest_overlap(boxes: np.ndarray) -> float:
    """Greatest IoU of two boxes, one pair at a time."""
    worst = 0.0
    for i, (ax0, ay0, ax1, ay1) in enumerate(boxes):
        for bx0, by0, bx1, by1 in boxes[:i]:
            shared = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
            total = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - shared
            worst = max(worst, shared / total)
    return worst


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_are_tight_around_the_ink(split: str) -> None:
    config = SmallDigitsConfig(split, size=192, objects=8)
    alone = 0
    for index in range(12):
        image, boxes, labels, _ = draw_canvas(config, index)
        changed = (image != background(config, index)).any(axis=2)
        covered = np.zeros_like(changed)
        for x0, y0, x1, y1 in boxes.astype(int):
            covered[y0:y1, x0:x1] = True
        assert not (changed & ~covered).any()
        for i, (x0, y0, x1, y1) in enumerate(boxes.astype(int)):
            others = np.delete(boxes, i, axis=0)
            touches = (others[:, :2] < (x1, y1)).all(1) & (others[:, 2:] > (x0, y0)).all(1)
            if touches.any():
                continue
            alone += 1
            rows, columns = np.nonzero(changed[y0:y1, x0:x1])
            assert (rows.min(), rows.max() + 1) == (0, y1 - y0)
            assert (columns.min(), columns.max() + 1) == (0, x1 - x0)
        assert boxes.dtype == np.float32
        assert labels.dtype == np.int64
        assert len(boxes) == len(labels)
    assert alone > 50


def test_sides_counts_and_labels_are_what_the_config_says() -> None:
    config = SmallDigitsConfig("train")
    drawn = [draw_canvas(config, index) for index in range(40)]
    boxes = np.concatenate([boxes for _, boxes, *_ in drawn])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert 7 <= sides.min() <= 9
    assert 27 <= sides.max() <= 28
    counts = [len(labels) for _, _, labels, _ in drawn]
    assert min(counts) >= 6
    assert max(counts) <= 18
    assert 10.5 < np.mean(counts) < 13.5
    assert set(np.concatenate([labels for _, _, labels, _ in drawn])) == set(range(10))
    assert max(largest_overlap(boxes) for _, boxes, *_ in drawn) <= 0.1


def test_digits_are_both_lighter_and_darker_than_what_is_under_them() -> None:
    config = SmallDigitsConfig("val", size=192)
    lighter = []
    for index in range(6):
        image, boxes, *_ = draw_canvas(config, index)
        change = image.astype(int) - background(config, index)
        for x0, y0, x1, y1 in boxes.astype(int):
            peak = np.abs(change[y0:y1, x0:x1]).max()
            assert peak >= 40  # far above the grain, whose standard deviation is 3
            lighter.append(change[y0:y1, x0:x1].sum() > 0)
    assert 0.25 < np.mean(lighter) < 0.75


def test_the_labels_are_those_of_the_samples() -> None:
    digits = load_digits()
    truth = {
        image.tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)
    }
    for split in ("train", "val"):
        images, labels = digit_samples(split)
        for image, label in zip(images, labels, strict=True):
            assert truth[(image * 16).astype(np.float64).tobytes()] == label


def test_no_digit_sample_is_in_both_splits() -> None:
    (train, train_labels), (val, val_labels) = digit_samples("train"), digit_samples("val")
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in val}
    assert len(train) + len(val) == len(load_digits().target)
    shares = np.bincount(val_labels) / (np.bincount(train_labels) + np.bincount(val_labels))
    assert np.all(np.abs(shares - 0.2) < 0.02)
    with pytest.raises(ValueError, match="'test'"):
        digit_samples("test")


def test_a_crowded_canvas_gets_fewer_digits_and_keeps_its_promises() -> None:
    config = SmallDigitsConfig("train", size=(64, 96), objects=400)
    image, boxes, labels, _ = draw_canvas(config, 0)
    assert image.shape == (64, 96, 3)
    assert 10 < len(boxes) == len(labels) < 200
    assert largest_overlap(boxes) <= 0.1
    assert (boxes >= 0).all()
    assert (boxes <= (96, 64, 96, 64)).all()


def test_pycocotools_and_load_coco_agree_with_draw_canvas(tmp_path: Path) -> None:
    json_file, image_root = make_small_digits(SMALL, tmp_path)
    truth, dataset = COCO(json_file), load_coco(json_file, image_root)
    assert [truth.cats[i]["name"] for i in range(1, 11)] == [str(digit) for digit in range(10)]
    assert dataset.categories == tuple("0123456789")
    assert dataset.category_ids == tuple(range(1, 11))
    assert len(truth.imgs) == len(dataset.records) == 3
    for index, record in enumerate(dataset.records):
        image, boxes, labels, _ = draw_canvas(SMALL, index)
        np.testing.assert_array_equal(read_image(record), image)
        np.testing.assert_array_equal(record.boxes, boxes)
        np.testing.assert_array_equal(record.labels, labels)
        annotations = truth.imgToAnns[record.image_id]
        xywh = np.array([annotation["bbox"] for annotation in annotations])
        np.testing.assert_array_equal(xywh[:, :2] + xywh[:, 2:], boxes[:, 2:])
        assert [a["category_id"] - 1 for a in annotations] == labels.tolist()
        assert [a["area"] for a in annotations] == xywh[:, 2:].prod(axis=1).tolist()
        assert {a["iscrowd"] for a in annotations} == {0}


def test_bytes_are_equal_in_two_caches_and_differ_by_seed(tmp_path: Path) -> None:
    first, _ = make_small_digits(SMALL, tmp_path / "a")
    second, _ = make_small_digits(SMALL, tmp_path / "b")
    assert snapshot(first.parent) == snapshot(second.parent)
    for other in (SmallDigitsConfig("train", seed=1, size=128), SmallDigitsConfig("val", size=128)):
        assert not np.array_equal(draw_canvas(other, 0)[0], draw_canvas(SMALL, 0)[0])


def test_a_larger_dataset_begins_with_the_smaller_one(tmp_path: Path) -> None:
    _, few = make_small_digits(SMALL, tmp_path)
    _, more = make_small_digits(SmallDigitsConfig("train", num_images=5, size=128), tmp_path)
    assert few != more
    assert snapshot(few).items() < snapshot(more).items()


def test_an_intact_cache_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_small_digits(SMALL, tmp_path)
    monkeypatch.setattr(small_digits, "draw_canvas", None)
    assert make_small_digits(SMALL, tmp_path) == made


def damage_pixels(folder: Path) -> None:
    file = folder / "images" / "000001.png"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_json(folder: Path) -> None:
    file = folder / "annotations.json"
    file.write_bytes(file.read_bytes()[:100])


def change_version(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["version"] = -1
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage",
    [
        damage_pixels,
        cut_json,
        change_version,
        lambda folder: (folder / "images" / "000002.png").unlink(),
        lambda folder: (folder / "annotations.json").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: shutil.rmtree(folder / "images"),
        lambda folder: (shutil.rmtree(folder), folder.write_text("a file")),
        lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    ],
)
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage) -> None:
    json_file, _ = make_small_digits(SMALL, tmp_path)
    whole = snapshot(json_file.parent)
    damage(json_file.parent)
    make_small_digits(SMALL, tmp_path)
    assert snapshot(json_file.parent) == whole
    assert list(tmp_path.iterdir()) == [json_file.parent]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_creation_leaves_nothing(tmp_path: Path, monkeypatch, stop) -> None:
    def interrupted(config: SmallDigitsConfig, index: int):
        if index == 2:
            raise stop
        return draw_canvas(config, index)

    with monkeypatch.context() as patch:
        patch.setattr(small_digits, "draw_canvas", interrupted)
        with pytest.raises(stop):
            make_small_digits(SMALL, tmp_path)
    assert not list(tmp_path.iterdir())
    json_file, image_root = make_small_digits(SMALL, tmp_path)
    assert len(load_coco(json_file, image_root).records) == 3


def test_processes_that_make_it_at_once_all_get_a_whole_dataset(tmp_path: Path) -> None:
    expected = snapshot(make_small_digits(SMALL, tmp_path / "alone")[0].parent)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        tasks = [(SMALL, tmp_path / "shared")] * 4
        made = pool.starmap(make_small_digits, tasks, chunksize=1)
    assert len(set(made)) == 1
    assert snapshot(made[0][0].parent) == expected
    assert list((tmp_path / "shared").iterdir()) == [made[0][0].parent]


def test_a_dataset_made_meanwhile_is_kept(tmp_path: Path, monkeypatch) -> None:
    """The other process finishes between our first look and our move into place."""
    make_small_digits(SMALL, tmp_path / "other")

    def draw_while_another_finishes(config: SmallDigitsConfig, index: int):
        if index == 2:
            shutil.copytree(tmp_path / "other", tmp_path / "cache", dirs_exist_ok=True)
            marker.touch()
        return draw_canvas(config, index)

    marker = tmp_path / "cache" / SMALL.name / "marker"
    monkeypatch.setattr(small_digits, "draw_canvas", draw_while_another_finishes)
    make_small_digits(SMALL, tmp_path / "cache")
    assert marker.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"file.*DR2NET_CACHE") as caught:
        make_small_digits(SMALL, tmp_path / "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": "test"}, "split is 'test'; use train or val"),
        ({"num_images": 0}, "num_images is 0; use 1 to"),
        ({"objects": 0}, "objects is 0; use 1 to"),
        ({"objects": 1.5}, "objects is 1.5"),
        ({"size": 32}, "size is 32; use 56 to 4096"),
        ({"size": 8192}, "size is 8192"),
        ({"size": (256, 5000)}, "size is 5000"),
        ({"size": (256, 256, 3)}, "size is (256, 256, 3); give a side or (height, width)"),
        ({"min_side": 2}, "min_side is 2; use 4 to 28"),
        ({"min_side": 40}, "min_side is 40; use 4 to 28"),
        ({"max_side": "28"}, "max_side is '28'"),
        ({"seed": -1}, "seed is -1; use 0 to"),
        ({"seed": True}, "seed is True"),
    ],
)
def test_a_config_value_that_is_not_allowed_is_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SmallDigitsConfig(**{"split": "train", **values})
    assert message in str(caught.value)


def test_names_give_configs_and_configs_give_names() -> None:
    assert small_digits_from_name("small_digits_train") == SmallDigitsConfig("train", 400)
    assert small_digits_from_name("small_digits_val") == SmallDigitsConfig("val", 100)
    name = "small_digits_train_n64_s512_d40_seed3"
    config = SmallDigitsConfig("train", num_images=64, size=512, objects=40, seed=3)
    assert small_digits_from_name(name) == config
    oblong = SmallDigitsConfig("val", 2, (300, 200), min_side=10, max_side=20)
    assert small_digits_from_name(oblong.name) == oblong


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("small_digits_test", "small_digits_test"),
        ("small_digits", "small_digits"),
        ("my_small_digits_train", "my_small_digits_train"),
        ("small_digits_train_x3", "'x3'"),
        ("small_digits_train_n", "'n'"),
        ("small_digits_train_n3_n4", "'n4'"),
        ("small_digits_train_n3x4", "'n3x4'"),
        ("small_digits_train_", "''"),
        ("small_digits_train_s16", "size is 16"),
    ],
)
def test_a_bad_name_is_refused_with_the_right_form(name: str, value: str) -> None:
    with pytest.raises(DatasetError, match=name) as caught:
        small_digits_from_name(name)
    assert value in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resolve_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DR2NET_CACHE", str(tmp_path / "cache"))
    json_file, image_root = resolve_dataset("small_digits_val_n1_s64_d2")
    assert json_file.is_relative_to(tmp_path / "cache")
    assert len(load_coco(json_file, image_root).records) == 1

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    assert resolve_dataset("coco_2017_val") == (
        tmp_path / "sets" / "coco" / "annotations" / "instances_val2017.json",
        tmp_path / "sets" / "coco" / "val2017",
    )
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert resolve_dataset("coco_2017_train")[1] == Path("datasets/coco/train2017")


def test_registered_datasets_resolve_and_names_stay_unique(monkeypatch) -> None:
    monkeypatch.setattr("dr2net_d2.data._registered", {})
    register_coco_json("drones_train", "drones/train.json", "drones/images")
    register_coco_json("drones_train", "drones/train.json", "drones/images")
    assert resolve_dataset("drones_train") == (Path("drones/train.json"), Path("drones/images"))
    for name in ("drones_train", "coco_2017_val", "small_digits_train"):
        with pytest.raises(DatasetError, match=f"'{name}' already stands for"):
            register_coco_json(name, "other.json", "images")
    with pytest.raises(DatasetError, match=r"'drones'.*coco_2017_train.*drones_train") as caught:
        resolve_dataset("drones")
    assert "\n" not in str(caught.value)
