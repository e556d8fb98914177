"""What the keys about training mean: the schedule of the coefficients, autocast, tiles, jitter."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fvcore.common.config import CfgNode

from dr2net_d2.core import CoefficientSchedule, Schedule, coefficients_at
from dr2net_d2.core.schedule import BETA_GRID, SCHEDULES, snap_to_grid
from dr2net_d2.data.tiling import Grid, TileChoice
from dr2net_d2.errors import ConfigError, config_section

logger = logging.getLogger(__name__)

SECTION = "MODEL.DR2NET.SCHEDULE"

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def amp_dtype(enabled: bool, name: str, device: str) -> torch.dtype | None:
    """The dtype of autocast during training; None if mixed precision is not enabled.

    Args:
        enabled: SOLVER.AMP.ENABLED.
        name: SOLVER.AMP.DTYPE.
        device: MODEL.DEVICE.

    Raises:
        ConfigError: an unknown dtype, or float16 without a GPU.
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
    cfg: CfgNode, count_images: Callable[[], int] | None = None, exact: bool | None = None
) -> Schedule:
    """The schedule of MODEL.DR2NET.SCHEDULE.

    KIND names a shipped one, or "package.module.Name", a function progress -> (alpha, beta) or a
    class whose instances are such functions. A class is constructed with those of its parameters
    that ``CoefficientSchedule`` has too: start_beta, end_beta, duration (a fraction of the
    training), updates, exact. A beta that has to be snapped to the grid is logged.

    Args:
        count_images: returns the number of training images, for a duration in epochs. Without it
            such a schedule takes the same values, over the whole training.
        exact: whether beta must lie on the grid; if None, as MODEL.DR2NET.ARITHMETIC says.

    Raises:
        ConfigError: no such schedule, or keys that do not make one.
    """
    section = cfg.MODEL.DR2NET.SCHEDULE
    if exact is None:
        exact = cfg.MODEL.DR2NET.ARITHMETIC == "exact"
    arguments = {
        "start_beta": section.START_BETA,
        "end_beta": section.END_BETA,
        "duration": _fraction(cfg, count_images),
        "updates": section.UPDATES,
        "exact": exact,
    }
    if "." in section.KIND:
        schedule, arguments = _own_schedule(section.KIND, arguments)
    elif section.KIND in SCHEDULES:
        with config_section(SECTION):
            schedule = CoefficientSchedule(section.KIND, **arguments)
    else:
        raise ConfigError(
            f"{SECTION}: KIND is {section.KIND!r}; use one of {[*SCHEDULES]}, or "
            "'package.module.Name' for a function or a class of your own"
        )
    for name in ("start_beta", "end_beta") if exact else ():
        beta = arguments.get(name)
        if beta is not None and (snapped := snap_to_grid(beta)) != beta:
            logger.info(
                "%s.%s %g is snapped to %g: exact arithmetic takes multiples of 1/%d",
                SECTION,
                name.upper(),
                beta,
                snapped,
                BETA_GRID,
            )
    return schedule


def _own_schedule(name: str, arguments: Mapping[str, Any]) -> tuple[Schedule, dict[str, Any]]:
    """The schedule that "package.module.Name" names, and the arguments that it has taken."""
    schedule = _imported(name)
    taken: dict[str, Any] = {}
    try:
        if inspect.isclass(schedule):
            parameters = inspect.signature(schedule).parameters
            taken = {key: value for key, value in arguments.items() if key in parameters}
            schedule = schedule(**taken)
        inspect.signature(schedule).bind(0.0)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{SECTION}.KIND is {name!r}, which is no schedule ({error}); name a function progress "
            "-> (alpha, beta), or a class whose instances are such functions and whose constructor "
            f"needs nothing but {', '.join(arguments)}, or some of them"
        ) from error
    try:
        for progress in (0.0, 1.0):
            coefficients_at(schedule, progress)
    except ValueError as error:
        raise ConfigError(f"{SECTION}.KIND is {name!r}: {error}") from error
    return schedule, taken


def _imported(name: str) -> Any:
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:  # the last two for a leading dot
        raise ConfigError(
            f"{SECTION}.KIND is {name!r}, but the module {module_name!r} cannot be imported "
            f"({error}); install it, or add the folder that it lies in to PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(
            f"{SECTION}.KIND is {name!r}, but the module {module_name!r} has no {attribute!r}; "
            "name a function or a class that is defined there"
        )
    return getattr(module, attribute)


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
            f"{cfg.SOLVER.MAX_ITER} iterations of the training; it must be above 0 and at most as "
            "long as the training"
        )
    return fraction


def training_tiles(cfg: CfgNode) -> TileChoice | None:
    """The tiles that INPUT.TILES asks for; None if it is not enabled.

    Raises:
        ConfigError: values that no tiles can be made of.
    """
    tiles = cfg.INPUT.TILES
    if not tiles.ENABLED:
        return None
    with config_section("INPUT.TILES"):
        grid = Grid(tiles.SIZE, tiles.OVERLAP)
        return TileChoice(grid, tiles.MIN_VISIBLE, tiles.EMPTY_RATIO)


def check_jittering(lsj: CfgNode) -> None:
    """Check the crop size and the range of scales in INPUT.LSJ.

    Raises:
        ConfigError: one of them is out of range.
    """
    if lsj.IMAGE_SIZE < 1 or not 0 < lsj.MIN_SCALE <= lsj.MAX_SCALE:
        raise ConfigError(
            f"INPUT.LSJ has IMAGE_SIZE {lsj.IMAGE_SIZE} and scales {lsj.MIN_SCALE} to "
            f"{lsj.MAX_SCALE}; it needs a side of 1 px or more and 0 < MIN_SCALE <= MAX_SCALE"
        )
