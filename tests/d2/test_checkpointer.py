"""Detectron2's checkpoint formats: complete loads, atomic writes, errors that name the keys."""

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from detectron2.modeling import build_model
from torch import nn

from dr2net_d2.d2 import Dr2NetCheckpointer
from dr2net_d2.errors import WeightsError
from tests.d2.tiny import tiny_cfg

OURS, THEIRS = "build_dr2net_vitdet_backbone", "build_vitdet_backbone"


def detector(folder, name=OURS, seed=0, *opts):
    torch.manual_seed(seed)
    return build_model(tiny_cfg(folder, "MODEL.BACKBONE.NAME", name, *opts))


def assert_same_weights(model, other):
    parameters = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


@pytest.mark.parametrize("source", [OURS, THEIRS])
@pytest.mark.parametrize("target", [OURS, THEIRS])
def test_detectors_exchange_checkpoints(tmp_path, source, target):
    saved, loaded = detector(tmp_path, source, 0), detector(tmp_path, target, 1)
    Dr2NetCheckpointer(saved, str(tmp_path)).save("detector", iteration=5)
    rest = Dr2NetCheckpointer(loaded).load(str(tmp_path / "detector.pth"))
    assert_same_weights(saved, loaded)
    assert rest["iteration"] == 5


def test_coefficients_come_back_with_the_detector(tmp_path):
    saved, loaded = detector(tmp_path), detector(tmp_path)
    saved.backbone.net.coefficients.set(0.25, 0.75)
    Dr2NetCheckpointer(saved, str(tmp_path)).save("detector")
    Dr2NetCheckpointer(loaded, str(tmp_path)).resume_or_load("", resume=True)
    assert loaded.backbone.net.coefficients.values == (0.25, 0.75)


