"""What the keys of both engines mean in terms of core."""

import inspect
import logging

import pytest
import torch
from fvcore.common.config import CfgNode

from dr2net_d2.config import (
    LEAN_PARTS,
    amp_dtype,
    box_limits,
    coefficient_schedule,
    dr2net_arguments,
    lean_parts,
    merge_config,
    vit_arguments,
    warn_of_limits,
)
from dr2net_d2.config.torchvision import get_cfg
from dr2net_d2.core import CoefficientSchedule, Dr2NetViT
from dr2net_d2.errors import ConfigError

SCHEDULE = "MODEL.DR2NET.SCHEDULE"


def test_the_keys_give_arguments_of_the_vit():
    cfg = get_cfg()
    known = inspect.signature(Dr2NetViT).parameters
    assert not vit_arguments(cfg).keys() & dr2net_arguments(cfg).keys()
    assert {**vit_arguments(cfg), **dr2net_arguments(cfg)}.keys() <= known.keys()


def test_the_defaults_are_those_of_core():
    cfg = get_cfg()
    assert coefficient_schedule(cfg) == CoefficientSchedule()
    known = inspect.signature(Dr2NetViT).parameters
    for name, value in dr2net_arguments(cfg).items():
        assert value == known[name].default


def test_a_beta_off_the_grid_is_snapped_and_logged(caplog):
    cfg = get_cfg()
    cfg.merge_from_list([f"{SCHEDULE}.KIND", "constant", f"{SCHEDULE}.END_BETA", "0.3"])
    with caplog.at_level(logging.INFO):
        assert coefficient_schedule(cfg)(0.0) == (0.6875, 0.3125)
    assert "END_BETA 0.3 is snapped to 0.3125" in caplog.text
    cfg.merge_from_list(["MODEL.DR2NET.ARITHMETIC", "float"])
    assert coefficient_schedule(cfg)(0.0) == (0.7, 0.3)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("END_BETA", "1.5", ["end_beta is 1.5", "[0, 1]"]), ("KIND", "linear", ["'linear'"])],
)
def test_a_schedule_that_cannot_be_is_a_config_error(key, value, words):
    cfg = get_cfg()
    cfg.merge_from_list([f"{SCHEDULE}.{key}", value])
    with pytest.raises(ConfigError) as error:
        coefficient_schedule(cfg)
    assert all(word in str(error.value) for word in [SCHEDULE, *words])


@pytest.mark.parametrize(
    ("unit", "duration", "fraction"),
    [("fraction", 0.25, 0.25), ("iterations", 30, 0.25), ("epochs", 3, 0.25)],
)
def test_a_duration_has_a_unit(unit, duration, fraction):
    """120 iterations of 4 images go 12 times through 40 images."""
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", 120, "SOLVER.IMS_PER_BATCH", 4])
    cfg.merge_from_list([f"{SCHEDULE}.UNIT", unit, f"{SCHEDULE}.DURATION", float(duration)])
    assert coefficient_schedule(cfg, lambda: 40).duration == pytest.approx(fraction)
    # Without images the values are the same, if not their time.
    alone = coefficient_schedule(cfg)
    assert (alone(0), alone(1)) == (CoefficientSchedule()(0), CoefficientSchedule()(1))


@pytest.mark.parametrize(
    ("unit", "duration", "message"),
    [
        ("iterations", 121.0, r"121.0 iterations, 1.01 of the 120 iterations"),
        ("epochs", 0.0, r"0.0 epochs, 0.00 of the 120"),
        ("steps", 3.0, r"UNIT is 'steps'; use 'fraction'"),
    ],
)
def test_a_duration_that_cannot_be_is_a_config_error(unit, duration, message):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", 120, "SOLVER.IMS_PER_BATCH", 4])
    cfg.merge_from_list([f"{SCHEDULE}.UNIT", unit, f"{SCHEDULE}.DURATION", duration])
    with pytest.raises(ConfigError, match=message):
        coefficient_schedule(cfg, lambda: 40)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((False, "float16", "cpu"), None),
        ((True, "bfloat16", "cpu"), torch.bfloat16),
        ((True, "float16", "cuda:1"), torch.float16),
    ],
)
def test_the_dtype_of_autocast(arguments, expected):
    assert amp_dtype(*arguments) is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((True, "float16", "cpu"), "for GPUs"), ((True, "half", "cuda"), "'half'; use float16 or")],
)
def test_a_dtype_that_cannot_be_is_a_config_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        amp_dtype(*arguments)


def test_yaml_cannot_run_code(tmp_path):
    (tmp_path / "bad.yaml").write_text("OUTPUT_DIR: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        merge_config(get_cfg(), str(tmp_path / "bad.yaml"), [])


def test_a_seed_too_large_for_numpy_is_refused(tmp_path):
    (tmp_path / "empty.yaml").write_text("VERSION: 2\n")
    with pytest.raises(ConfigError, match=r"SEED is 4294967296; it must be below 2\^32"):
        merge_config(get_cfg(), str(tmp_path / "empty.yaml"), ["SEED", str(2**32)])


def test_every_module_is_lean_by_default():
    cfg = get_cfg()
    assert lean_parts(cfg) == LEAN_PARTS
    cfg.merge_from_list(["MODEL.DR2NET.LEAN", "[]"])
    assert lean_parts(cfg) == ()


def test_an_unknown_lean_module_is_a_config_error():
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DR2NET.LEAN", "['pyramid', 'neck']"])
    with pytest.raises(
        ConfigError, match=r"LEAN is \['pyramid', 'neck'\]; .* each 'pyramid', 'rpn' or"
    ):
        lean_parts(cfg)


def test_limits_on_the_boxes_of_an_image():
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.RPN.POST_NMS_TOPK_TRAIN", 70, "MODEL.RPN.PRE_NMS_TOPK_TEST", 60])
    assert box_limits(cfg, "TRAIN") == {
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 12000,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 70,
    }
    assert box_limits(cfg, "TEST") == {
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 60,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "TEST.DETECTIONS_PER_IMAGE": 100,
    }
    tiled = cfg.clone()
    tiled.INPUT.TILES = tiled.TEST.TILES = CfgNode({"ENABLED": True})
    assert box_limits(tiled, "TRAIN") == {}
    assert box_limits(tiled, "TEST") == {"TEST.DETECTIONS_PER_IMAGE": 100}
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    assert box_limits(cfg, "TRAIN") == {}
    assert box_limits(cfg, "TEST") == {
        "MODEL.FCOS.TOPK_CANDIDATES_TEST": 1000,
        "TEST.DETECTIONS_PER_IMAGE": 100,
    }


@pytest.mark.parametrize(
    ("densest", "text"),
    [
        ({}, ""),
        ({"a": 3, "b": 2}, ""),
        (
            {"a": 4, "b": 10},
            "b has an image with 10 objects, but K.ONE is 3 and K.TWO is 9",
        ),
        ({"a": 4}, "a has an image with 4 objects, but K.ONE is 3;"),
    ],
)
def test_limits_below_the_densest_image_are_one_warning(densest, text, caplog):
    warn_of_limits({"K.ONE": 3, "K.TWO": 9, "K.THREE": 10}, densest)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * bool(text)
    assert text in caplog.text
