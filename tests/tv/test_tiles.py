"""Tiles, jittering and painted regions in the torchvision engine."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch

from dr2net_d2.data import CocoRecord, read_image
from dr2net_d2.data.tiling import Grid, TileChoice
from dr2net_d2.errors import ConfigError
from dr2net_d2.evaluation import RESULTS_FILE
from dr2net_d2.inference.torchvision import TorchvisionPredictor
from dr2net_d2.tv import engine
from dr2net_d2.tv.dataset import Jitter, TrainingStream, choose_training_tiles, load_split
from dr2net_d2.tv.model import build_model

TILES = ("INPUT.TILES.ENABLED", "True", "INPUT.TILES.SIZE", "64")
SLICES = ("TEST.TILES.ENABLED", "True", "TEST.TILES.SIZE", "64")


def record(folder, boxes, iscrowd, height=40, width=60):
    """A black image whose objects, apart from each other, are white."""
    image = np.zeros((height, width, 3), np.uint8)
    for x0, y0, x1, y1 in boxes:
        image[y0:y1, x0:x1] = 255
    cv2.imwrite(str(folder / "image.png"), image)
    count = len(boxes)
    return CocoRecord(
        file_name=str(folder / "image.png"),
        image_id=1,
        height=height,
        width=width,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.arange(count),
        iscrowd=np.array(iscrowd, dtype=bool),
    )


def stream(records, flip=False, **options):
    return TrainingStream(
        records,
        shortest_sides=(0,),
        longest_side=1000,
        flip=flip,
        channel_order="BGR",
        seed=1,
        **options,
    )


def test_tiles_show_their_pixels_and_objects_and_paint_what_they_cut(tmp_path):
    # In tiles of 30 px, from x = 0, 30 and y = 0, 10: the second is cut by the border at x = 30.
    own = record(tmp_path, [[2, 3, 12, 8], [27, 20, 40, 30], [50, 35, 60, 40]], [0, 0, 0])
    tiles = choose_training_tiles([own], TileChoice(Grid(30, 0.0), 0.4, 1.0), seed=0)
    data = stream([own], tiles=tiles, pixel_mean=(9.6, 20, 30))
    seen = {}
    for position in range(len(tiles)):
        image, target = data[position]
        # Each tile once in a pass.
        corners = data.tiles[data._order[position]].corners
        seen[corners] = target
        assert image.shape == (3, 30, 30) and image.is_contiguous()
        x0, y0, x1, y1 = corners
        expected = read_image(own)[y0:y1, x0:x1].transpose(2, 0, 1).copy()
        if x0 == 0:
            expected[:, max(20 - y0, 0) : 30 - y0, 27:30] = np.array([10, 20, 30])[:, None, None]
        np.testing.assert_array_equal(image, expected)
    assert {corners: t["labels"].tolist() for corners, t in seen.items()} == {
        (0, 0, 30, 30): [1],
        (30, 0, 60, 30): [2],
        (30, 10, 60, 40): [2, 3],
        **({(0, 10, 30, 40): []} if len(seen) == 4 else {}),
    }
    assert seen[30, 10, 60, 40]["boxes"].tolist() == [[0, 10, 10, 20], [20, 25, 30, 30]]


def test_ignored_regions_are_painted_if_asked_and_objects_in_them_not(tmp_path):
    boxes = [[2, 3, 12, 8], [4, 4, 20, 30]]
    own = record(tmp_path, boxes, [0, 1])
    before, target = stream([own], pixel_mean=(50, 50, 50))[0]
    assert before.unique().tolist() == [0, 255] and target["labels"].tolist() == [1]
    after, target = stream([own], pixel_mean=(50, 50, 50), fill_ignored=True)[0]
    expected = torch.from_numpy(read_image(own).transpose(2, 0, 1).copy())
    expected[:, 4:30, 4:20] = 50
    expected[:, 3:8, 2:12] = 255
    assert torch.equal(after, expected) and target["labels"].tolist() == [1]

    @dataclasses.dataclass(frozen=True, eq=False)
    class WithRegions(CocoRecord):
        ignore_regions: np.ndarray = dataclasses.field(
            default_factory=lambda: np.array([[40, 0, 99, 10]], np.float32)
        )

    fields = {f.name: getattr(own, f.name) for f in dataclasses.fields(CocoRecord)}
    fields.pop("ignore_regions", None)
    image, _ = stream([WithRegions(**fields)], pixel_mean=(50, 50, 50), fill_ignored=True)[0]
    expected[:, :10, 40:] = 50
    assert torch.equal(image, expected)


def test_jittering_keeps_boxes_on_their_pixels(tmp_path):
    own = record(tmp_path, [[10, 10, 20, 18]], [0], 40, 40)
    data = stream([own], flip=True, jitter=Jitter(64, 0.5, 4.0))
    sizes, cropped_away = set(), 0
    for position in range(40):
        image, target = data[position]
        assert max(image.shape[1:]) <= 64
        sizes.add(image.shape[1])
        white = (image[0] > 127).nonzero()
        if not len(white):
            # Gone, or a sliver that has no pixel of its own.
            sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
            assert not len(sides) or sides.min() < 1
            cropped_away += 1
            continue
        x0, y0, x1, y1 = target["boxes"][0].tolist()
        edges = [*white.amin(0).flip(0).tolist(), *(white.amax(0).flip(0) + 1).tolist()]
        assert edges == pytest.approx([x0, y0, x1, y1], abs=1)
    assert min(sizes) < 45 and 64 in sizes and len(sizes) > 3
    assert 0 < cropped_away < 25


def test_a_training_on_tiles_with_sliced_evaluations(arguments, tmp_path, dataset_cache, caplog):
    datasets = (
        *("DATASETS.TRAIN", "('small_digits_train_n2_s128x160_d8',)"),
        *("DATASETS.TEST", "('small_digits_val_n2_s128x160_d8',)"),
    )
    opts = (*TILES, *SLICES, *datasets, "INPUT.FILL_IGNORED", "True", "SOLVER.MAX_ITER", "2")
    epochs = ("MODEL.DR2NET.SCHEDULE.UNIT", "epochs", "MODEL.DR2NET.SCHEDULE.DURATION", "0.2")
    with caplog.at_level("INFO"):
        engine.run(arguments(*opts, *epochs, "OUTPUT_DIR", str(tmp_path)))
    records = load_split("small_digits_train_n2_s128x160_d8").content.records
    tiles = choose_training_tiles(records, TileChoice(Grid(64, 0.25), 0.4, 0.1), 1)
    assert f"{len(tiles)} training tiles, " in caplog.text
    assert 2 * 4 < len(tiles) <= 2 * 12
    results = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert len(results) > 10
    # From all over the image.
    assert max(row["bbox"][0] for row in results) > 100 > 40 > min(r["bbox"][0] for r in results)


def test_the_predictor_goes_over_tiles(tiny_cfg, tmp_path, dataset_cache):
    torch.manual_seed(0)
    model = build_model(tiny_cfg()).eval()
    model.backbone.net.coefficients.set(0.5, 0.5)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    weights = ("MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    small, large = (
        read_image(load_split(f"small_digits_val_n1_s{side}_d4").content.records[0])
        for side in (64, 128)
    )
    plain, sliced = (TorchvisionPredictor(tiny_cfg(*weights, *opts)) for opts in ((), SLICES))
    # One tile: the detector's own answer, but for the second suppression.
    one, other = plain.detect(small), sliced.detect(small)
    assert {*map(tuple, other.boxes.tolist())} <= {*map(tuple, one.boxes.tolist())}
    assert len(other.boxes) > 0.5 * len(one.boxes)
    found = sliced.detect(large)
    # Boxes no longer than a tile, or those of the whole image, all over it.
    assert found.boxes.max() > 100 and len(found.boxes) == len(found.labels)
    assert (np.diff(found.scores) <= 0).all() and set(found.labels) <= set(range(10))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ((*TILES, "INPUT.TILES.SIZE", "0"), r"INPUT.TILES.SIZE is 0; it must be at least 1"),
        (
            (*SLICES, "TEST.TILES.OVERLAP", "1.0"),
            r"TEST.TILES.OVERLAP is 1.0; it must be at least 0 and below 1",
        ),
        (
            ("INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.MIN_SCALE", "3.0"),
            r"INPUT.LSJ has IMAGE_SIZE 1024 and scales 3.0 to 2.0",
        ),
    ],
)
def test_settings_that_cannot_be_are_config_errors(tiny_cfg, opts, message):
    with pytest.raises(ConfigError, match=message):
        tiny_cfg(*opts)
