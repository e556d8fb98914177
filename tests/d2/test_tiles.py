"""Tiles in Detectron2: dataset dicts, the mapper, sliced evaluation, and a comparison to SAHI."""

import copy
import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.structures import BoxMode
from sahi.predict import get_sliced_prediction

from dr2net_d2.d2 import run
from dr2net_d2.d2.data import CheckedMapper, register_dataset, skip_batches, tile_dicts
from dr2net_d2.d2.sahi import SahiModel
from dr2net_d2.d2.sliced_detector import SlicedDetector, check_tiles
from dr2net_d2.d2.yaml_experiment import YamlExperiment
from dr2net_d2.data import tiling
from dr2net_d2.data.slicing import Slicing
from dr2net_d2.data.tiling import Grid
from dr2net_d2.errors import ConfigError, DatasetError
from dr2net_d2.inference.detectron2 import Detectron2Predictor
from tests.d2.tiny import arguments, save_detector, tiny_cfg

TILES = ("INPUT.TILES.ENABLED", True, "INPUT.TILES.SIZE", 64)
SLICES = ("TEST.TILES.ENABLED", True, "TEST.TILES.SIZE", 64)
LARGE = "small_digits_train_n2_s128x160_d8"


def decoded(segmentation):
    """The mask of polygons in an image of 128 x 160 pixels."""
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(segmentation, 128, 160)))


def test_a_tile_has_the_pixels_boxes_and_masks_of_its_part_of_the_image(tmp_path):
    """Compared to slices of the image and of the decoded masks."""
    register_dataset(LARGE)
    cfg = tiny_cfg(
        tmp_path, *TILES, "MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask",
        "INPUT.MIN_SIZE_TRAIN", [0], "INPUT.RANDOM_FLIP", "none", "MODEL.PIXEL_MEAN", [9.6, 20, 30],
    )  # fmt: skip
    mapper = CheckedMapper(cfg, True)
    tiles = tile_dicts(LARGE, size=64, overlap=0.25, min_visible=0.4, empty_ratio=1.0)
    originals = {row["file_name"]: row for row in DatasetCatalog.get(LARGE)}
    compared = painted = 0
    for row in tiles:
        before = copy.deepcopy(row)
        sample = mapper(row)
        assert row == before
        x0, y0, x1, y1 = row["tile"]
        assert (sample["width"], sample["height"]) == (x1 - x0, y1 - y0) == (64, 64)
        expected = cv2.imread(row["file_name"])[y0:y1, x0:x1].copy()
        truth = originals[row["file_name"]]["annotations"]
        masks = [decoded(a["segmentation"])[y0:y1, x0:x1] for a in truth]
        areas = [a["bbox"][2] * a["bbox"][3] for a in truth]
        shown, cut = [], []
        for index, (annotation, area) in enumerate(zip(truth, areas, strict=True)):
            x, y, w, h = annotation["bbox"]
            near, far = np.maximum((x, y), (x0, y0)), np.minimum((x + w, y + h), (x1, y1))
            inside = (far - near).clip(0).prod()
            if inside:
                (shown if inside >= 0.4 * area else cut).append(index)
                if inside < 0.4 * area:
                    (left, top), (right, bottom) = near.astype(int), far.astype(int)
                    expected[top - y0 : bottom - y0, left - x0 : right - x0] = (10, 20, 30)
        own = [masks[index] for index in shown]
        for index in shown:  # no pixel in the box of a shown object is painted
            x, y, w, h = map(int, truth[index]["bbox"])
            part = np.s_[max(y - y0, 0) : max(y + h - y0, 0), max(x - x0, 0) : max(x + w - x0, 0)]
            expected[part] = cv2.imread(row["file_name"])[y0:y1, x0:x1][part]
        np.testing.assert_array_equal(sample["image"].numpy(), expected.transpose(2, 0, 1))
        instances = sample["instances"]
        visible = [mask for mask in own if mask.any()]
        assert len(instances) == len(visible)
        theirs = instances.gt_masks.tensor.numpy() if visible else []
        for mask, other in zip(visible, theirs, strict=True):
            np.testing.assert_array_equal(other, mask.astype(bool))
            compared += 1
        painted += len(cut)
    assert compared > 15 and painted > 2


