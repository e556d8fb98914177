"""The coefficients of a model, moved before every iteration; the same for both engines."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dr2net_d2.core import reversible_stacks


def update_coefficients(
    model: nn.Module,
    schedule: Callable[[float], tuple[float, float]],
    iteration: int,
    max_iter: int,
) -> dict[str, float]:
    """Set alpha and beta of every reversible stack for an iteration that is about to run.

    Args:
        model: a detector, wrapped or not; one without a reversible stack is left alone.
        schedule: progress in [0, 1] -> (alpha, beta); a ``CoefficientSchedule``, or one's own.
        iteration: from 0 to max_iter - 1.
        max_iter: length of the training.

    Returns:
        Scalars to log: the coefficients as set, the largest |h| so far, the number of fractional
        bits of the streams, the number of passes repeated because a stream outgrew them; empty
        without a stack.
    """
    stacks = reversible_stacks(model)
    scalars: dict[str, float] = {}
    for stack in stacks:
        stack.coefficients.set(*schedule(iteration / max_iter))
        alpha, beta = stack.coefficients.pairs(1)[0]
        scalars |= {"dr2net/alpha": alpha, "dr2net/beta": beta}
    if stacks and stacks[0].arithmetic == "exact":
        scalars["dr2net/stream_peak"] = max(stack.stream_range.largest for stack in stacks)
        scalars["dr2net/fraction_bits"] = min(stack.fraction_bits for stack in stacks)
        scalars["dr2net/overflows"] = sum(stack.overflows for stack in stacks)
    return scalars
