"""The projects' configs: on their datasets' original layout, from a COCO detector's weights."""

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

    # As Detectron2's zoo has it: with masks, 80 classes, sized for another image.
    (tmp_path / "coco").mkdir()
    cfg = load_config(str(small_config(COCO, tmp_path / "coco")), [], "detectron2")
    cfg.MODEL.VIT.IMG_SIZE = 64
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
    loaded = [k for k, v in trained.items() if k in pretrained and v.shape == pretrained[k].shape]
    left = trained.keys() - set(loaded)
    # New: the class predictor of other classes, and what our network has of its own.
    assert all("box_predictor" in k or "rel_pos" in k or "coefficients" in k for k in left), left
    for key in loaded:
        if "box_predictor" not in key and "k" not in trained[key].shape:
            assert torch.allclose(trained[key].float(), pretrained[key].float(), atol=1e-6), key
