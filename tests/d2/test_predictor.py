"""Detectron2's detectors in use: predictors, large images, augmentation, SAHI, the commands."""

import json
import math
from pathlib import Path

import cv2
import detectron2
import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import DefaultPredictor
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import vit as stock
from detectron2.utils.events import EventStorage
from sahi.predict import get_sliced_prediction

from dr2net_d2 import export
from dr2net_d2.d2 import Dr2NetBackbone, Predictor, run
from dr2net_d2.d2.backbone import without_cropping
from dr2net_d2.d2.sahi import SahiModel
from dr2net_d2.data import load_coco, resolve_dataset
from dr2net_d2.errors import ConfigError, WeightsError
from dr2net_d2.inference import demo
from dr2net_d2.inference.detectron2 import Detectron2Predictor
from dr2net_d2.weights.plain_vit import plain_vit_state_dict
from tests.d2.tiny import arguments, batch, save_detector, tiny_cfg, write_yaml

BACKBONES = [f"build_{name}_backbone" for name in ("dr2net_vitdet", "vitdet", "dr2net_vit", "vit")]
VIT_ALONE = (
    "MODEL.RPN.IN_FEATURES", ["last_feat"],
    "MODEL.ROI_HEADS.IN_FEATURES", ["last_feat"],
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16]],
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Overrides for a checkpoint of the tiny detector, in RGB and at beta 1/2; and the detector."""
    folder = tmp_path_factory.mktemp("trained")
    model = save_detector(folder / "model.pth")
    return ("MODEL.WEIGHTS", folder / "model.pth", "INPUT.FORMAT", "RGB"), model


@pytest.fixture(scope="module")
def canvas():
    """A BGR image, 96 x 160 pixels."""
    json_file, images = resolve_dataset("small_digits_val_n1_s96x160_d6")
    return cv2.imread(load_coco(json_file, images).records[0].file_name)


def by_hand(model, image):
    """What an RGB model detects in a BGR image that needs no resizing."""
    pixels = torch.as_tensor(image[..., ::-1].transpose(2, 0, 1).copy())
    height, width = image.shape[:2]
    with torch.no_grad():
        found = model([{"image": pixels, "height": height, "width": width}])[0]["instances"]
    assert len(found) > 3
    return found


def assert_same(found, expected):
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("predictor_class", [DefaultPredictor, Predictor])
def test_predictors_use_the_weights_their_coefficients_and_the_channel_order(
    trained, tmp_path, canvas, predictor_class
):
    opts, model = trained
    image = np.ascontiguousarray(canvas[:64, :64])
    predictor = predictor_class(tiny_cfg(tmp_path, *opts))
    assert predictor.model.backbone.net.coefficients.values == (0.5, 0.5)
    assert_same(predictor(image)["instances"], by_hand(model, image))
    # Larger images are resized to INPUT.MAX_SIZE_TEST; boxes are in pixels of the original image.
    large = predictor(canvas)["instances"]
    assert large.image_size == canvas.shape[:2]
    assert large.pred_boxes.tensor[:, 2].max() > 100


def test_our_predictor_knows_its_categories_and_gives_arrays(trained, tmp_path, canvas):
    opts, model = trained
    predictor = Detectron2Predictor(tiny_cfg(tmp_path, *opts))
    assert predictor.class_names == tuple("0123456789")
    image = np.ascontiguousarray(canvas[:64, :64])
    found, expected = predictor.detect(image), by_hand(model, image)
    np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor, rtol=1e-5, atol=1e-3)
    assert (found.labels == expected.pred_classes.numpy()).all() and found.masks is None
    coco = tiny_cfg(tmp_path, *opts, "DATASETS.TEST", ["coco_2017_val"])
    # COCO has 80 categories, so the names come from DATASETS.TRAIN.
    assert Predictor(coco).class_names == tuple("0123456789")


def test_our_predictor_gives_masks(tmp_path, canvas):
    opts = ("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1)
    opts += ("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    model = build_model(tiny_cfg(tmp_path, *opts))
    torch.save(model.state_dict(), tmp_path / "mask.pth")
    cfg = tiny_cfg(tmp_path, *opts, "MODEL.WEIGHTS", tmp_path / "mask.pth")
    found = Detectron2Predictor(cfg).detect(canvas)
    assert found.masks.shape == (len(found.boxes), *canvas.shape[:2])
    assert found.masks.dtype == bool and len(found.boxes)


def test_our_predictor_refuses_what_is_no_whole_detector(trained, tmp_path):
    _, model = trained
    state = model.state_dict()
    torch.save(plain_vit_state_dict(model.backbone.net), tmp_path / "vit.pth")
    cut = {key: value for key, value in state.items() if "box_predictor" not in key}
    torch.save({"model": cut}, tmp_path / "cut.pth")
    for name, message in (("vit", "a backbone or another"), ("cut", "missing roi_heads.box_pred")):
        with pytest.raises(WeightsError, match=message):
            Predictor(tiny_cfg(tmp_path, "MODEL.WEIGHTS", tmp_path / f"{name}.pth"))


def lazy_model(vit=None, square=64, masks=True):
    """Mask R-CNN of Detectron2's own ViTDet LazyConfig, made small, in evaluation mode."""
    # Read by path: ``model_zoo.get_config`` imports pkg_resources, which setuptools has dropped.
    configs = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    config = LazyConfig.load(str(configs / "common/models/mask_rcnn_vitdet.py")).model
    net = config.backbone.net
    net.update(img_size=64, embed_dim=32, depth=2, num_heads=4, window_size=3)
    net.window_block_indexes, net.drop_path_rate = [0], 0.0
    if vit is not None:
        net._target_ = vit
    config.backbone.out_channels = 16
    config.backbone.square_pad = square
    config.proposal_generator.head.in_channels = 16
    heads = config.roi_heads
    heads.num_classes = 10
    heads.box_predictor.test_score_thresh = 0.0
    heads.box_predictor.input_shape.channels = 16
    heads.box_head.input_shape = heads.mask_head.input_shape = ShapeSpec(16, width=7, height=7)
    heads.mask_head.input_shape.width = heads.mask_head.input_shape.height = 14
    heads.box_head.conv_dims, heads.box_head.fc_dims = [16], [16]
    heads.mask_head.conv_dims = [16, 16]
    if not masks:
        heads.mask_in_features = heads.mask_pooler = heads.mask_head = None
    torch.manual_seed(0)
    return instantiate(config).eval()


