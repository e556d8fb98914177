"""A small Mask R-CNN of Detectron2's zoo; ours at (1, 0) has its losses and its detections."""

import copy

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from torch import nn

from dr2net_d2.config import LEAN_PARTS
from dr2net_d2.d2 import Dr2NetBackbone, Dr2NetPyramid, make_lean, register_dataset
from dr2net_d2.d2.zoo import zoo_config
from dr2net_d2.weights.plain_vit import plain_vit_state_dict

DATASET = "small_digits_val_n20_s128_d6"


@pytest.fixture(scope="module")
def images():
    """20 mapped images of SmallDigits with boxes and masks."""
    register_dataset(DATASET)
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge(128)],
        image_format="RGB",
        use_instance_mask=True,
    )
    found = [mapper(row) for row in get_detection_dataset_dicts(DATASET)]
    assert len(found) == 20
    return found


@pytest.fixture(scope="module")
def detectors():
    """(stock, ours) with the same weights, ours with all lean parts."""
    config = zoo_config("common/models/mask_rcnn_vitdet.py").model
    config.backbone.square_pad = 128
    config.backbone.net.update(
        img_size=128, embed_dim=64, depth=6, num_heads=4, window_size=5, drop_path_rate=0.0,
        window_block_indexes=[0, 1, 3, 4], pretrain_img_size=64,
    )  # fmt: skip
    config.proposal_generator.update(pre_nms_topk=(400, 200), post_nms_topk=(200, 50))
    config.roi_heads.update(num_classes=10, batch_size_per_image=64)
    config.roi_heads.box_head.update(conv_dims=[32] * 4, fc_dims=[64])
    config.roi_heads.mask_head.conv_dims = [32] * 5
    config.roi_heads.box_predictor.update(
        input_shape=ShapeSpec(channels=64), test_score_thresh=0.3, test_topk_per_image=20
    )
    torch.manual_seed(0)
    stock = instantiate(config)
    for name, parameter in stock.named_parameters():
        if name.endswith(("rel_pos_h", "rel_pos_w", "pos_embed")):
            nn.init.normal_(parameter, std=0.2)
    config.backbone._target_, config.backbone.net._target_ = Dr2NetPyramid, Dr2NetBackbone
    ours = make_lean(instantiate(config), LEAN_PARTS)
    ours.load_state_dict(stock.state_dict(), strict=True)
    again = copy.deepcopy(stock)
    again.load_state_dict(plain_vit_state_dict(ours), strict=True)
    return again, ours


def test_losses_are_the_same(detectors, images):
    sums = []
    for model in detectors:
        torch.manual_seed(1)
        model.train()
        with EventStorage():
            losses = [model(images[start : start + 4]) for start in range(0, 20, 4)]
        sums.append({name: [float(part[name]) for part in losses] for name in losses[0]})
    assert {"loss_mask", "loss_box_reg", "loss_rpn_loc"} < sums[0].keys()
    for name, expected in sums[0].items():
        assert sums[1][name] == pytest.approx(expected, rel=1e-4), name


def test_detections_are_the_same(detectors, images):
    found = []
    for model in copy.deepcopy(detectors):
        # Scores far enough apart that rounding does not change their order.
        torch.manual_seed(2)
        nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=2.0)
        with torch.no_grad():
            found.append([model.eval()([image])[0]["instances"] for image in images])
        assert len(found[-1]) == 20
    total = 0
    for expected, actual in zip(*found, strict=True):
        total += len(expected)
        assert len(actual) == len(expected)
        assert torch.equal(actual.pred_classes, expected.pred_classes)
        torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-4)
        boxes = actual.pred_boxes.tensor, expected.pred_boxes.tensor
        torch.testing.assert_close(*boxes, rtol=0, atol=1e-2)
        # A pixel with a probability near 1/2 may fall on either side.
        assert (actual.pred_masks != expected.pred_masks).float().mean() < 1e-4
    assert total >= 100
