"""Datasets in Detectron2's catalogs, and resumption within the stream of training images."""

import json
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances

from dr2net_d2.d2 import register_dataset
from dr2net_d2.d2.data import CheckedMapper, skip_batches
from dr2net_d2.data import DatasetError, load_coco, register_coco_json, resolve_dataset
from dr2net_d2.data.formats import FORMATS
from dr2net_d2.errors import ConfigError
from dr2net_d2.tv.dataset import load_split
from tests.d2.tiny import tiny_cfg

NAME = "small_digits_val_n3_s64_d2"


def coco_json(folder, boxes=((1, 2, 10, 12),)):
    cv2.imwrite(str(folder / "a.png"), np.zeros((40, 60, 3), np.uint8))
    annotations = [
        {"id": i, "image_id": 1, "category_id": 5, "bbox": list(box), "iscrowd": 0, "area": 1}
        for i, box in enumerate(boxes, 1)
    ]
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": annotations,
        "categories": [{"id": 5, "name": "van"}],
    }
    (folder / "a.json").write_text(json.dumps(document))
    return folder / "a.json"


def test_small_digits_are_in_the_catalogs_and_say_the_same_as_the_loader():
    assert register_dataset(NAME) == tuple("0123456789")
    assert register_dataset(NAME) == tuple("0123456789")
    metadata = MetadataCatalog.get(NAME)
    assert metadata.evaluator_type == "coco"
    records = load_coco(*resolve_dataset(NAME)).records
    for record, theirs in zip(records, DatasetCatalog.get(NAME), strict=True):
        assert theirs["file_name"] == record.file_name
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in theirs["annotations"])]
        np.testing.assert_allclose(record.boxes, boxes)
        assert record.labels.tolist() == [a["category_id"] for a in theirs["annotations"]]


def test_datasets_registered_on_either_side_are_usable(tmp_path):
    json_file = coco_json(tmp_path)
    register_coco_json("vans_ours", json_file, tmp_path)
    register_coco_instances("vans_theirs", {}, str(json_file), str(tmp_path))
    for name in ("vans_ours", "vans_theirs"):
        assert register_dataset(name) == ("van",)
        assert len(DatasetCatalog.get(name)) == 1


