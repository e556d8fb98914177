"""Moving the coefficients of a detector during training; both engines call this each iteration."""

from __future__ import annotations

from torch import nn

from dr2net_d2.core import CoefficientSchedule, ReversibleSequence


def update_coefficients(
    model: nn.Module, schedule: CoefficientSchedule, iteration: int, max_iter: int
) -> dict[str, float]:
    """Set alpha and beta of every reversible stack for an iteration that is about to run.

    Args:
        model: a detector, wrapped or not; one without a reversible stack is left alone.
        iteration: from 0 to max_iter - 1.
        max_iter: length of the training.

    Returns:
        Scalars to log: the coefficients as set, the number of fractional bits of the streams, the
        number of passes repeated because a stream outgrew them; empty without a stack.
    """
    stacks = [module for module in model.modules() if isinstance(module, ReversibleSequence)]
    scalars: dict[str, float] = {}
    for stack in stacks:
        alpha, beta = stack.coefficients.set(*schedule(iteration / max_iter))
        scalars |= {"dr2net/alpha": alpha, "dr2net/beta": beta}
    if stacks and stacks[0].arithmetic == "exact":
        scalars["dr2net/fraction_bits"] = min(stack.fraction_bits for stack in stacks)
        scalars["dr2net/overflows"] = sum(stack.overflows for stack in stacks)
    return scalars
