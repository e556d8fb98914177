"""Predicted memory of Detectron2's detectors against real iterations on the CPU."""

import pytest
import torch
from detectron2.structures import BitMasks
from detectron2.utils.events import EventStorage

from dr2net_d2.core import reversible_stacks
from dr2net_d2.core.attention_kernels import planned_for
from dr2net_d2.core.memory import count_saved_bytes, peak_tensor_bytes
from dr2net_d2.d2 import build_detector
from dr2net_d2.errors import ConfigError
from dr2net_d2.plan.planner import ARMS, Planner, predict
from dr2net_d2.training.optimizer import build_optimizer
from tests.d2 import tiny

# Enough anchors and proposals match to fill the samples, as the planner assumes.
FULL = [
    *("MODEL.RPN.IOU_THRESHOLDS", "[0.01, 0.02]", "MODEL.RPN.NMS_THRESH", "1.0"),
    *("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.05]", "MODEL.VIT.DROP_PATH_RATE", "0.0"),
]
MASKS = [
    *("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "2", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "6", "INPUT.MASK_FORMAT", "bitmask"),
]
STRIDE_2 = [
    *("MODEL.VIT.PATCH_SIZE", "16", "MODEL.VIT.SCALE_FACTORS", "[8.0, 4.0, 2.0]"),
    *("MODEL.RPN.IN_FEATURES", "['p1', 'p2', 'p3', 'p4']"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['p1', 'p2', 'p3']"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[6], [12], [24], [48]]"),
]
NAMES = {"stock": "build_vitdet_backbone", "dr2net": "build_dr2net_vitdet_backbone"}


def real_iteration(cfg, size, images, objects):
    """(peak bytes beyond parameters, gradients and optimizer state; bytes saved for backward)."""
    torch.manual_seed(0)
    model = build_detector(cfg)
    for stack in reversible_stacks(model):
        stack.coefficients.set(0.5, 0.5)
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["foreach"] = True
    inputs = tiny.batch(*[(size, size)] * images, objects=objects)
    for given in inputs if cfg.MODEL.MASK_ON else ():
        given["instances"].gt_masks = BitMasks(torch.ones(objects, size, size) > 0)
    with EventStorage(), planned_for("cuda"):
        for _ in range(2):  # the first one measures ranges and creates optimizer state
            optimizer.zero_grad()
            sum(model(inputs).values()).backward()
            optimizer.step()
        with count_saved_bytes(exclude=model.parameters()) as saved:
            model(inputs)
        with peak_tensor_bytes(["gradients"]) as live:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(
                    lambda p: live.assign([p.grad], "gradients")
                )
            # On a GPU these are copies that are freed after the forward.
            live.assign((given["image"] for given in inputs), "images")
            for given in inputs if cfg.MODEL.MASK_ON else ():
                live.assign([given["instances"].gt_masks.tensor], "masks")
            loss = sum(model(inputs).values())
            inputs.clear()
            given = None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return live.beyond, saved.total


@pytest.mark.parametrize("words", [[], MASKS, STRIDE_2], ids=["boxes", "masks", "stride 2"])
@pytest.mark.parametrize("arm", ["stock", "dr2net"])
def test_a_real_iteration_takes_what_is_predicted(tmp_path, arm, words):
    name = ["MODEL.BACKBONE.NAME", NAMES[arm]]
    cfg = tiny.tiny_cfg(tmp_path, *FULL, *words, *name)
    beyond, saved = real_iteration(cfg, 128, 2, objects=6)
    found = predict(cfg, arm, 128, 2, objects=6, coefficients=(0.5, 0.5))
    assert found.saved == pytest.approx(saved, rel=0.001)
    assert found.beyond == pytest.approx(beyond, rel=0.01)


def test_all_arms_under_autocast_and_with_polygons(tmp_path):
    polygons = ["INPUT.MASK_FORMAT", "polygon", "SOLVER.AMP.ENABLED", "True"]
    cfg = tiny.tiny_cfg(tmp_path, *MASKS, *polygons)
    before = cfg.dump()
    found = {arm: predict(cfg, arm, 128) for arm in ARMS}
    assert found["stock"].saved > 3 * max(found[arm].saved for arm in ARMS[1:])
    for prediction in found.values():
        assert sum(prediction.parts.values()) == prediction.peak
        assert prediction.parts["heads"] > 0
    assert cfg.dump() == before


def test_a_vit_without_a_pyramid(tmp_path):
    plain = [
        *("MODEL.BACKBONE.NAME", "build_dr2net_vit_backbone", "MODEL.RPN.IN_FEATURES"),
        *('["last_feat"]', "MODEL.ROI_HEADS.IN_FEATURES", '["last_feat"]'),
        *("MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 16]]"),
    ]
    without = predict(tiny.tiny_cfg(tmp_path, *plain), "dr2net", 128)
    assert without.parts["pyramid"] == 0


def test_bit_masks_take_a_byte_per_pixel_and_sample(tmp_path):
    samples = [
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "512", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "600"),
        *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "600", "MODEL.VIT.DEPTH", "1"),
    ]
    found = {}
    for kind in ("polygon", "bitmask"):
        cfg = tiny.tiny_cfg(tmp_path, *MASKS, *samples, "INPUT.MASK_FORMAT", kind)
        found[kind] = predict(cfg, "dr2net", 256).beyond
    # For each sampled box, Detectron2 copies the mask of its object.
    assert found["bitmask"] > 512 * 256 * 256 > found["polygon"]


def test_lean_parts_are_those_of_the_config(tmp_path):
    lean, not_lean = (
        predict(tiny.tiny_cfg(tmp_path, "MODEL.DR2NET.LEAN", parts), "dr2net", 128)
        for parts in ("['pyramid', 'rpn', 'roi']", "[]")
    )
    assert lean.saved < not_lean.saved


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], ["RetinaNet", "GeneralizedRCNN"]),
        (["MODEL.VIT.NUM_HEADS", "5"], ["num_heads 5"]),
        (["MODEL.DR2NET.LEAN", "['neck']"], ["MODEL.DR2NET.LEAN", "neck"]),
    ],
)
def test_what_it_cannot_plan_it_refuses(tmp_path, words, named):
    if "RetinaNet" in words:
        words = [*words, "MODEL.RETINANET.IN_FEATURES", "['p2', 'p3', 'p4']"]
    with pytest.raises(ConfigError) as raised:
        Planner(tiny.tiny_cfg(tmp_path, *words), "dr2net")
    assert [word for word in named if word not in str(raised.value)] == []
