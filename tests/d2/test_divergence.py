"""What is not finite stops a training where it appears, and the checkpoints stay as they were."""

import math

import pytest
import torch

import train_net
from dr2net_d2.d2 import engine, run, yaml_experiment
from tests.d2.tiny import arguments, launch_one, write_yaml
from tests.poison import (
    EARLY,
    LATE,
    finite_checkpoint,
    poison_gradient,
    poison_loss,
    poison_step,
    poison_weight,
)

FOURTH = "model_0000003.pth"
TOO_FAST = ("SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``train(change, "KEY", "VALUE", ...)``: a training whose model goes through ``change``."""

    def train(change, *opts):
        build_model = yaml_experiment.build_detector

        def changed(cfg):
            model = build_model(cfg)
            change(model)
            return model

        with monkeypatch.context() as patch:
            patch.setattr(yaml_experiment, "build_detector", changed)
            return run(arguments(tmp_path, "TEST.EVAL_PERIOD", 0, *opts))

    return train


@pytest.mark.parametrize("clip", [False, True])  # which spreads a nan over all gradients
def test_a_gradient_stops_the_training_before_the_step(train, output, clip):
    models = []

    def change(model):
        poison_gradient(model, EARLY, math.nan, 4)
        poison_gradient(model, LATE, math.nan, 4)
        models.append(model)

    message = rf"^iteration 4: the gradient of {LATE} is nan in 1 of 3072 .* 2 non-finite.*BASE_LR"
    clipping = ("SOLVER.CLIP_GRADIENTS.ENABLED", clip, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE")
    with pytest.raises(FloatingPointError, match=message):
        train(change, *clipping, "full_model")
    saved = finite_checkpoint(output, FOURTH)
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, saved[name]), name


def test_a_failure_in_the_last_iteration_writes_and_evaluates_nothing(train, output):
    with pytest.raises(FloatingPointError, match=rf"^iteration 7: .*{EARLY} is inf"):
        train(lambda model: poison_gradient(model, EARLY, math.inf, 7))
    finite_checkpoint(output, FOURTH)
    assert not (output / "inference").exists()


def test_a_weight_is_found_at_the_step_of_the_stream(train, output):
    message = r"^iteration 5: the residual stream after step 3 \(Block 1, branch 0\) .*BASE_LR"
    with pytest.raises(FloatingPointError, match=message):
        train(lambda model: poison_weight(model, LATE, math.nan, 5))
    finite_checkpoint(output, FOURTH)


def test_a_loss_is_named_though_its_gradient_is_finite(train, output):
    message = r"^iteration 5: the loss is not finite \(loss_box_reg inf\).*BASE_LR"
    with pytest.raises(FloatingPointError, match=message):
        train(lambda model: poison_loss(model, "loss_box_reg", math.inf, 5))
    finite_checkpoint(output, FOURTH)


def test_weights_that_a_step_has_ruined_are_not_saved(train, output):
    handle = poison_step(math.inf, 3)
    message = r"^iteration 3: .* not finite after .*; model_0000003.pth has not been written"
    try:
        with pytest.raises(FloatingPointError, match=message):
            train(lambda model: None, "SOLVER.CHECKPOINT_PERIOD", 2)
    finally:
        handle.remove()
    finite_checkpoint(output, "model_0000001.pth")


def test_the_error_of_one_of_several_processes_is_the_same_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(engine, "launch", launch_one)
    with pytest.raises(FloatingPointError, match=r"^iteration 1: "):
        run(arguments(tmp_path, *TOO_FAST, num_gpus=2))


def test_the_command_prints_one_line_and_returns_1(tmp_path, output, capsys):
    words = ["--engine", "detectron2", "--config-file", write_yaml(tmp_path), *TOO_FAST]
    assert train_net.main([*words, "OUTPUT_DIR", str(output)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "train_net" in line]
    assert len(lines) == 1
    assert lines[0].startswith("train_net.py: error: iteration 1: ")
