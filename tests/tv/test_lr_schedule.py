import pytest
import torch

from dr2net_d2.errors import ConfigError
from dr2net_d2.tv.lr_schedule import lr_multiplier

SCHEDULES = [
    ("LR_SCHEDULER_NAME", "WarmupCosineLR", "WARMUP_ITERS", "7"),
    ("LR_SCHEDULER_NAME", "WarmupCosineLR", "BASE_LR_END", "0.0002", "WARMUP_ITERS", "0"),
    ("LR_SCHEDULER_NAME", "WarmupMultiStepLR", "STEPS", "(20, 33)", "WARMUP_ITERS", "25"),
    ("LR_SCHEDULER_NAME", "WarmupMultiStepLR", "STEPS", "(20, 90)", "WARMUP_METHOD", "constant"),
    ("LR_SCHEDULER_NAME", "WarmupMultiStepLR", "STEPS", "()", "WARMUP_ITERS", "90"),
]


def overrides(schedule):
    return [f"SOLVER.{word}" if word.isupper() else word for word in schedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_detectron2_at_every_iteration(tiny_cfg, schedule):
    theirs = pytest.importorskip("detectron2.config").get_cfg()
    from detectron2.solver import build_lr_scheduler

    cfg = tiny_cfg("SOLVER.MAX_ITER", "40", *overrides(schedule))
    for key in ("MAX_ITER", "WARMUP_ITERS", *schedule[::2]):
        theirs.SOLVER[key] = cfg.SOLVER[key]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(theirs, optimizer)
    multiplier = lr_multiplier(cfg)
    for iteration in range(40):
        expected = optimizer.param_groups[0]["lr"]
        assert cfg.SOLVER.BASE_LR * multiplier(iteration / 40) == expected, iteration
        optimizer.step()
        scheduler.step()


def test_a_linear_warmup_by_hand(tiny_cfg):
    multiplier = lr_multiplier(
        tiny_cfg(
            *("SOLVER.MAX_ITER", "10", "SOLVER.WARMUP_ITERS", "4", "SOLVER.WARMUP_FACTOR", "0.2"),
            *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(6,)"),
        )
    )
    factors = [multiplier(iteration / 10) for iteration in range(10)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 0.1, 0.1, 0.1, 0.1])


def test_steps_must_ascend(tiny_cfg):
    cfg = tiny_cfg(*("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"), *("SOLVER.STEPS", "(6, 3)"))
    with pytest.raises(ConfigError, match=r"SOLVER\.STEPS"):
        lr_multiplier(cfg)
