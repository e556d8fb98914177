"""Values that are not finite stop a training with torchvision; see ``tests.divergence``."""

import itertools
import json
import math
import shutil

import pytest
import torch

import train_net
from dr2net_d2.tv import engine, training
from tests.divergence import FOURTH, TOO_FAST, Divergence, assert_one_line
from tests.poison import EARLY, poison_gradient


@pytest.fixture
def train(arguments, tmp_path, monkeypatch):
    def train(change, *opts, **options):
        build_model = engine.build_model

        def changed(cfg):
            model = build_model(cfg)
            change(model)
            return model

        with monkeypatch.context() as patch:
            patch.setattr(engine, "build_model", changed)
            patch.setattr(training, "LOG_PERIOD", 1)
            opts = ("OUTPUT_DIR", str(tmp_path / "output"), "TEST.EVAL_PERIOD", "0", *opts)
            return engine.run(arguments(*opts, **options))

    return train


@pytest.fixture(params=["False", "True"], ids=["float32", "bfloat16"])
def options(request):
    """On a CPU bfloat16 goes without a scaler."""
    return ("SOLVER.AMP.ENABLED", request.param, "SOLVER.AMP.DTYPE", "bfloat16")


class TestDivergence(Divergence):
    losses = "loss_box_reg inf, total_loss inf"


def copies(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def skipped_steps(output):
    rows = (output / "metrics.json").read_text().splitlines()
    return [json.loads(row)["amp/skipped_steps"] for row in rows]


def test_steps_that_a_scaler_skips_are_counted(train, tmp_path, monkeypatch, caplog):
    output = tmp_path / "output"
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


def test_the_command_prints_one_line_and_returns_1(arguments, tmp_path, capsys):
    opts = (*TOO_FAST, "OUTPUT_DIR", str(tmp_path / "output"))
    words = ["--engine", "torchvision", "--config-file", arguments().config_file, *opts]
    assert train_net.main(words) == 1
    captured = capsys.readouterr()
    assert_one_line(captured)
    assert "Traceback" not in captured.out + captured.err
