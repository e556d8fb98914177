"""Our backbones against Detectron2's own, with the same weights, and inside its detectors."""

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import vit as stock
from detectron2.utils.events import EventStorage
from torch import nn

from dr2net_d2.errors import ConfigError
from dr2net_d2.weights.plain_vit import plain_vit_state_dict
from tests.d2.tiny import batch, tiny_cfg

OURS, THEIRS = "build_dr2net_vitdet_backbone", "build_vitdet_backbone"
VIT_ALONE = (
    "MODEL.RPN.IN_FEATURES", ["last_feat"],
    "MODEL.ROI_HEADS.IN_FEATURES", ["last_feat"],
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16]],
)  # fmt: skip


def backbone(folder, name, *opts):
    torch.manual_seed(0)
    built = build_backbone(tiny_cfg(folder, "MODEL.BACKBONE.NAME", name, *opts))
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    return built


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.VIT.USE_REL_POS", True),
        ("MODEL.VIT.USE_REL_POS", False),
        ("MODEL.VIT.PRETRAIN_IMG_SIZE", 64, "MODEL.VIT.PRETRAIN_USE_CLS_TOKEN", False),
        ("MODEL.VIT.USE_ABS_POS", False, "MODEL.VIT.WINDOW_BLOCK_INDEXES", []),
        ("MODEL.VIT.SCALE_FACTORS", [4.0, 2.0, 1.0, 0.5], "MODEL.VIT.QKV_BIAS", False),
    ],
    ids=["rel_pos", "no_rel_pos", "no_cls_token", "no_abs_pos_no_windows", "four_levels"],
)
def test_with_one_state_dict_outputs_and_gradients_agree(tmp_path, opts, size, reversible):
    opts = ("MODEL.VIT.DROP_PATH_RATE", 0.0, "MODEL.DR2NET.REVERSIBLE", reversible, *opts)
    theirs, ours = backbone(tmp_path, THEIRS, *opts), backbone(tmp_path, OURS, *opts)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, *size)

    results = []
    for network in (theirs, ours):
        features = network(images)
        loss = sum((feature**2).mean() for feature in features.values())
        loss.backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        results.append((features, gradients))
    (expected, expected_gradients), (actual, gradients) = results
    assert list(actual) == list(expected)
    for name, feature in expected.items():
        torch.testing.assert_close(actual[name], feature, rtol=1e-5, atol=1e-5)
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, rtol=0, atol=1e-4)


def test_a_level_of_stride_2_leaves_the_names_and_values_of_the_others(tmp_path):
    """Detectron2's pyramid lacks this level: its weights load, all but the new level."""
    patch = ("MODEL.VIT.PATCH_SIZE", 16, "MODEL.VIT.DROP_PATH_RATE", 0.0)
    theirs = backbone(tmp_path, THEIRS, *patch, "MODEL.VIT.SCALE_FACTORS", [4.0, 2.0, 1.0])
    finer = (*patch, "MODEL.VIT.SCALE_FACTORS", [8.0, 4.0, 2.0, 1.0])
    ours, stored = backbone(tmp_path, OURS, *finer), backbone(tmp_path, THEIRS, *finer)
    assert isinstance(theirs, stock.SimpleFeaturePyramid)
    assert isinstance(stored.net, stock.ViT)
    missing, left_over = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert left_over == []
    assert missing and all(name.startswith("simfp_1.") for name in missing)
    stored.load_state_dict(plain_vit_state_dict(ours), strict=True)

    images = torch.randn(1, 3, 64, 48)
    levels = ours(images)
    assert {name: shape.stride for name, shape in ours.output_shape().items()} == {
        "p1": 2, "p2": 4, "p3": 8, "p4": 16, "p5": 32,
    }  # fmt: skip
    assert levels["p1"].shape == (1, 16, 32, 24)
    for network in (theirs, stored):
        for name, level in network(images).items():
            torch.testing.assert_close(levels[name], level, rtol=1e-5, atol=1e-5)


def test_our_weights_load_strictly_into_detectron2s_network(tmp_path):
    ours, theirs = backbone(tmp_path, OURS), backbone(tmp_path, THEIRS)
    nn.init.zeros_(theirs.net.pos_embed)
    theirs.load_state_dict(plain_vit_state_dict(ours), strict=True)
    torch.testing.assert_close(theirs.net.pos_embed, ours.net.pos_embed)


def test_our_vit_fits_into_detectron2s_own_pyramid(tmp_path):
    vit = backbone(tmp_path, "build_dr2net_vit_backbone")
    pyramid = stock.SimpleFeaturePyramid(vit, "last_feat", 16, (2.0, 1.0))
    assert list(pyramid(torch.randn(1, 3, 64, 64))) == ["p2", "p3"]


@pytest.mark.parametrize(
    ("ours", "theirs", "opts"),
    [
        (OURS, THEIRS, ()),
        ("build_dr2net_vit_backbone", "build_vit_backbone", VIT_ALONE),
    ],
)
def test_detectors_differ_by_one_word_of_the_config_and_agree(tmp_path, ours, theirs, opts):
    opts = ("MODEL.VIT.DROP_PATH_RATE", 0.0, *opts)
    models = [
        build_model(tiny_cfg(tmp_path, "MODEL.BACKBONE.NAME", name, *opts))
        for name in (theirs, ours)
    ]
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    assert models[0].backbone.output_shape() == models[1].backbone.output_shape()
    losses, detections = [], []
    for model in models:
        torch.manual_seed(1)
        with EventStorage():
            losses.append(model.train()(batch((64, 56), (48, 64))))
        with torch.no_grad():
            detections.append(model.eval()(batch((50, 61)))[0]["instances"])
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-5)
    expected, actual = (found.pred_boxes.tensor for found in detections)
    assert len(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.VIT.NUM_HEADS", 5), r"MODEL.VIT.*embed_dim 32 .* num_heads 5"),
        (("MODEL.VIT.WINDOW_BLOCK_INDEXES", [7]), r"MODEL.VIT.*indexes below depth 2"),
        (("MODEL.VIT.SCALE_FACTORS", [3.0]), r"MODEL.VIT: scale factor 3.0"),
        (("MODEL.DR2NET.ARITHMETIC", "decimal"), r"MODEL.DR2NET: arithmetic is 'decimal'"),
    ],
)
def test_values_that_do_not_fit_are_config_errors(tmp_path, opts, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(tiny_cfg(tmp_path, *opts))


def test_the_dr2net_keys_reach_the_backbone(tmp_path):
    opts = ("MODEL.DR2NET.ARITHMETIC", "float", "MODEL.DR2NET.REVERSIBLE", False)
    opts += ("MODEL.DR2NET.FIRST_STATE", "zero", "MODEL.DR2NET.OUTPUT", "mean")
    vit = backbone(tmp_path, OURS, *opts).net
    assert (vit.arithmetic, vit.reversible) == ("float", False)
    assert (vit.blocks.first_state, vit.blocks.output) == ("zero", "mean")
    assert vit.blocks[0].norm1.eps == 1e-6
