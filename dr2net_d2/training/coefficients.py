"""The coefficients of a model, moved before every iteration; the same for both engines."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from torch import nn

from dr2net_d2.core import ReversibleSequence, Schedule, coefficients_at, reversible_stacks
from dr2net_d2.core.coefficients import Scalar, schedule_name
from dr2net_d2.core.schedule import BETA_GRID
from dr2net_d2.errors import ConfigError


def update_coefficients(
    model: nn.Module, schedule: Schedule, iteration: int, max_iter: int
) -> dict[str, float]:
    """Set alpha and beta of every reversible stack for an iteration that is about to run.

    Args:
        model: a detector, wrapped or not; one without a reversible stack is left alone.
        schedule: progress in [0, 1] -> (alpha, beta); a ``CoefficientSchedule``, or a function of
            one's own. It may return sequences with one value for each function of the stacks, which
            are counted through all stacks in the order of registration.
        iteration: from 0 to max_iter - 1.
        max_iter: length of the training.

    Returns:
        Scalars to log; empty without a stack:
            dr2net/alpha, dr2net/beta: the coefficients as set; their mean, if each function has its
                own.
            dr2net/alpha_min, dr2net/alpha_max, dr2net/beta_min, dr2net/beta_max: only if each
                function has its own.
            dr2net/stream_peak: the largest |h| so far, in exact arithmetic as the next two are.
            dr2net/fraction_bits: fractional bits of the streams.
            dr2net/overflows: passes that were repeated because a stream outgrew its bits.

    Raises:
        ConfigError: the schedule returned no pair, a value outside [0, 1], or another number of
            values than there are functions.
    """
    stacks = reversible_stacks(model)
    if not stacks:
        return {}
    alpha, beta = _scheduled(schedule, iteration / max_iter, stacks[0].coefficients.grid)
    if isinstance(alpha, float) and isinstance(beta, float):
        for stack in stacks:
            stack.coefficients.set(alpha, beta)
        scalars = {"dr2net/alpha": alpha, "dr2net/beta": beta}
    else:
        scalars = _set_each(stacks, schedule, alpha, beta)
    if stacks[0].arithmetic == "exact":
        scalars["dr2net/stream_peak"] = max(stack.stream_range.largest for stack in stacks)
        scalars["dr2net/fraction_bits"] = min(stack.fraction_bits for stack in stacks)
        scalars["dr2net/overflows"] = sum(stack.overflows for stack in stacks)
    return scalars


def format_coefficients(scalars: Mapping[str, float]) -> str:
    """What a log line says of the scalars of ``update_coefficients``: "alpha 0.75, beta 0.25".

    Where each function has its own, "alpha 0.5 to 0.9375, beta 0.0625 to 0.5".
    """
    return ", ".join(
        f"{name} {low:g}" if low == high else f"{name} {low:g} to {high:g}"
        for name in ("alpha", "beta")
        for low, high in [value_range(scalars, name)]
    )


def value_range(scalars: Mapping[str, float], name: str) -> tuple[float, float]:
    """Smallest and largest value of "alpha" or "beta" in scalars of ``update_coefficients``."""
    value = scalars[f"dr2net/{name}"]
    low, high = (scalars.get(f"dr2net/{name}_{end}", value) for end in ("min", "max"))
    return low, high


def passed_pairs(
    schedule: Schedule, iterations: int, grid: int | None = BETA_GRID
) -> list[tuple[float, float]]:
    """The distinct pairs (alpha, beta) that a training passes through, in order.

    Args:
        schedule: see ``update_coefficients``; with one pair for all functions.
        iterations: length of the training.
        grid: see ``Coefficients``.

    Raises:
        ConfigError: the schedule returned no pair, a value outside [0, 1], or a pair for each
            function.
    """
    passed: dict[tuple[float, float], None] = {}
    for iteration in range(iterations):
        alpha, beta = _scheduled(schedule, iteration / iterations, grid)
        if not (isinstance(alpha, float) and isinstance(beta, float)):
            raise ConfigError(
                f"the schedule {schedule_name(schedule)} returns one pair (alpha, beta) for each "
                "function; memory plans and measurements of gradients take schedules with one pair "
                "for all: set MODEL.DR2NET.SCHEDULE.KIND to such a one for them"
            )
        passed[alpha, beta] = None
    return [*passed]


def _scheduled(schedule: Schedule, progress: float, grid: int | None) -> tuple[Scalar, Scalar]:
    try:
        return coefficients_at(schedule, progress, grid)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _set_each(
    stacks: list[ReversibleSequence], schedule: Schedule, alphas: Scalar, betas: Scalar
) -> dict[str, float]:
    assert isinstance(alphas, tuple) and isinstance(betas, tuple)
    functions = sum(len(stack) for stack in stacks)
    if len(alphas) != functions:
        raise ConfigError(
            f"the schedule {schedule_name(schedule)} returned {len(alphas)} pairs (alpha, beta), "
            f"but the reversible stacks of the model have {functions} blocks; return one pair "
            f"for all of them, or {functions}"
        )
    alpha, beta = iter(alphas), iter(betas)
    for stack in stacks:
        stack.coefficients.set(tuple(islice(alpha, len(stack))), tuple(islice(beta, len(stack))))
    scalars = {}
    for name, values in (("alpha", alphas), ("beta", betas)):
        scalars[f"dr2net/{name}"] = sum(values) / functions
        scalars[f"dr2net/{name}_min"] = min(values)
        scalars[f"dr2net/{name}_max"] = max(values)
    return scalars
