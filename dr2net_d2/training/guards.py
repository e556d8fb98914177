"""What both engines do each iteration to stop at what is not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dr2net_d2.core.ranks import whole

logger = logging.getLogger(__name__)

CALMER = "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or enable SOLVER.CLIP_GRADIENTS"


@contextmanager
def divergence_at(iteration: int) -> Iterator[None]:
    """Put the iteration, and what to do, into the message of a FloatingPointError.

    Raises:
        FloatingPointError: the one that was raised inside, with more to read.
    """
    try:
        yield
    except FloatingPointError as error:
        reason = str(error).rstrip(".")
        raise FloatingPointError(f"iteration {iteration}: {reason}; {CALMER}") from error


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with a nan or an infinity; without any, one synchronisation."""
    if not tensors:
        return []
    found = torch._foreach_norm([tensor.detach() for tensor in tensors.values()])
    norms = whole(torch.stack([norm.float() for norm in found]))
    # Where every element is finite the sum of their squares may not be, so the norm is not enough.
    return [
        name
        for (name, tensor), norm in zip(tensors.items(), norms.tolist(), strict=True)
        if not math.isfinite(norm) and not tensor.isfinite().all()
    ]


def check_losses(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of the losses, by one synchronisation with the device.

    Raises:
        FloatingPointError: a loss is not finite; the message names each such one.
    """
    stacked = torch.stack([loss.detach() for loss in losses.values()])
    values = dict(zip(losses, stacked.tolist(), strict=True))
    if bad := [f"{name} {value:g}" for name, value in values.items() if not math.isfinite(value)]:
        raise FloatingPointError(
            f"the loss is not finite ({', '.join(bad)}): the input or the weights are not finite, "
            "or training has diverged"
        )
    return values


def check_gradients(model: nn.Module) -> None:
    """Make sure, after the backward, that the optimizer may step.

    Args:
        model: a detector, wrapped in DistributedDataParallel or not. Its parameters are registered
            in the order of the forward, so the backward meets the last of them first.

    Raises:
        FloatingPointError: a gradient is not finite; the message has the name of the first such
            parameter that the backward met.
    """
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if bad := non_finite(grads):
        name, grad = bad[-1], whole(grads[bad[-1]])
        wrong = grad[~grad.isfinite()]
        raise FloatingPointError(
            f"the gradient of {name.removeprefix('module.')} is {wrong[0].item()} in "
            f"{wrong.numel()} of {grad.numel()} elements, the first that the backward met of "
            f"{len(bad)} non-finite among {len(grads)} gradients; the weights are still those of "
            "the iteration before"
        )


class GradientGuard:
    """Stops at gradients that are not finite; with a GradScaler, which skips them, counts them.

    The count is saved with a checkpoint, so that a resumed training goes on counting.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._scale = 0.0

    def after_backward(self, model: nn.Module, scaler: torch.amp.GradScaler | None) -> None:
        """To be called before the scaler's and the optimizer's step.

        Raises:
            FloatingPointError: as ``check_gradients``, but never with an enabled scaler.
        """
        if scaler is None or not scaler.is_enabled():
            check_gradients(model)
        else:
            self._scale = scaler.get_scale()

    def after_step(self, iteration: int, scaler: torch.amp.GradScaler | None) -> dict[str, float]:
        """To be called after the scaler's update; returns scalars to log, none without a scaler."""
        if scaler is None or not scaler.is_enabled():
            return {}
        scale = scaler.get_scale()
        # It is lowered after a skipped step, and by nothing else.
        if scale < self._scale:
            self.skipped += 1
            if self.skipped.bit_count() == 1:  # 1, 2, 4, 8, ...
                logger.warning(
                    "iteration %d: gradients overflowed at the loss scale %g, so the step was "
                    "skipped and the scale is now %g (%d skipped so far)",
                    iteration,
                    self._scale,
                    scale,
                    self.skipped,
                )
        return {"amp/skipped_steps": self.skipped}

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self.skipped = state_dict["skipped"]
