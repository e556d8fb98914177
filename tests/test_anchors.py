"""The command: boxes at the scale of the training, refusals, and the config that it writes."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fvcore.common.config import CfgNode

from dr2net_d2 import anchors
from dr2net_d2.commands import load_config
from dr2net_d2.data import load_coco, resolve_dataset
from dr2net_d2.data.coco import CocoRecord
from dr2net_d2.errors import ConfigError

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs/quickstart.yaml"
UNTRAINED = ("MODEL.WEIGHTS", "")
DATA = ("DATASETS.TRAIN", "('small_digits_train_n8_s64_d3',)")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path, tmp_path_factory):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DR2NET_CACHE", str(tmp_path_factory.getbasetemp() / "anchors"))


def command(*words, options=(), config=QUICKSTART):
    given = ["--config-file", str(config), "--engine", "torchvision", *options]
    return anchors.main([*given, *words])


def config(*words, file=QUICKSTART, engine="torchvision"):
    return load_config(str(file), words, engine)


def record(boxes, size=(200, 100), crowd=()):
    """An image of size (width, height)."""
    iscrowd = np.isin(np.arange(len(boxes)), crowd)
    labels = np.zeros(len(boxes), dtype=np.int64)
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return CocoRecord("a.png", 1, size[1], size[0], boxes, labels, iscrowd)


def test_boxes_are_resized_as_in_training_and_crowds_left_out():
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(150,)", "INPUT.MAX_SIZE_TRAIN", "1000")
    boxes = [[10, 20, 30, 60], [0, 0, 50, 50], [190, 90, 220, 130]]
    objects = anchors.training_objects(cfg, [record(boxes, crowd=[1])], 64)
    # The last is cut at the edge of the image.
    np.testing.assert_allclose(objects.boxes, [[15, 30, 45, 90], [285, 135, 300, 150]])
    assert objects.image_sizes.tolist() == [[320, 192]] * 2
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(150,)", "INPUT.MAX_SIZE_TRAIN", "250")
    objects = anchors.training_objects(cfg, [record(boxes[:1])], 1)
    np.testing.assert_allclose(objects.boxes, [[12.5, 25, 37.5, 75]])


def test_boxes_are_those_that_the_torchvision_engine_trains_on():
    from dr2net_d2.tv.dataset import TrainingStream

    records = load_coco(*resolve_dataset("small_digits_train_n8_s64_d3")).records
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(97,)", "INPUT.MAX_SIZE_TRAIN", "200")
    stream = TrainingStream(
        records, shortest_sides=(97,), longest_side=200, flip=False, channel_order="RGB", seed=0
    )
    trained = np.concatenate([stream[i][1]["boxes"] for i in range(len(records))])
    found = anchors.training_objects(cfg, records, 1).boxes
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(trained, axis=0), rtol=1e-5)


def test_large_scale_jittering_gives_sizes_over_its_whole_range():
    cfg = config(
        *("INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.IMAGE_SIZE", "400"),
        *("INPUT.LSJ.MIN_SCALE", "0.5", "INPUT.LSJ.MAX_SCALE", "2.0"),
    )
    # Fitted into the square an image is twice as large; an object is then 16 px.
    objects = anchors.training_objects(cfg, [record([[90, 40, 98, 48]])], 16)
    assert len(objects) > 5000
    whole = objects.sizes[objects.image_sizes.max(axis=1) < 400]
    assert 8 <= whole.min() < 8.2 and 15 < whole.max() < 16
    assert 31.5 < objects.sizes.max() <= 32.01
    assert objects.boxes.min() >= 0 and objects.boxes.max() <= 400
    again = anchors.training_objects(cfg, [record([[90, 40, 98, 48]])], 16)
    assert np.array_equal(objects.boxes, again.boxes)


def test_several_training_sizes_are_all_seen():
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(100, 200)", "INPUT.MAX_SIZE_TRAIN", "1000")
    objects = anchors.training_objects(cfg, [record([[0, 0, 10, 10]])], 1)
    sizes, counts = np.unique(objects.sizes, return_counts=True)
    assert sizes.tolist() == [10, 20]
    assert counts.min() > 0.45 * counts.sum()


def test_a_tile_is_resized_in_place_of_its_image():
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(200,)", "INPUT.MAX_SIZE_TRAIN", "1000")
    cfg.INPUT.TILES = CfgNode({"ENABLED": True, "SIZE": 80})
    boxes = [[10, 20, 30, 60], [81, 70, 91, 80], [190, 90, 200, 100]]
    objects = anchors.training_objects(cfg, [record(boxes)], 16)
    # Tiles of 80 px at (0, 0), (80, 0) and, moved inwards, (120, 20) become 200 px.
    expected = [[25, 50, 75, 150], [2.5, 175, 27.5, 200], [175, 175, 200, 200]]
    np.testing.assert_allclose(objects.boxes, expected)
    assert objects.image_sizes.tolist() == [[208, 208]] * 3


def test_the_number_of_anchors_per_location_stays_unless_asked():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 200, (500, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(6, 30, (500, 2))], axis=1)
    cfg = config()
    objects = anchors.training_objects(cfg, [record(boxes, (256, 256))], 16)
    old = anchors.config_anchors(cfg)
    assert (old.strides, old.sizes) == ([4, 8, 16], [[10], [20], [40]])
    counts = {}
    for asked in ((None, None), (2, None), (None, 1), (2, 2)):
        new = anchors.find_anchors(objects, old, *asked)
        counts[asked] = (len(new.sizes[0]), len(new.aspect_ratios[0]))
        if asked == (None, None):
            assert new.best_ious(objects).mean() > old.best_ious(objects).mean()
    assert np.prod(counts.pop((None, None))) == 3
    assert counts == {(2, None): (2, 1), (None, 1): (3, 1), (2, 2): (2, 2)}


def test_what_is_printed(capsys):
    assert command(*DATA) == 0
    printed = capsys.readouterr().out
    found = {row.split("|")[1].strip() for row in printed.splitlines() if row.startswith("|")}
    assert {"side, px", "32 to 64", "all"} <= found
    written = yaml.safe_load(printed[printed.index("DATASETS:") :])
    assert written.keys() == {"DATASETS", "MODEL"}
    assert list(Path().iterdir()) == []


def test_figures_of_the_table_are_those_of_the_anchors():
    cfg = config(*DATA)
    objects = anchors.training_objects(cfg, load_coco(*resolve_dataset(DATA[1][2:-3])).records, 16)
    old = anchors.config_anchors(cfg)
    ious = old.best_ious(objects)
    *_, total = anchors.format_table(objects, old, old).splitlines()
    cells = [cell.strip() for cell in total.split("|")[1:-1]]
    shares = [f"{100 * (ious >= least).mean():.1f} %" for least in (0.5, 0.5, 0.7, 0.7)]
    assert cells == ["all", str(len(ious)), *[f"{ious.mean():.3f}"] * 2, *shares]


@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
def test_the_written_config_trains(engine, monkeypatch):
    if engine == "detectron2":
        pytest.importorskip("detectron2")
        from detectron2.data import DatasetCatalog, MetadataCatalog

        for catalog in (DatasetCatalog, MetadataCatalog):
            monkeypatch.setattr(catalog, "data", dict(catalog.data))
        from dr2net_d2.d2.engine import run
    else:
        from dr2net_d2.tv.engine import run

    base = Path("configs/base.yaml")
    base.parent.mkdir()
    base.write_text(f"_BASE_: {QUICKSTART}\nSOLVER: {{MAX_ITER: 2}}\nTEST: {{EVAL_PERIOD: 0}}\n")
    options = ("--engine", engine, "--sizes", "2", "--output", "new/anchors.yaml")
    assert command(*DATA, "DATASETS.TEST", "()", options=options, config=base) == 0
    written = yaml.safe_load(Path("new/anchors.yaml").read_text())
    assert written.keys() == {"_BASE_", "DATASETS", "MODEL"}
    assert written["_BASE_"] == "../configs/base.yaml"
    assert written["MODEL"].keys() == {"ANCHOR_GENERATOR"}
    assert not Path("new/anchors.yaml.partial").exists()

    new = config(file="new/anchors.yaml", engine=engine)
    assert (len(new.MODEL.ANCHOR_GENERATOR.SIZES), new.SOLVER.MAX_ITER) == (3, 2)
    run(
        argparse.Namespace(
            config_file="new/anchors.yaml",
            opts=["MODEL.VIT.DEPTH", "1", "MODEL.VIT.WINDOW_BLOCK_INDEXES", "[]", *UNTRAINED],
            eval_only=False,
            resume=False,
            num_gpus=1,
            num_machines=1,
            machine_rank=0,
            dist_url="auto",
        )
    )
    weights = torch.load("output/quickstart/model_final.pth")["model"]
    (logits,) = (w for name, w in weights.items() if re.search(r"rpn.*logits\.weight", name))
    assert len(logits) == 2


@pytest.mark.parametrize(
    ("words", "options", "named"),
    [
        (("MODEL.META_ARCHITECTURE", "FCOS"), (), "FCOS, which has no anchors to choose"),
        (("MODEL.RPN.IN_FEATURES", "['res4']"), (), "MODEL.RPN.IN_FEATURES is ['res4']"),
        (("MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [9]]"), (), "SIZES is [[8], [9]]"),
        (("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"), (), "RotatedAnchorGenerator"),
        (("INPUT.CROP.ENABLED", "True"), (), "INPUT.CROP.ENABLED is True"),
        (("DATASETS.TRAIN", "()"), (), "DATASETS.TRAIN is empty"),
        ((), ("--sizes", "0"), "--sizes is 0"),
        ((), ("--output", "there.yaml"), "--output there.yaml exists"),
        ((), ("--output", "there.yaml/new.yaml"), "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_refused(words, options, named, capsys):
    Path("there.yaml").write_text("SEED: 1\n")
    words = words if "DATASETS.TRAIN" in words else (*DATA, *words)
    assert command(*words, options=options) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert Path("there.yaml").read_text() == "SEED: 1\n"
    assert [path.name for path in Path().iterdir()] == ["there.yaml"]


def test_retinanet_reads_its_own_levels():
    cfg = config(
        *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.IN_FEATURES", "['p3', 'p4']"),
        *("MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 11], [16, 22]]"),
    )
    found = anchors.config_anchors(cfg)
    assert (found.strides, found.sizes) == ([8, 16], [[8, 11], [16, 22]])


def test_a_dataset_without_objects_is_refused():
    with pytest.raises(ConfigError, match="has no object"):
        anchors.training_objects(config(*DATA), [record([])], 1)
