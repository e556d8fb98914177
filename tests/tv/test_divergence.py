"""What is not finite stops a training where it appears, and the checkpoints stay as they were."""

import itertools
import json
import math
import shutil

import pytest
import torch

import train_net
from dr2net_d2.tv import engine, training
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


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.fixture
def train(arguments, output, monkeypatch):
    """``train(change, "KEY", "VALUE", ...)``: a training whose model goes through ``change``."""

    def train(change, *opts, **options):
        build_model = engine.build_model

        def changed(cfg):
            model = build_model(cfg)
            change(model)
            return model

        with monkeypatch.context() as patch:
            patch.setattr(engine, "build_model", changed)
            patch.setattr(training, "LOG_PERIOD", 1)
            opts = ("OUTPUT_DIR", str(output), "TEST.EVAL_PERIOD", "0", *opts)
            return engine.run(arguments(*opts, **options))

    return train


@pytest.mark.parametrize("amp", ["False", "True"])  # bfloat16 on a CPU, without a scaler
def test_a_gradient_stops_the_training_before_the_step(train, output, amp):
    models = []

    def change(model):
        poison_gradient(model, EARLY, math.nan, 4)
        poison_gradient(model, LATE, math.nan, 4)
        models.append(model)

    message = rf"^iteration 4: the gradient of {LATE} is nan in 1 of 3072 .* 2 non-finite.*BASE_LR"
    with pytest.raises(FloatingPointError, match=message):
        train(change, "SOLVER.AMP.ENABLED", amp, "SOLVER.AMP.DTYPE", "bfloat16")
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
    message = r"^iteration 5: the loss .*\(loss_box_reg inf, total_loss inf\).*BASE_LR"
    with pytest.raises(FloatingPointError, match=message):
        train(lambda model: poison_loss(model, "loss_box_reg", math.inf, 5))
    finite_checkpoint(output, FOURTH)


def test_weights_that_a_step_has_ruined_are_not_saved(train, output):
    handle = poison_step(math.inf, 3)
    message = r"^iteration 3: .* not finite after .*; model_0000003.pth has not been written"
    try:
        with pytest.raises(FloatingPointError, match=message):
            train(lambda model: None, "SOLVER.CHECKPOINT_PERIOD", "2")
    finally:
        handle.remove()
    finite_checkpoint(output, "model_0000001.pth")


def copies(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def skipped_steps(output):
    rows = (output / "metrics.json").read_text().splitlines()
    return [json.loads(row)["amp/skipped_steps"] for row in rows]


def test_steps_that_a_scaler_skips_are_counted(train, output, monkeypatch, caplog):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *_, enabled: scaler("cpu", init_scale=1024.0)
    )
    weights = []

    def change(model):
        poison_gradient(model, EARLY, math.inf, 0, 3, 5)
        model.register_forward_pre_hook(lambda *_: weights.append(copies(model)))

    opts = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16", "DATASETS.TEST", "()")
    train(change, *opts)
    moved = [not all(map(torch.equal, *pair)) for pair in itertools.pairwise(weights)]
    assert moved == [False, True, True, False, True, False, True]
    assert skipped_steps(output) == [1, 1, 1, 2, 2, 3, 3, 3]
    assert [text for text in caplog.messages if "skipped" in text] == [
        "iteration 0: gradients overflowed at the loss scale 1024, so the step was skipped and "
        "the scale is now 512 (1 skipped so far)",
        "iteration 3: gradients overflowed at the loss scale 512, so the step was skipped and "
        "the scale is now 256 (2 skipped so far)",
    ]

    shutil.copy(output / FOURTH, output / "model_final.pth")
    train(lambda model: None, *opts, resume=True)
    assert skipped_steps(output) == [1, 1, 1, 2, 2, 2, 2, 2]


def test_the_command_prints_one_line_and_returns_1(arguments, output, capsys):
    opts = ("SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0", "OUTPUT_DIR", str(output))
    words = ["--engine", "torchvision", "--config-file", arguments().config_file, *opts]
    assert train_net.main(words) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "train_net" in line]
    assert len(lines) == 1
    assert lines[0].startswith("train_net.py: error: iteration 1: ")
    assert "Traceback" not in captured.out + captured.err