def test_ignore_regions_reach_the_dataset_dicts(tmp_path):
    json_file = coco_json(tmp_path)
    document = json.loads(json_file.read_text())
    document["images"].append({"id": 2, "file_name": "a.png", "height": 40, "width": 60})
    document["ignore_regions"] = [
        {"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4.5]},
        {"id": 2, "image_id": 1, "bbox": [30, 20, 50, 50]},
    ]
    json_file.write_text(json.dumps(document))
    name = str(json_file)
    assert register_dataset(name) == ("van",)
    first, second = DatasetCatalog.get(name)
    assert first["ignore_regions"] == [[1, 2, 4, 6.5], [30, 20, 80, 70]]
    assert "ignore_regions" not in second
    assert MetadataCatalog.get(name).json_file == name
    assert MetadataCatalog.get(name).thing_classes == ["van"]


def test_original_datasets_have_the_same_names_in_both_engines(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("DR2NET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "VisDrone").mkdir()
    FORMATS["visdrone"].write_sample(tmp_path / "VisDrone")
    names = register_dataset("visdrone_val")
    split = load_split("visdrone_val")
    assert names == split.content.categories and len(names) == 10
    dicts = DatasetCatalog.get("visdrone_val")
    assert [d.get("ignore_regions", []) for d in dicts] == [
        record.ignore_regions.tolist() for record in split.content.records
    ]
    assert [len(d.get("ignore_regions", [])) for d in dicts] == [0, 2, 0]
    crowds = [[a["iscrowd"] for a in d["annotations"]] for d in dicts]
    assert crowds == [[0] * 4, [0, 0, 0, 1], []]


def test_damaged_datasets_are_refused_on_either_side_and_not_registered(tmp_path):
    json_file = coco_json(tmp_path, boxes=[(1, 2, 10, 12), (5, 5, -1, 3)])
    register_coco_instances("vans_theirs2", {}, str(json_file), str(tmp_path))
    register_coco_json("vans_ours2", json_file, tmp_path)
    for name in ("vans_theirs2", "vans_ours2"):
        with pytest.raises(DatasetError, match="negative width or height"):
            register_dataset(name)
    assert "vans_ours2" not in DatasetCatalog


@pytest.mark.parametrize("name", ["coco_2017_val", "coco_2014_minival"])
def test_coco_that_is_not_there_is_a_dataset_error(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match="DETECTRON2_DATASETS"):
        register_dataset(name)


def test_an_unknown_name_is_a_dataset_error():
    with pytest.raises(DatasetError, match="'digits' is not known"):
        register_dataset("digits")


def test_a_dataset_of_another_kind_is_left_to_detectron2():
    DatasetCatalog.register("clouds", lambda: [])
    assert register_dataset("clouds") == ()
    MetadataCatalog.get("clouds").thing_classes = ["cirrus"]
    assert register_dataset("clouds") == ("cirrus",)


@pytest.mark.parametrize(("grouping", "workers"), [(True, 0), (False, 0), (False, 2)])
def test_a_loader_continues_where_it_was_cut_off(tmp_path, grouping, workers):
    cfg = tiny_cfg(
        tmp_path,
        "DATALOADER.ASPECT_RATIO_GROUPING", grouping,
        "DATALOADER.NUM_WORKERS", workers,
        "INPUT.RANDOM_FLIP", "none",
    )  # fmt: skip
    register_dataset(cfg.DATASETS.TRAIN[0])

    def names(skipped, batches):
        loader = build_detection_train_loader(cfg)
        skip_batches(loader, skipped)
        return [[sample["file_name"] for sample in batch] for batch in islice(loader, batches)]

    assert names(3, 4) == names(0, 7)[3:]


LSJ = ("INPUT.LSJ.ENABLED", True, "INPUT.LSJ.IMAGE_SIZE", 96, "MODEL.MASK_ON", True)


def test_large_scale_jittering_is_that_of_detectron2s_recipe(tmp_path):
    """The transforms of its LazyConfig, and boxes around what the crop leaves of the objects."""
    cfg = tiny_cfg(tmp_path, *LSJ)
    register_dataset(cfg.DATASETS.TRAIN[0])
    rows = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    lazy = [
        T.RandomFlip(horizontal=True),
        T.ResizeScale(min_scale=0.1, max_scale=2.0, target_height=96, target_width=96),
        T.FixedSizeCrop(crop_size=(96, 96), pad=False),
    ]
    mappers = [
        CheckedMapper(cfg, True),
        DatasetMapper(
            True, augmentations=lazy, image_format="BGR", use_instance_mask=True,
            recompute_boxes=True,
        ),
    ]  # fmt: skip
    sizes = set()
    for seed, row in enumerate(rows * 3):
        samples = []
        for mapper in mappers:
            np.random.seed(seed)
            samples.append(mapper(row))
        ours, theirs = samples
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["instances"].gt_boxes.tensor, theirs["instances"].gt_boxes.tensor)
        sizes.add(tuple(ours["image"].shape[1:]))
    assert len(sizes) > 5 and max(max(size) for size in sizes) == 96


def test_large_scale_jittering_takes_detectors_of_boxes_too(tmp_path):
    cfg = tiny_cfg(tmp_path, *LSJ, "MODEL.MASK_ON", False)
    register_dataset(cfg.DATASETS.TRAIN[0])
    mapper = CheckedMapper(cfg, True)
    assert not mapper.recompute_boxes
    assert mapper(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[0])["image"].shape[0] == 3


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("INPUT.LSJ.IMAGE_SIZE", 0), r"IMAGE_SIZE 0"),
        (("INPUT.LSJ.MIN_SCALE", 3.0), r"scales 3.0 to 2.0"),
        (("INPUT.CROP.ENABLED", True), r"INPUT.LSJ and INPUT.CROP are both enabled"),
    ],
)
def test_jittering_that_cannot_be_is_a_config_error(tmp_path, opts, message):
    with pytest.raises(ConfigError, match=message):
        CheckedMapper(tiny_cfg(tmp_path, *LSJ, *opts), True)


def test_lvis_needs_its_package_and_its_files(monkeypatch):
    with pytest.raises(DatasetError, match=r"lvis_v1_train needs the package lvis"):
        register_dataset("lvis_v1_train")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(DatasetError, match=r"lvis_v1_train.json: no such file"):
        register_dataset("lvis_v1_train")


def test_a_loader_of_ones_own_starts_anew_with_a_warning(caplog):
    skip_batches([1, 2], 0)
    assert not caplog.text
    skip_batches([1, 2], 3)
    assert "starts from its first batch again" in caplog.text
