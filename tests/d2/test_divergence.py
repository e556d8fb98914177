"""Values that are not finite stop a training with Detectron2; see ``tests.divergence``."""

import pytest
import torch

import train_net
from dr2net_d2.d2 import engine, run, yaml_experiment
from tests.d2.tiny import arguments, launch_one, write_yaml
from tests.divergence import TOO_FAST, Divergence, assert_one_line


@pytest.fixture
def train(tmp_path, monkeypatch):
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


@pytest.fixture(params=[False, True], ids=["unclipped", "clipped"])
def options(request):
    """Clipping by the norm of all gradients would spread a nan over all of them."""
    enabled = ("SOLVER.CLIP_GRADIENTS.ENABLED", request.param)
    return (*enabled, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model")


class TestDivergence(Divergence):
    losses = "loss_box_reg inf"


def test_the_error_of_one_of_several_processes_is_the_same_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(engine, "launch", launch_one)
    with pytest.raises(FloatingPointError, match=r"^iteration 1: "):
        run(arguments(tmp_path, *TOO_FAST, num_gpus=2))


def test_the_command_prints_one_line_and_returns_1(tmp_path, capsys):
    words = ["--engine", "detectron2", "--config-file", write_yaml(tmp_path), *TOO_FAST]
    assert train_net.main([*words, "OUTPUT_DIR", str(tmp_path / "output")]) == 1
    assert_one_line(capsys.readouterr())