@pytest.mark.parametrize("size", [(64, 64), (40, 61)])
def test_a_lazyconfig_model_predicts_with_our_vit_as_with_the_stock_one(size):
    theirs, ours = lazy_model(), lazy_model(Dr2NetBackbone)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    found, expected = (model(batch(size))[0]["instances"] for model in (ours, theirs))
    assert len(expected)
    assert_same(found, expected)
    assert torch.equal(found.pred_masks, expected.pred_masks)


def far_gradients(model, size):
    """Gradients of the scores and of the losses with respect to the last pixel of an image."""
    gradients = []
    for training in (False, True):
        model.train(training)
        inputs = batch(size)
        inputs[0]["image"] = inputs[0]["image"].float().requires_grad_()
        with EventStorage():
            out = model(inputs)
        total = sum(out.values()) if training else out[0]["instances"].scores.sum()
        (gradient,) = torch.autograd.grad(total, inputs[0]["image"])
        gradients.append(gradient[:, -1, -1].abs().max())
    return gradients


@pytest.mark.parametrize("size", [(60, 150), (150, 60)])
@pytest.mark.parametrize("name", BACKBONES)
def test_an_image_beyond_the_square_counts_to_its_last_pixel(tmp_path, name, size):
    opts = ("MODEL.BACKBONE.NAME", name, "MODEL.VIT.SQUARE_PAD", 64)
    opts += VIT_ALONE if name.endswith("vit_backbone") else ()
    torch.manual_seed(0)
    model = build_model(tiny_cfg(tmp_path, *opts, "MODEL.DR2NET.LEAN", []))
    assert min(far_gradients(model, size)) > 0
    # Two images in one batch, one higher and one wider than the other.
    assert model.preprocess_image(batch((60, 150), (70, 20))).tensor.shape[-2:] == (128, 192)


@pytest.mark.parametrize("vit", [None, Dr2NetBackbone])
def test_detectron2s_own_pyramid_crops_images_until_without_cropping(vit):
    size = (60, 150)
    assert far_gradients(lazy_model(vit, masks=False), size) == [0, 0]
    model = without_cropping(lazy_model(vit, masks=False))
    assert min(far_gradients(model, size)) > 0
    assert model.preprocess_image(batch(size)).tensor.shape[-2:] == (64, 192)
    # Images within the square are padded as before; without a square, to whole strides.
    assert model.preprocess_image(batch((30, 64))).tensor.shape[-2:] == (64, 64)
    model = without_cropping(lazy_model(vit, square=0))
    assert isinstance(model.backbone, stock.SimpleFeaturePyramid)
    assert model.preprocess_image(batch((33, 65))).tensor.shape[-2:] == (64, 96)


AUGMENTED = ("TEST.AUG.ENABLED", True, "MODEL.VIT.SQUARE_PAD", 64, "SOLVER.MAX_ITER", 2)


def detections(folder, name):
    return json.loads((folder / "output" / name / "coco_instances_results.json").read_text())


