"""What the keys of a training mean: schedule of the coefficients, autocast, input."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from fvcore.common.config import CfgNode

from dr2net_d2.core import CoefficientSchedule
from dr2net_d2.core.schedule import BETA_GRID, snap_to_grid
from dr2net_d2.data.tiling import Grid, TileChoice
from dr2net_d2.errors import ConfigError, config_section

logger = logging.getLogger(__name__)

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def amp_dtype(enabled: bool, name: str, device: str) -> torch.dtype | None:
    """The dtype of autocast during training, None where mixed precision is not enabled.

    Args:
        name: SOLVER.AMP.DTYPE.
        device: MODEL.DEVICE.

    Raises:
        ConfigError: another name, or float16 without a GPU.
    """
    if not enabled:
        return None
    if name not in AMP_DTYPES:
        raise ConfigError(f"the dtype of AMP is {name!r}; use {' or '.join(AMP_DTYPES)}")
    if name == "float16" and not device.startswith("cuda"):
        raise ConfigError(
            f"AMP in float16 is for GPUs, and the device is {device!r}; use the dtype bfloat16 "
            "(SOLVER.AMP.DTYPE), or turn AMP off"
        )
    return AMP_DTYPES[name]


def coefficient_schedule(
    cfg: CfgNode, count_images: Callable[[], int] | None = None
) -> CoefficientSchedule:
    """The schedule of MODEL.DR2NET.SCHEDULE; a beta that exact arithmetic has to snap is logged.

    Args:
        count_images: gives the number of training images, for a duration in epochs. Without it
            such a schedule takes the same values, over the whole training.
    """
    schedule = cfg.MODEL.DR2NET.SCHEDULE
    exact = cfg.MODEL.DR2NET.ARITHMETIC == "exact"
    for key in ("START_BETA", "END_BETA") if exact else ():
        if (snapped := snap_to_grid(schedule[key])) != schedule[key]:
            logger.info(
                "MODEL.DR2NET.SCHEDULE.%s %g is snapped to %g: exact arithmetic takes multiples "
                "of 1/%d",
                key,
                schedule[key],
                snapped,
                BETA_GRID,
            )
    with config_section("MODEL.DR2NET.SCHEDULE"):
        return CoefficientSchedule(
            kind=schedule.KIND,
            start_beta=schedule.START_BETA,
            end_beta=schedule.END_BETA,
            duration=_fraction(cfg, count_images),
            updates=schedule.UPDATES,
            exact=exact,
        )


def _fraction(cfg: CfgNode, count_images: Callable[[], int] | None) -> float:
    """MODEL.DR2NET.SCHEDULE.DURATION as a fraction of the training."""
    unit, duration = cfg.MODEL.DR2NET.SCHEDULE.UNIT, cfg.MODEL.DR2NET.SCHEDULE.DURATION
    if unit == "fraction":
        return duration
    if unit == "iterations":
        fraction = duration / cfg.SOLVER.MAX_ITER
    elif unit == "epochs":
        if count_images is None:
            return 1.0
        fraction = duration * count_images() / (cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.MAX_ITER)
    else:
        raise ConfigError(
            f"MODEL.DR2NET.SCHEDULE.UNIT is {unit!r}; use 'fraction', 'iterations' or 'epochs'"
        )
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"MODEL.DR2NET.SCHEDULE.DURATION is {duration} {unit}, {fraction:.2f} of the "
            f"{cfg.SOLVER.MAX_ITER} iterations of the training; it must be part of it"
        )
    return fraction


def training_tiles(cfg: CfgNode) -> TileChoice | None:
    """INPUT.TILES, None if it is not enabled.

    Raises:
        ConfigError: numbers that make no tiles.
    """
    tiles = cfg.INPUT.TILES
    if not tiles.ENABLED:
        return None
    with config_section("INPUT.TILES"):
        grid = Grid(tiles.SIZE, tiles.OVERLAP)
        return TileChoice(grid, tiles.MIN_VISIBLE, tiles.EMPTY_RATIO)


def check_jittering(lsj: CfgNode) -> None:
    """Refuse an INPUT.LSJ without a side or a range of scales.

    Raises:
        ConfigError: names them.
    """
    if lsj.IMAGE_SIZE < 1 or not 0 < lsj.MIN_SCALE <= lsj.MAX_SCALE:
        raise ConfigError(
            f"INPUT.LSJ has IMAGE_SIZE {lsj.IMAGE_SIZE} and scales {lsj.MIN_SCALE} to "
            f"{lsj.MAX_SCALE}; it needs a side of 1 px or more and 0 < MIN_SCALE <= MAX_SCALE"
        )
