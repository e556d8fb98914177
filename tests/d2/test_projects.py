"""The projects' configs, on the original layout of their datasets, from a COCO detector."""

import logging
import math

import pytest
import torch
from detectron2.modeling import build_model

from dr2net_d2.commands import load_config
from dr2net_d2.config import evaluation_protocol
from dr2net_d2.d2 import engine, run
from tests.small_projects import CONFIGS, arguments, small_config, write_datasets

COCO = CONFIGS[0].parents[3] / "configs/COCO-InstanceSegmentation/mask_rcnn_vitdet_b.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_a_project_finetunes_a_coco_detector_and_is_evaluated(path, tmp_path, monkeypatch, caplog):
    for picture in ("draw_curves", "draw_predictions"):
        monkeypatch.setattr(engine, picture, lambda *_: None)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_datasets(path.parts[-3], tmp_path)

    # A detector as in Detectron2's model zoo: stock, with masks, 80 classes.
    (tmp_path / "coco").mkdir()
    words = ["MODEL.BACKBONE.NAME", "build_vitdet_backbone"]
    cfg = load_config(str(small_config(COCO, tmp_path / "coco")), words, "detectron2")
    torch.manual_seed(0)
    weights = tmp_path / "coco.pth"
    pretrained = build_model(cfg).state_dict()
    torch.save({"model": pretrained}, weights)

    config, output = small_config(path, tmp_path, weights), tmp_path / "output"
    with caplog.at_level(logging.INFO):
        results = run(arguments(config, output, "SOLVER.BASE_LR", "1e-9"))
    cfg = load_config(str(config), [], "detectron2")
    protocol = evaluation_protocol(cfg)
    assert {metric.name for metric in protocol.metrics} <= results["bbox"].keys()
    assert any(math.isfinite(value) for value in results["bbox"].values())
    trained = torch.load(output / "model_final.pth")["model"]
    new = {key for key in trained if "box_predictor" in key}
    own = {key for key in trained if "coefficients" in key or "stream_range" in key}
    assert trained.keys() - pretrained.keys() <= own
    for key in trained.keys() - new - own:
        assert torch.allclose(trained[key], pretrained[key], atol=1e-6), key