def test_augmentation_that_changes_nothing_gives_the_same_detections(trained, tmp_path):
    opts = (*trained[0], *AUGMENTED, "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.FLIP", False)
    results = run(arguments(tmp_path, *opts, eval_only=True))
    assert list(results) == ["bbox", "bbox_TTA"]
    assert results["bbox_TTA"] == pytest.approx(results["bbox"], nan_ok=True)
    plain, augmented = (detections(tmp_path, name) for name in ("inference", "inference_TTA"))
    assert len(plain) == len(augmented) > 20
    for row, other in zip(plain, augmented, strict=True):
        assert row["category_id"] == other["category_id"]
        assert row["bbox"] == pytest.approx(other["bbox"], abs=0.01)


def test_augmentation_beyond_the_square_after_training(tmp_path):
    """Augmented sizes of 64 and 96 pixels, each also flipped; the square has 64."""
    opts = (*AUGMENTED, "TEST.AUG.MIN_SIZES", (64, 96), "TEST.AUG.MAX_SIZE", 200)
    results = run(arguments(tmp_path, *opts, "TEST.EVAL_PERIOD", 1))
    assert list(results) == ["bbox", "bbox_TTA"]
    assert detections(tmp_path, "inference") != detections(tmp_path, "inference_TTA")
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    values = [row["bbox_TTA/AP"] for row in map(json.loads, lines) if "bbox_TTA/AP" in row]
    assert len(values) == 1 and math.isfinite(values[0])  # once, at the end
    assert (
        max(box["bbox"][0] + box["bbox"][2] for box in detections(tmp_path, "inference_TTA")) <= 64
    )


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 10,
          "MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4"]),
         "a GeneralizedRCNN, and MODEL.META_ARCHITECTURE is RetinaNet"),
        (("MODEL.KEYPOINT_ON", True), "MODEL.KEYPOINT_ON is True"),
        (("TEST.AUG.MIN_SIZES", ()), "TEST.AUG.MIN_SIZES, which is empty"),
    ],
)  # fmt: skip
def test_detectors_that_cannot_be_augmented_are_refused_by_name(tmp_path, opts, message):
    with pytest.raises(ConfigError, match=f"TEST.AUG.ENABLED needs .*{message}"):
        run(arguments(tmp_path, "TEST.AUG.ENABLED", True, *opts))
    assert not (tmp_path / "output").exists()


def test_sahi_drives_a_predictor_slice_by_slice(trained, tmp_path, canvas):
    opts, model = trained
    detector = SahiModel(model=Predictor(tiny_cfg(tmp_path, *opts)), confidence_threshold=0.05)
    result = get_sliced_prediction(
        canvas[..., ::-1].copy(),
        detector,
        **{"slice_height": 64, "slice_width": 64, "perform_standard_pred": False, "verbose": 0},
        **{"overlap_height_ratio": 0, "overlap_width_ratio": 0},
        postprocess_match_threshold=2.0,  # nothing is merged
        force_postprocess_type=True,
    )
    expected = []
    for y in (0, 32):
        for x in (0, 64, 96):
            found = by_hand(model, np.ascontiguousarray(canvas[y : y + 64, x : x + 64]))
            found = found[found.scores >= 0.05]
            boxes = found.pred_boxes.tensor + torch.tensor([x, y, x, y])
            expected.append(torch.column_stack([boxes, 100 * found.scores, found.pred_classes]))
    rows = torch.tensor(
        [
            [*p.bbox.to_xyxy(), 100 * p.score.value, int(p.category.name)]
            for p in result.object_prediction_list
        ]
    )
    expected = torch.cat(expected)
    assert len(rows) == len(expected) > 20
    distances = (rows[:, None] - expected).abs().amax(dim=2)
    assert distances.amin(dim=0).max() < 0.01 and distances.amin(dim=1).max() < 0.01


def test_the_demo_draws_small_digits_above_the_threshold(trained, tmp_path, caplog):
    images = resolve_dataset("small_digits_val_n4_s64_d3")[1]
    caplog.set_level("INFO")
    words = ["--config-file", write_yaml(tmp_path), "--input", str(images)]
    overrides = [str(word) for word in trained[0]]
    counts = []
    for threshold in ("0", "0.99"):
        out = tmp_path / threshold
        options = ["--output", str(out), "--confidence-threshold", threshold, *overrides]
        caplog.clear()
        demo.run(demo.parse_arguments(None, [*words, *options]))
        assert len(list(out.iterdir())) == 4
        assert all(cv2.imread(str(path)).shape == (1024, 1024, 3) for path in out.iterdir())
        counts.append(sum(" 0 objects" in line for line in caplog.messages))
    assert counts == [0, 4]


def test_the_export_command_takes_detectron2s_detectors(trained, tmp_path):
    path = tmp_path / "backbone.pt2"
    words = ["--config-file", write_yaml(tmp_path), "--output", str(path)]
    assert export.main([*words, *map(str, trained[0])]) == 0
    image = torch.randn(1, 3, 64, 64)
    found = torch.export.load(path).module()(image)
    for name, level in trained[1].backbone(image).items():
        torch.testing.assert_close(found[name], level, rtol=1e-4, atol=1e-4)
