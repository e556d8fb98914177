"""What a report reads from the config.yaml of a training by LazyConfig."""

from pathlib import Path

import pytest
from detectron2.config import LazyConfig

from dr2net_d2.d2.lazy_experiment import load_lazy_config
from dr2net_d2.report.source import Recorded, recorded

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("COCO-InstanceSegmentation/mask_rcnn_vitdet_b", Recorded("coco_2017_val")),
        ("LVISv1-InstanceSegmentation/mask_rcnn_vitdet_b", Recorded("lvis_v1_val", "coco", 300)),
        ("quick_schedules/mask_rcnn", Recorded("small_digits_val_n50_s128_d6")),
    ],
)
def test_lazy_configs_tell_their_test_set(config, expected, tmp_path):
    LazyConfig.save(load_lazy_config(f"{CONFIGS / config}.py", []), str(tmp_path / "config.yaml"))
    assert recorded(tmp_path, None, None) == expected
    assert recorded(tmp_path, "mine", "aitod").dataset == "mine"


def test_the_protocol_of_a_lazy_evaluator(tmp_path):
    overrides = [
        "dataloader.evaluator._target_=dr2net_d2.d2.ProtocolEvaluator",
        "dataloader.evaluator.protocol=visdrone",
    ]
    cfg = load_lazy_config(str(CONFIGS / "quick_schedules/mask_rcnn.py"), overrides)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert recorded(tmp_path, None, None).protocol == "visdrone"
