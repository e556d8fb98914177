"""A plan: what every arm takes and fits into a budget, and the peak over the schedule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dr2net_d2.commands import markdown_table
from dr2net_d2.plan.dry_run import PARTS
from dr2net_d2.plan.planner import ASSUMED, NOT_INCLUDED, Planner, Prediction, largest_fitting

logger = logging.getLogger(__name__)

GB = 2**30

LONGEST_SIDE = 8192
LARGEST_BATCH = 64
"""Where the search for the largest images, in pixels, and for the largest batch stops."""


@dataclass(frozen=True)
class Setting:
    """What a plan was made for.

    Attributes:
        image_size: side of the square images, in pixels.
        tile_size: INPUT.TILES.SIZE, if tiles are enabled.
        objects: number of objects in each image.
        budget_gb: memory of the GPU, in units of 2^30 bytes.
        tflops: TFLOP/s that the GPU sustains, if times were asked for.
    """

    config_file: str
    overrides: list[str]
    engine: str
    image_size: int
    tile_size: int | None
    batch_size: int
    objects: int
    budget_gb: float
    tflops: float | None
    torch: str = torch.__version__
    assumed: str = ASSUMED
    not_included: str = NOT_INCLUDED


@dataclass(frozen=True)
class Arithmetic:
    """The operations of an iteration, in 10^12, and the time that they take."""

    tflop: float
    seconds: float


@dataclass(frozen=True)
class ArmPlan:
    """What one arm takes, and what fits into the budget.

    Attributes:
        prediction: at the image size and the batch size of the setting.
        largest_side: side of the largest square images that fit at this batch size, in pixels; 0
            if none does.
        largest_batch: the largest batch that fits at this image size; 0 if none does.
        arithmetic: None unless asked for.
    """

    prediction: Prediction
    largest_side: int
    largest_batch: int
    arithmetic: Arithmetic | None = None


@dataclass(frozen=True)
class SchedulePeak:
    """The peak at one pair of coefficients, in bytes."""

    alpha: float
    beta: float
    peak: int


@dataclass(frozen=True)
class Plan:
    """The contents of plan.json."""

    setting: Setting
    arms: Sequence[ArmPlan]
    schedule: Sequence[SchedulePeak]

    def as_json(self) -> dict[str, Any]:
        """As in plan.json, where the fields of each arm lie in one flat row."""
        rows = []
        for arm in self.arms:
            row = asdict(arm.prediction)
            row |= {"largest_side": arm.largest_side, "largest_batch": arm.largest_batch}
            rows.append(row | (asdict(arm.arithmetic) if arm.arithmetic else {}))
        schedule = [asdict(point) for point in self.schedule]
        return {"setting": asdict(self.setting), "arms": rows, "schedule": schedule}


def plan_arm(
    planner: Planner, side: int, batch: int, *, budget: int, tflops: float | None
) -> ArmPlan:
    """Predict an arm, and search for the largest images and the largest batch that fit.

    Logs a line for each prediction.

    Args:
        planner: the arm's.
        side: side of the square images, in pixels.
        batch: number of images.
        budget: bytes.
        tflops: TFLOP/s of the GPU; None leaves the arithmetic out.
    """
    prediction = planner.predict(side, batch)
    peaks = {(side, batch): prediction.peak}

    def peak(side: int, batch: int) -> int:
        if (side, batch) not in peaks:
            peaks[side, batch] = planner.peak(side, batch)
        size = _gigabytes(peaks[side, batch])
        logger.info("%s: %d px, batch %d: %s GB", planner.arm, side, batch, size)
        return peaks[side, batch]

    step = planner.side_step
    largest_side = step * largest_fitting(
        lambda n: peak(n * step, batch),
        budget,
        maximum=LONGEST_SIDE // step,
        power=2,
        first=max(side // step, 1),
    )
    largest_batch = largest_fitting(
        lambda n: peak(side, n), budget, maximum=LARGEST_BATCH, first=batch
    )
    arithmetic = None
    if tflops is not None:
        logger.info("%s: counting the arithmetic", planner.arm)
        tflop = batch * planner.flops(side) / 1e12
        arithmetic = Arithmetic(tflop, tflop / tflops)
    return ArmPlan(prediction, largest_side, largest_batch, arithmetic)


def format_plan(plan: Plan) -> str:
    """What the peaks consist of, what fits, and the peak over the schedule, as Markdown."""
    setting = plan.setting
    side, batch = setting.image_size, setting.batch_size
    arms = [arm.prediction.arm for arm in plan.arms]
    peaks = [["GB", *arms]]
    for part in PARTS:
        peaks.append([part, *(_gigabytes(arm.prediction.parts[part]) for arm in plan.arms)])
    peaks.append(["peak", *(_gigabytes(arm.prediction.peak) for arm in plan.arms)])
    peaks.append(["saved for backward", *(_gigabytes(arm.prediction.saved) for arm in plan.arms)])
    fitting = [
        ["", *arms],
        [
            f"largest side at batch {batch}, px",
            *(_largest(arm.largest_side, LONGEST_SIDE) for arm in plan.arms),
        ],
        [
            f"largest batch at {side} px",
            *(_largest(arm.largest_batch, LARGEST_BATCH) for arm in plan.arms),
        ],
    ]
    arithmetic = [arm.arithmetic for arm in plan.arms if arm.arithmetic]
    time = ""
    if arithmetic:
        time = ", and the time of an iteration's products, without memory traffic and data"
        fitting.append(["TFLOP an iteration", *(f"{arm.tflop:.3g}" for arm in arithmetic)])
        fitting.append(
            [
                f"s an iteration at {setting.tflops:g} TFLOP/s",
                *(f"{arm.seconds:.3g}" for arm in arithmetic),
            ]
        )
    schedule = [["α", "β", "peak, GB"]]
    for point in plan.schedule:
        schedule.append([f"{point.alpha:.4g}", f"{point.beta:.4g}", _gigabytes(point.peak)])
    return _format_tiles(plan) + (
        f"Peak of an iteration, {side} x {side} px, batch {batch}, {setting.objects} objects "
        f"an image, and its parts at that moment:\n{markdown_table(peaks)}\n\n"
        f"What fits {setting.budget_gb:g} GB{time}:\n{markdown_table(fitting)}\n\n"
        f"dr2net over the schedule:\n{markdown_table(schedule)}\n\n"
        f"Assumed: {setting.assumed}.\nNot included: {setting.not_included}."
    )


def _format_tiles(plan: Plan) -> str:
    """For training on tiles: their size in the network, and whether whole images would fit."""
    setting = plan.setting
    if setting.tile_size is None:
        return ""
    largest = _largest(plan.arms[-1].largest_side, LONGEST_SIDE)
    return (
        f"INPUT.TILES cuts images into {setting.tile_size} px tiles, which enter the network at "
        f"{setting.image_size} px. With whole images, dr2net fits {largest} px into "
        f"{setting.budget_gb:g} GB.\n\n"
    )


def _gigabytes(size: int) -> str:
    return f"{size / GB:.3f}"


def _largest(number: int, limit: int) -> str:
    """The result of a search that stops at a limit."""
    if number == 0:
        return "none"
    return f"{number} or more" if number == limit else str(number)
