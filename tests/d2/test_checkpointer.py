"""Detectron2's checkpoint formats: complete loads, atomic writes, errors that name the keys."""

import os
import pickle
from pathlib import Path

import numpy as np
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
    """A file as in Detectron2's model zoo: NumPy arrays, an author, no coefficients."""
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

    # The same checkpointer can load another file afterwards.
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
    with pytest.raises(WeightsError, match=r"MODEL.VIT.*embed_dim is 32 .* the model's 64"):
        Dr2NetCheckpointer(wider).load(path)


@pytest.mark.parametrize("name", [OURS, THEIRS])
def test_a_part_of_a_plain_vit_is_refused_unless_allowed(tmp_path, name, caplog):
    pretrained = detector(tmp_path, THEIRS, 0).backbone.net.state_dict()
    del pretrained["blocks.1.mlp.fc1.weight"]
    torch.save(pretrained | {"blocks.0.extra": torch.ones(1)}, tmp_path / "part.pth")
    model, before = detector(tmp_path, name, 1), detector(tmp_path, name, 1)
    path, allowed = str(tmp_path / "part.pth"), ["blocks.1.mlp.fc1.weight"]
    for allow in ([], allowed):
        with pytest.raises(WeightsError, match=r"unexpected blocks\.0\.extra"):
            Dr2NetCheckpointer(model, allow_partial=allow).load(path)
        assert_same_weights(model, before)
    with caplog.at_level("INFO"):
        Dr2NetCheckpointer(model, allow_partial=[*allowed, "*.extra"]).load(path)
    loaded = model.backbone.net.state_dict()
    assert torch.equal(loaded["blocks.0.mlp.fc1.bias"], pretrained["blocks.0.mlp.fc1.bias"])
    assert_same_weights(model.backbone.net.blocks[1].mlp.fc1, before.backbone.net.blocks[1].mlp.fc1)
    assert "missing (1): blocks.1.mlp.fc1.weight; left over (1): blocks.0.extra" in caplog.text


@pytest.mark.parametrize("wrap", ["backbone.net.", ""])
def test_coupled_weights_do_not_go_into_a_plain_network(tmp_path, wrap):
    """A plain network with coupled weights would silently compute something else."""
    saved = detector(tmp_path, OURS, 0)
    saved.backbone.net.coefficients.set(0.5, 0.5)
    state = saved.state_dict() if wrap else saved.backbone.net.state_dict()
    torch.save({"model": state}, tmp_path / "coupled.pth")
    plain, before = detector(tmp_path, THEIRS, 1), detector(tmp_path, THEIRS, 1)
    with pytest.raises(WeightsError, match=rf"unexpected {wrap}blocks\.coefficients\.alpha"):
        Dr2NetCheckpointer(plain).load(str(tmp_path / "coupled.pth"))
    assert_same_weights(plain, before)
    ours = detector(tmp_path, OURS, 1)
    Dr2NetCheckpointer(ours).load(str(tmp_path / "coupled.pth"))
    assert ours.backbone.net.coefficients.values == (0.5, 0.5)
    assert_same_weights(ours.backbone.net, saved.backbone.net)


def test_a_teacher_of_dinov2_is_a_plain_vit_in_a_detector_of_a_vit_alone(tmp_path):
    """Both files name it "backbone"."""
    options = ("MODEL.RPN.IN_FEATURES", "['last_feat']", "MODEL.ROI_HEADS.IN_FEATURES",
               "['last_feat']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[8]]")  # fmt: skip
    model = detector(tmp_path, "build_dr2net_vit_backbone", 1, *options)
    pretrained = detector(tmp_path, THEIRS, 0).backbone.net
    teacher = {f"backbone.{key}": value for key, value in pretrained.state_dict().items()}
    teacher["dino_head.last_layer.weight"] = torch.ones(1)
    torch.save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    Dr2NetCheckpointer(model).load(str(tmp_path / "teacher_checkpoint.pth"))
    assert_same_weights(model.backbone, pretrained)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["zoo.pkl", "own.pth"])
def test_a_file_that_would_run_code_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, before = detector(tmp_path, OURS, 1), detector(tmp_path, OURS, 1)
    content = {"model": {"backbone.net.pos_embed": np.ones(1)}, "x": Payload(), "__author__": "me"}
    Path("zoo.pkl").write_bytes(pickle.dumps(content))
    torch.save(content, "own.pth")
    for victim in (model, nn.Linear(1, 1)):
        with pytest.raises(WeightsError, match=r"refused: .*mkdir"):
            Dr2NetCheckpointer(victim).load(name)
    assert not Path("ran").exists()
    assert_same_weights(model, before)


def test_packaged_weights_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("dr2net_d2.weights.checkpointer.files", lambda package: tmp_path)
    folder = tmp_path / "weights" / "pretrained"
    folder.mkdir(parents=True)
    model, pretrained = detector(tmp_path, OURS, 1), detector(tmp_path, THEIRS, 0).backbone.net
    safetensors.torch.save_file(pretrained.state_dict(), folder / "tiny.safetensors")
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
