"""Detectron2's engine with a schedule of one's own that moves every block by itself."""

import json
import shutil

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from dr2net_d2.config import coefficient_schedule
from dr2net_d2.core import reversible_stacks
from dr2net_d2.d2 import Dr2NetCheckpointer, build_detector, run
from dr2net_d2.errors import ConfigError
from dr2net_d2.fidelity import schedule_pairs
from dr2net_d2.plan.planner import pairs_of_schedule
from tests.d2.test_lazy_experiment import OWN
from tests.d2.test_stage_detectors import arguments as stage_arguments
from tests.d2.tiny import arguments, tiny_cfg
from tests.own_schedules import write_module

OPTS = (
    "MODEL.DR2NET.SCHEDULE.KIND", "my_schedules.late_blocks_first",
    "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,), "SOLVER.CHECKPOINT_PERIOD", 2,
    "DATASETS.TEST", (),
)  # fmt: skip
LAST_BETAS = [0.25, 0.5]
"""Of the two blocks in iteration 3 of 4."""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch)


def weights(folder):
    return torch.load(folder / "output" / "model_final.pth")["model"]


def test_every_block_is_moved_logged_saved_and_resumed(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir(), resumed.mkdir()
    run(arguments(whole, *OPTS))
    trained = weights(whole)
    assert trained["backbone.net.blocks.coefficients.beta"].tolist() == LAST_BETAS
    row = json.loads((whole / "output" / "metrics.json").read_text().splitlines()[-1])
    assert (row["dr2net/beta_min"], row["dr2net/beta_max"]) == (0.25, 0.5)
    assert (row["dr2net/alpha"], row["dr2net/beta"]) == (0.625, 0.375)
    log = (whole / "output" / "log.txt").read_text()
    assert "iteration 0: alpha 1, beta 0\n" in log
    assert "iteration 3: alpha 0.5 to 0.75, beta 0.25 to 0.5\n" in log

    (resumed / "output").mkdir()
    shutil.copy(whole / "output" / "model_0000001.pth", resumed / "output")
    (resumed / "output" / "last_checkpoint").write_text("model_0000001.pth")
    run(arguments(resumed, *OPTS, resume=True))
    for key, tensor in weights(resumed).items():
        assert torch.equal(tensor, trained[key]), key

    detector = build_detector(tiny_cfg(tmp_path))
    Dr2NetCheckpointer(detector).load(str(whole / "output" / "model_final.pth"))
    (stack,) = reversible_stacks(detector)
    assert stack.coefficients.values == ((0.75, 0.5), (0.25, 0.5))


def test_the_blocks_of_several_stages_are_counted_through(tmp_path, monkeypatch):
    """Swin's stages of 2 and 3 blocks."""
    monkeypatch.setattr("my_schedules.BLOCKS", 5)
    run(stage_arguments(tmp_path / "swin", "swin", *OPTS))
    betas = [v.tolist() for k, v in weights(tmp_path / "swin").items() if k.endswith("nts.beta")]
    # At progress 3/4: blocks wait for 4/5, 3/5, 2/5, 1/5 and 0 of the training, and move for 1/5.
    assert betas == [[0.0, 0.375], [0.5, 0.5, 0.5]]


def test_another_number_of_pairs_than_blocks_ends_before_the_first_iteration(tmp_path):
    opts = (*OPTS, "MODEL.DR2NET.SCHEDULE.KIND", "my_schedules.three_blocks")
    with pytest.raises(ConfigError, match=r"three_blocks returned 3 pairs .* have 2 blocks"):
        run(arguments(tmp_path, *opts))
    assert not list((tmp_path / "output").glob("*.pth"))


def test_a_value_out_of_range_in_mid_training_names_the_schedule(tmp_path):
    opts = (*OPTS, "MODEL.DR2NET.SCHEDULE.KIND", "my_schedules.too_large_between")
    with pytest.raises(ConfigError, match=r"too_large_between returned \(0\.5, 1\.25\)"):
        run(arguments(tmp_path, *opts))


def test_plans_and_measured_gradients_take_one_pair_for_all(tmp_path):
    cfg = tiny_cfg(tmp_path, *OPTS)
    for refused in (
        lambda: pairs_of_schedule(cfg),
        lambda: schedule_pairs(coefficient_schedule(cfg, exact=True), 4),
    ):
        with pytest.raises(ConfigError, match=r"late_blocks_first .* one pair for all: set MODEL"):
            refused()
    cfg.MODEL.DR2NET.SCHEDULE.KIND = "my_schedules.Cosine"
    pairs = [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5)]  # at the beginning, half way, at the end
    assert pairs_of_schedule(cfg) == schedule_pairs(coefficient_schedule(cfg), 4) == pairs


@pytest.mark.parametrize(
    ("source", "betas"),
    [
        ("L(my_schedules.Cosine)(end_beta=0.5, duration=1)", [0.0, 0.25, 0.5]),
        ("my_schedules.late_blocks_first", [[0.0, 0.0], [0.0, 0.5], [0.5, 0.5]]),
    ],
)
def test_a_lazy_config_takes_any_callable(tmp_path, source, betas):
    (tmp_path / "own.py").write_text(
        f"{OWN}import my_schedules\nfrom detectron2.config import LazyCall as L\n"
        f"dr2net.schedule = {source}\n"
    )
    schedule = instantiate(LazyConfig.load(str(tmp_path / "own.py")).dr2net.schedule)
    assert [schedule(progress)[1] for progress in (0, 0.5, 1)] == betas