def zoo_file(folder, model, **changes):
    """As Detectron2's model zoo has it: NumPy arrays, a name, no coefficients."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    path = Path(folder, "model_final_0a1b2c.pkl")
    path.write_bytes(pickle.dumps({"model": state | changes, "__author__": "Third Party"}))
    return str(path)


def test_a_zoo_file_is_loaded_completely(tmp_path):
    zoo, model = detector(tmp_path, THEIRS, 0), detector(tmp_path, OURS, 1)
    Dr2NetCheckpointer(model).load(zoo_file(tmp_path, zoo))
    assert_same_weights(zoo, model)
    assert model.backbone.net.coefficients.values == (1, 0)


def test_a_zoo_file_that_does_not_fit_is_refused_by_key_and_changes_nothing(tmp_path):
    zoo, model = detector(tmp_path, THEIRS, 0), detector(tmp_path, OURS, 1)
    before = detector(tmp_path, OURS, 1)
    key = "roi_heads.box_predictor.cls_score.weight"
    path = zoo_file(tmp_path, zoo, **{key: torch.zeros(81, 16).numpy()})
    with pytest.raises(WeightsError, match=rf"{key} is \(81, 16\), the model's \(11, 16\)"):
        Dr2NetCheckpointer(model).load(path)
    assert_same_weights(model, before)
    state = zoo.state_dict()
    del state["backbone.net.blocks.1.mlp.fc1.bias"]
    torch.save({"model": state}, tmp_path / "part.pth")
    checkpointer = Dr2NetCheckpointer(model)
    with pytest.raises(WeightsError, match=r"missing backbone.net.blocks.1.mlp.fc1.bias"):
        checkpointer.load(str(tmp_path / "part.pth"))
    assert_same_weights(model, before)

    # The same checkpointer loads the next file.
    Dr2NetCheckpointer(zoo, str(tmp_path)).save("whole")
    checkpointer.load(str(tmp_path / "whole.pth"))
    assert_same_weights(model, zoo)


def test_keys_may_be_left_out_by_pattern(tmp_path):
    saved = detector(tmp_path, OURS, 0, "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    Dr2NetCheckpointer(saved, str(tmp_path)).save("other_classes")
    model, before = detector(tmp_path, OURS, 1), detector(tmp_path, OURS, 1)
    allowed = ("roi_heads.box_predictor.*",)
    Dr2NetCheckpointer(model, allow_partial=allowed).load(str(tmp_path / "other_classes.pth"))
    assert_same_weights(model.roi_heads.box_predictor, before.roi_heads.box_predictor)
    assert_same_weights(model.backbone, saved.backbone)


@pytest.mark.parametrize("name", [OURS, THEIRS])
def test_a_plain_vit_goes_into_either_backbone(tmp_path, name):
    pretrained = detector(tmp_path, THEIRS, 0).backbone.net
    extra = {"norm.weight": torch.ones(32), "cls_token": torch.zeros(1, 1, 32)}
    weights = {key: value for key, value in pretrained.state_dict().items() if "rel_pos" not in key}
    path = str(tmp_path / "mae.safetensors")
    safetensors.torch.save_file(weights | extra, path)
    model = detector(tmp_path, name, 1)
    head = detector(tmp_path, name, 1).roi_heads
    Dr2NetCheckpointer(model).load(path)
    assert_same_weights(model.backbone.net, pretrained)
    assert_same_weights(model.roi_heads, head)

    wider = detector(tmp_path, name, 0, "MODEL.VIT.EMBED_DIM", 64)
    with pytest.raises(WeightsError, match=r"MODEL.VIT.*blocks.0.attn.proj.bias is \(32,\)"):
        Dr2NetCheckpointer(wider).load(path)


def test_packaged_weights_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("dr2net_d2.checkpointer.files", lambda package: tmp_path)
    (tmp_path / "weights").mkdir()
    model, pretrained = detector(tmp_path, OURS, 1), detector(tmp_path, THEIRS, 0).backbone.net
    safetensors.torch.save_file(pretrained.state_dict(), tmp_path / "weights" / "tiny.safetensors")
    Dr2NetCheckpointer(model).load("dr2net_d2://tiny")
    assert_same_weights(model.backbone.net, pretrained)


def test_files_that_cannot_be_used_are_weights_errors(tmp_path):
    checkpointer = Dr2NetCheckpointer(detector(tmp_path))
    with pytest.raises(WeightsError, match=r"'absent.pth' do not exist; check MODEL.WEIGHTS"):
        checkpointer.load("absent.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "broken.pkl").write_bytes(b"not a checkpoint")
    for name in ("broken.pth", "broken.pkl"):
        with pytest.raises(WeightsError, match=rf"{name}' cannot be read"):
            checkpointer.load(str(tmp_path / name))


def test_a_model_without_a_vit_is_loaded_by_detectron2s_heuristics(tmp_path):
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"stem": nn.Linear(2, 2)})})
    path = tmp_path / "caffe2.pkl"
    weights = {"stem.weight": torch.full((2, 2), 3.0).numpy(), "stem.bias": torch.ones(2).numpy()}
    path.write_bytes(pickle.dumps({"model": weights, "matching_heuristics": True,
                                   "__author__": "someone"}))  # fmt: skip
    Dr2NetCheckpointer(model).load(str(path))
    assert model["backbone"]["stem"].weight.eq(3).all()


def test_a_write_that_is_cut_off_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model = detector(tmp_path, OURS, 0)
    checkpointer = Dr2NetCheckpointer(model, str(tmp_path))
    checkpointer.save("model_final")
    kept = detector(tmp_path, OURS, 0)
    nn.init.ones_(model.roi_heads.box_predictor.cls_score.weight)

    def cut_off(data, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_final")
    monkeypatch.undo()
    loaded = detector(tmp_path, OURS, 1)
    Dr2NetCheckpointer(loaded, str(tmp_path)).resume_or_load("", resume=True)
    assert_same_weights(loaded, kept)


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: False)
    Dr2NetCheckpointer(nn.Linear(1, 1), str(tmp_path / "out")).save("model_final")
    assert not (tmp_path / "out").exists()
