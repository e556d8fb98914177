import logging

import pytest

from dr2net_d2.config import add_dr2net_config
from dr2net_d2.config.torchvision import DETECTRON2_ONLY, get_cfg
from dr2net_d2.errors import ConfigError


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_every_key_of_detectron2_is_known_with_its_default():
    theirs = pytest.importorskip("detectron2.config").get_cfg()
    add_dr2net_config(theirs)
    ours, theirs = dict(flat(get_cfg())), dict(flat(theirs))
    assert ours.keys() == theirs.keys()
    honoured = ours.keys() - DETECTRON2_ONLY.keys()
    assert {key: ours[key] for key in honoured} == {key: theirs[key] for key in honoured}


def test_a_checked_config_has_honoured_keys_only(tiny_cfg):
    cfg = tiny_cfg("MODEL.MASK_ON", "False", "MODEL.RESNETS.DEPTH", "101")
    assert not dict(flat(cfg)).keys() & DETECTRON2_ONLY.keys()
    assert "RESNETS" not in cfg.MODEL


def test_what_is_ignored_is_logged(tiny_cfg, caplog):
    with caplog.at_level(logging.INFO, logger="dr2net_d2"):
        tiny_cfg("MODEL.RPN.BBOX_REG_WEIGHTS", "(1.0, 1.0, 1.0, 1.0)", "GLOBAL.HACK", "2.0")
    ignored = {record.getMessage().split()[0] for record in caplog.records}
    assert ignored == {"MODEL.RPN.BBOX_REG_WEIGHTS", "GLOBAL.HACK"}


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("MODEL.BACKBONE.NAME", "build_vitdet_backbone", "build_dr2net_vitdet_backbone"),
        ("MODEL.MASK_ON", "True", "False"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet", "GeneralizedRCNN"),
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "StandardROIHeads"),
        ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "0.0", "0.11"),
        ("MODEL.ROI_BOX_HEAD.NORM", "GN", "LN"),
        ("MODEL.ROI_BOX_HEAD.NUM_FC", "0", "at least 1"),
        ("MODEL.RPN.CONV_DIMS", "[128]", "-1"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.5]", "2 numbers"),
        ("MODEL.PIXEL_MEAN", "[127.5]", "3 numbers"),
        ("MODEL.VIT.SQUARE_PAD", "32", "larger square"),
        ("INPUT.FORMAT", "L", "RGB"),
        ("INPUT.RANDOM_FLIP", "vertical", "horizontal"),
        ("INPUT.CROP.ENABLED", "True", "False"),
        ("INPUT.MIN_SIZE_TRAIN", "()", "1 or more values, each at least 0"),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "TrainingSampler"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR", "WarmupCosineLR"),
        ("SOLVER.WARMUP_METHOD", "cubic", "linear"),
        ("TEST.PROTOCOL", "voc", "visdrone"),
        ("SOLVER.WEIGHT_DECAY_BIAS", "0.1", "remove the key"),
        ("SOLVER.BASE_LR", "0.0", "above 0"),
        ("SOLVER.FSDP", "True", "False"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "at least 1"),
        ("TEST.AUG.ENABLED", "True", "False"),
        ("VERSION", "1", "2"),
    ],
)
def test_values_out_of_reach_are_refused(tiny_cfg, key, value, allowed):
    with pytest.raises(ConfigError) as caught:
        tiny_cfg(key, value)
    message = str(caught.value)
    assert key in message
    assert value.strip("[]") in message
    assert allowed in message


def test_a_key_of_nobody_is_refused_by_name(tiny_cfg):
    with pytest.raises(ConfigError, match=r"SOLVER\.LERNING_RATE"):
        tiny_cfg("SOLVER.LERNING_RATE", "1")
