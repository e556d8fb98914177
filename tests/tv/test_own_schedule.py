"""The torchvision engine with a schedule of one's own that moves every block by itself."""

import json
import shutil

import pytest
import torch

from dr2net_d2.core import reversible_stacks
from dr2net_d2.errors import ConfigError
from dr2net_d2.tv import engine, training
from tests.own_schedules import write_module

KIND = "MODEL.DR2NET.SCHEDULE.KIND"
OPTS = ("SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "DATASETS.TEST", "()")


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch)


def test_every_block_is_moved_logged_saved_and_resumed(arguments, tiny_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOG_PERIOD", 1)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    opts = (*OPTS, KIND, "my_schedules.late_blocks_first", "OUTPUT_DIR")
    engine.run(arguments(*opts, str(whole)))
    rows = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    # Progress is 0, 1/4, 1/2, 3/4; the second block moves in the first half.
    assert [row["dr2net/beta_min"] for row in rows] == [0.0, 0.0, 0.0, 0.25]
    assert [row["dr2net/beta_max"] for row in rows] == [0.0, 0.25, 0.5, 0.5]
    assert [row["dr2net/beta"] for row in rows] == [0.0, 0.125, 0.25, 0.375]
    assert [row["dr2net/alpha"] for row in rows] == [1.0, 0.875, 0.75, 0.625]
    assert (whole / "curves.png").is_file()

    resumed.mkdir()
    shutil.copy(whole / "model_0000001.pth", resumed)
    (resumed / "last_checkpoint").write_text("model_0000001.pth")
    engine.run(arguments(*opts, str(resumed), resume=True))
    first, second = (torch.load(f / "model_final.pth") for f in (whole, resumed))
    torch.testing.assert_close(second, first, rtol=0, atol=0)

    model = engine.build_model(tiny_cfg())
    model.load_state_dict(first["model"])
    (stack,) = reversible_stacks(model)
    assert stack.coefficients.values == ((0.75, 0.5), (0.25, 0.5))


def test_one_pair_from_a_class_is_moved_and_logged(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOG_PERIOD", 1)
    opts = (KIND, "my_schedules.Cosine", "MODEL.DR2NET.SCHEDULE.END_BETA", "1.0")
    engine.run(arguments(*OPTS, *opts, "OUTPUT_DIR", str(tmp_path / "output")))
    rows = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    pairs = [(row["dr2net/alpha"], row["dr2net/beta"]) for row in map(json.loads, rows)]
    assert pairs == [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no_such_module.Cosine", r"SCHEDULE\.KIND .*'no_such_module' cannot be imported"),
        ("my_schedules.Sine", r"SCHEDULE\.KIND .*has no 'Sine'"),
        ("my_schedules.too_large", r"SCHEDULE\.KIND .*too_large returned \(0\.0, 1\.5\)"),
    ],
)
def test_what_is_no_schedule_is_refused_before_anything_is_written(
    arguments, tmp_path, kind, words
):
    with pytest.raises(ConfigError, match=words):
        engine.run(arguments(*OPTS, KIND, kind, "OUTPUT_DIR", str(tmp_path / "output")))
    assert not (tmp_path / "output").exists()


def test_a_value_out_of_range_in_mid_training_names_the_schedule(arguments, tmp_path):
    opts = (KIND, "my_schedules.too_large_between", "OUTPUT_DIR", str(tmp_path / "output"))
    with pytest.raises(ConfigError, match=r"too_large_between returned \(0\.5, 1\.25\)"):
        engine.run(arguments(*OPTS, *opts))
