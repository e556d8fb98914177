"""Detectron2's learning-rate schedules, built from fvcore's schedulers."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)

from dr2net_d2.errors import config_section


def lr_multiplier(cfg: CfgNode) -> ParamScheduler:
    """The factor on every learning rate as a function of iteration / MAX_ITER.

    This is WarmupMultiStepLR or WarmupCosineLR, by ``cfg.SOLVER``. A linear warmup ends at the
    value that the schedule has at that iteration.

    Raises:
        ConfigError: SOLVER.STEPS are not in ascending order.
    """
    solver = cfg.SOLVER
    schedule: ParamScheduler
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        schedule = CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR)
    else:
        steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
        with config_section("SOLVER.STEPS"):
            schedule = MultiStepParamScheduler(
                values=[solver.GAMMA**k for k in range(len(steps) + 1)],
                milestones=steps,
                num_updates=solver.MAX_ITER,
            )
    length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    start = solver.WARMUP_FACTOR * schedule(0.0)
    warmup: ParamScheduler
    if solver.WARMUP_METHOD == "constant":
        warmup = ConstantParamScheduler(start)
    else:
        warmup = LinearParamScheduler(start, schedule(length))
    return CompositeParamScheduler(
        [warmup, schedule], lengths=[length, 1 - length], interval_scaling=["rescaled", "fixed"]
    )
