"""Trained detectors -> Detectron2's keys, and Detectron2's model zoo -> ours."""

import logging
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dr2net_d2 import convert
from dr2net_d2.commands import load_config
from dr2net_d2.d2 import Dr2NetCheckpointer, build_detector
from dr2net_d2.plan.simulation import parameters_on_meta
from dr2net_d2.weights.detectors import convert_detector_checkpoint
from dr2net_d2.weights.files import read_checkpoint
from tests.d2.test_checkpointer import OURS, THEIRS, assert_same_weights, detector
from tests.d2.tiny import batch, write_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = Path(detectron2.__file__).parent / "model_zoo/configs/common/models"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def trained(folder, alpha, beta):
    """A detector with these coefficients, and the checkpoint of a training that ended there."""
    model = detector(folder, OURS, 0)
    model.backbone.net.coefficients.set(alpha, beta)
    optimizer = torch.optim.AdamW(model.parameters())
    with EventStorage():
        model.train()(batch((64, 64)))["loss_cls"].backward()
    optimizer.step()
    checkpointer = Dr2NetCheckpointer(model, str(folder), optimizer=optimizer)
    checkpointer.save("model_final", iteration=7)
    return model.eval()


def assert_same_detections(model, other, size=(64, 48)):
    with torch.no_grad():
        found, expected = (m.eval()(batch(size)) for m in (model, other))
    (found,), (expected,) = found, expected
    found, expected = found["instances"], expected["instances"]
    assert len(found) == len(expected) > 10
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_a_coupled_detector_keeps_its_coefficients(tmp_path, suffix, caplog):
    model = trained(tmp_path, 0.5, 0.5)
    with caplog.at_level(logging.WARNING):
        assert convert.main(["model_final.pth", f"out{suffix}"]) == 0
    assert "beta is 0.5: Detectron2's own ViT would not give the same" in caplog.text
    content = read_checkpoint(f"out{suffix}")
    assert content.keys() <= {"model", "__author__"}
    extra = content["model"].keys() - detector(tmp_path, THEIRS).state_dict().keys()
    assert extra == {f"backbone.net.blocks.coefficients.{name}" for name in ("alpha", "beta")}
    checkpointers = [Dr2NetCheckpointer]
    if suffix != ".safetensors":  # Detectron2 does not read that format
        checkpointers.append(DetectionCheckpointer)
    for checkpointer in checkpointers:
        other = detector(tmp_path, OURS, 1)
        checkpointer(other).load(f"out{suffix}")
        assert other.backbone.net.coefficients.values == (0.5, 0.5)
        assert_same_detections(other, model)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_at_1_0_detectron2s_own_vit_takes_it_strictly(tmp_path, suffix, caplog):
    model = trained(tmp_path, 1, 0)
    assert convert.main(["model_final.pth", f"out{suffix}"]) == 0
    assert "would not give the same" not in caplog.text
    stock = detector(tmp_path, THEIRS, 1)
    stock.load_state_dict(read_checkpoint(f"out{suffix}")["model"], strict=True)
    assert_same_weights(stock, model)
    assert_same_detections(stock, model)


def test_a_detector_is_fitted_to_the_vit_of_a_config(tmp_path, capsys):
    trained(tmp_path, 1, 0)
    words = ["--config-file", write_yaml(tmp_path), "MODEL.VIT.IMG_SIZE", "128"]
    assert convert.main(["model_final.pth", "out.pth", *words]) == 0
    text = capsys.readouterr().out
    assert "resized (2): backbone.net.blocks.1.attn.rel_pos_h (15, 8) -> (31, 8)" in text
    assert "left out, (1, 0) is the plain network (2): backbone.net.blocks.coeff" in text
    larger = detector(tmp_path, OURS, 1, "MODEL.VIT.IMG_SIZE", "128")
    Dr2NetCheckpointer(larger).load("out.pth")


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 128, "window_block_indexes": [0]}


def lazy_model(name="mask_rcnn_vitdet.py", **net):
    model = LazyConfig.load(str(MODELS / name)).model
    model.backbone.net.update(net)
    return model


def test_an_actual_vitdet_of_detectron2_takes_it_strictly(tmp_path):
    """Detectron2's own LazyConfig with a smaller ViT, and with no class of ours in it."""
    words = [w for k, v in SMALL.items() for w in (f"MODEL.VIT.{k.upper()}", str(v))]
    words += ["MODEL.VIT.SQUARE_PAD", "128", "INPUT.MAX_SIZE_TRAIN", "128",
              "INPUT.MAX_SIZE_TEST", "128", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
              "MODEL.DEVICE", "cpu", "TEST.DETECTIONS_PER_IMAGE", "20",
              "MODEL.RPN.POST_NMS_TOPK_TEST", "30", "INPUT.LSJ.IMAGE_SIZE", "128"]  # fmt: skip
    file = str(CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_vitdet_b.yaml")
    torch.manual_seed(0)
    model = build_detector(load_config(file, words, "detectron2"))
    Dr2NetCheckpointer(model, str(tmp_path)).save("model_final")
    assert convert.main(["model_final.pth", "out.pkl"]) == 0
    lazy = lazy_model(**SMALL)
    lazy.backbone.square_pad = 128
    lazy.proposal_generator.post_nms_topk = (1000, 30)
    lazy.roi_heads.box_predictor.update(test_score_thresh=0.0, test_topk_per_image=20)
    stock = instantiate(lazy)
    stock.load_state_dict(read_checkpoint("out.pkl")["model"], strict=True)
    assert_same_detections(stock, model, (128, 96))


def cascade_model():
    """The cascade that Detectron2's projects/ViTDet builds from two of its models."""
    model, cascade = lazy_model(), LazyConfig.load(str(MODELS / "cascade_rcnn.py")).model.roi_heads
    for name in ("box_head", "box_predictor", "proposal_matcher"):
        model.roi_heads.pop(name)
    names = ("_target_", "box_heads", "box_predictors", "proposal_matchers")
    model.roi_heads.update({name: cascade[name] for name in names})
    for head in model.roi_heads.box_heads:
        head.update(conv_dims=[256] * 4, fc_dims=[1024], conv_norm="LN")
    return model


LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}


def globals_at(*indexes):
    return {"window_block_indexes": [i for i in range(indexes[-1] + 1) if i not in indexes]}


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (lazy_model, "mask_rcnn_vitdet_b"),
        (lambda: lazy_model(**LARGE, **globals_at(5, 11, 17, 23)), "mask_rcnn_vitdet_l"),
        (lambda: lazy_model(**HUGE, **globals_at(7, 15, 23, 31)), "mask_rcnn_vitdet_h"),
        (cascade_model, "cascade_mask_rcnn_vitdet_b"),
    ],
    ids=["b", "l", "h", "cascade"],
)
def test_the_zoos_key_list_at_full_size_is_ours(model, config):
    file = str(CONFIGS / f"COCO-InstanceSegmentation/{config}.yaml")
    with parameters_on_meta():
        zoo = instantiate(model()).state_dict()
        ours = build_detector(load_config(file, ["MODEL.DEVICE", "meta"], "detectron2"))
    converted, report = convert_detector_checkpoint(zoo, ours)
    assert report.problems() == []
    assert sorted(report.loaded) == sorted(zoo) == sorted(converted)
    assert len(zoo) > 240
    with parameters_on_meta():
        stock_name = ["MODEL.BACKBONE.NAME", THEIRS, "MODEL.DEVICE", "meta"]
        stock = build_model(load_config(file, stock_name, "detectron2"))
    assert stock.state_dict().keys() == zoo.keys()