def test_ignored_regions_and_crowds_are_painted_if_asked(tmp_path):
    image = np.zeros((40, 60, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    boxes = ([0, 0, 20, 20], [10, 10, 20, 20])
    row = {
        "file_name": str(tmp_path / "a.png"), "height": 40, "width": 60,
        "ignore_regions": [[30, 30, 99, 99]],
        "annotations": [
            {"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 1 - i}
            for i, b in enumerate(boxes)
        ],
    }  # fmt: skip
    sizes = ("INPUT.MIN_SIZE_TRAIN", [0], "INPUT.RANDOM_FLIP", "none")
    for filled in (False, True):
        cfg = tiny_cfg(tmp_path, *sizes, "INPUT.FILL_IGNORED", filled)
        sample = CheckedMapper(cfg, True)(row)
        expected = np.zeros((40, 60, 3))
        if filled:
            colour = np.rint(cfg.MODEL.PIXEL_MEAN)
            expected[:20, :20] = expected[30:, 30:] = colour
            expected[10:20, 10:20] = 0
        np.testing.assert_array_equal(sample["image"].numpy(), expected.transpose(2, 0, 1))
        assert sample["instances"].gt_boxes.tensor.tolist() == [[10, 10, 20, 20]]
        test = CheckedMapper(cfg, False)(row)
        assert test["image"].max() == 0


def test_tiles_need_the_size_of_an_image():
    DatasetCatalog.register("sizeless", lambda: [{"file_name": "a.png", "annotations": []}])
    with pytest.raises(DatasetError, match=r"image a.png has no 'height' in its dataset"):
        tile_dicts("sizeless", 64, filter_empty=False)


def test_a_loader_of_tiles_continues_where_it_was_cut_off(tmp_path):
    cfg = tiny_cfg(tmp_path, *TILES, "DATASETS.TRAIN", [LARGE], "INPUT.RANDOM_FLIP", "none")
    register_dataset(LARGE)

    def tiles(skipped, batches):
        loader = build_detection_train_loader(
            cfg, mapper=CheckedMapper(cfg, True), dataset=tile_dicts(LARGE, 64), seed=1
        )
        skip_batches(loader, skipped)
        stream = iter(loader)
        return [[(s["file_name"], s["tile"]) for s in next(stream)] for _ in range(batches)]

    assert tiles(3, 4) == tiles(0, 7)[3:]


def test_a_training_on_tiles_with_sliced_evaluations(tmp_path):
    """Epochs are counted in tiles, and detections lie all over the image."""
    opts = (*TILES, *SLICES, "DATASETS.TRAIN", [LARGE], "DATASETS.TEST", [LARGE])
    schedule = ("MODEL.DR2NET.SCHEDULE.UNIT", "epochs", "MODEL.DR2NET.SCHEDULE.DURATION", 0.1)
    args = arguments(tmp_path, *opts, *schedule, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 0)
    count = len(tile_dicts_of_large())
    assert YamlExperiment(args).settings.schedule.duration == pytest.approx(0.1 * count / 4)
    run(args)
    file = tmp_path / "output/inference/coco_instances_results.json"
    results = json.loads(file.read_text())
    lefts = [row["bbox"][0] for row in results]
    assert len(results) > 10 and min(lefts) < 40 and max(lefts) > 100


def tile_dicts_of_large():
    register_dataset(LARGE)
    return tile_dicts(LARGE, 64, seed=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Overrides for the checkpoint of a detector at beta 1/2, and the detector."""
    folder = tmp_path_factory.mktemp("trained")
    model = save_detector(folder / "model.pth")
    return ("MODEL.WEIGHTS", folder / "model.pth"), model


@pytest.fixture
def canvas():
    register_dataset(LARGE)
    return cv2.imread(DatasetCatalog.get(LARGE)[0]["file_name"])


def by_hand(model, image, tile):
    """The detections in one tile, without resizing, in pixels of the whole image."""
    x0, y0, x1, y1 = tile
    pixels = torch.as_tensor(image[y0:y1, x0:x1].transpose(2, 0, 1).copy())
    with torch.no_grad():
        found = model([{"image": pixels, "height": y1 - y0, "width": x1 - x0}])[0]["instances"]
    return [
        (*(box + torch.tensor([x0, y0, x0, y0])).tolist(), score, label)
        for box, score, label in zip(
            found.pred_boxes.tensor, found.scores.tolist(), found.pred_classes.tolist(), strict=True
        )
    ]


def rows_of(found):
    triples = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return sorted((*box, score, label) for box, score, label in triples)


def test_without_merging_it_is_the_detector_on_each_tile(trained, tmp_path, canvas, monkeypatch):
    opts, model = trained
    monkeypatch.setattr(tiling, "BORDER", -1e9)
    merging = ("TEST.TILES.MERGE_THRESH", 1.0, "TEST.DETECTIONS_PER_IMAGE", 10**6)
    whole = ("TEST.TILES.WHOLE_IMAGE", False, "TEST.TILES.BATCH_SIZE", 1)
    found = Detectron2Predictor(tiny_cfg(tmp_path, *opts, *SLICES, *merging, *whole)).detect(canvas)
    tiles = Grid(64, 0.25).tiles(128, 160).tolist()
    model.roi_heads.box_predictor.test_topk_per_image = 10**6
    expected = sorted({row for tile in tiles for row in by_hand(model, canvas, tile)})
    model.roi_heads.box_predictor.test_topk_per_image = 100
    np.testing.assert_allclose(sorted({*rows_of(found)}), expected, rtol=1e-4, atol=1e-3)


def test_sahis_own_suppression_gives_the_same(trained, tmp_path, canvas, monkeypatch):
    """If borders drop nothing: SAHI's tiles, its whole image and its NMS."""
    opts, _ = trained
    monkeypatch.setattr(tiling, "BORDER", -1e9)
    many = ("TEST.DETECTIONS_PER_IMAGE", 1000)
    sliced = Detectron2Predictor(tiny_cfg(tmp_path, *opts, *many, *SLICES))
    plain = Detectron2Predictor(tiny_cfg(tmp_path, *opts, *many))
    result = get_sliced_prediction(
        canvas[..., ::-1].copy(), SahiModel(model=plain, confidence_threshold=0.0),
        slice_height=64, slice_width=64, overlap_height_ratio=0.25, overlap_width_ratio=0.25,
        postprocess_type="NMS", postprocess_match_metric="IOU", postprocess_match_threshold=0.5,
        verbose=0,
    )  # fmt: skip
    best = sorted(result.object_prediction_list, key=lambda row: -row.score.value)[:1000]
    theirs = {row_at_a_pixel(row.bbox.to_xyxy(), row.category.id) for row in best}
    ours = sliced.detect(canvas)
    found = {row_at_a_pixel(*pair) for pair in zip(ours.boxes, ours.labels, strict=True)}
    assert len(found) > 300
    # The scores of an untrained detector are nearly equal, so rounding decides about some.
    assert len(found & theirs) > 0.9 * max(len(found), len(theirs))


def row_at_a_pixel(box, label):
    return (*(round(float(value)) for value in box), int(label))


def test_the_sliced_detector_keeps_the_mode_of_its_model(tmp_path, trained):
    _, model = trained
    slicing = Slicing(Grid(64, 0.25))
    assert not SlicedDetector(model, slicing).training
    assert SlicedDetector(copy.deepcopy(model).train(), slicing).training


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ((*TILES, "INPUT.TILES.OVERLAP", 1.0), r"INPUT.TILES: SIZE is 64 and OVERLAP 1"),
        (
            (*TILES, "MODEL.LOAD_PROPOSALS", True),
            r"INPUT.TILES.ENABLED .* MODEL.LOAD_PROPOSALS",
        ),
        (
            (*TILES, "DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"),
            r"DATALOADER.SAMPLER_TRAIN, which is WeightedTrainingSampler",
        ),
        ((*SLICES, "TEST.TILES.SIZE", 0), r"TEST.TILES: SIZE is 0"),
        (
            (*SLICES, "TEST.AUG.ENABLED", True),
            r"TEST.TILES.ENABLED and TEST.AUG.ENABLED are both True",
        ),
    ],
)
def test_impossible_tiles_are_config_errors(tmp_path, opts, message):
    with pytest.raises(ConfigError, match=message):
        check_tiles(tiny_cfg(tmp_path, *opts))


def test_masks_are_not_merged(tmp_path):
    opts = (*SLICES, "MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    with pytest.raises(ConfigError, match=r"finds masks as well; set MODEL.MASK_ON False"):
        YamlExperiment(arguments(tmp_path, *opts))
