"""Guards against losses, gradients and weights that are not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dr2net_d2.core.ranks import whole

logger = logging.getLogger(__name__)

_ADVICE = "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or enable SOLVER.CLIP_GRADIENTS"


@contextmanager
def divergence_at(iteration: int) -> Iterator[None]:
    """Add the iteration and advice to the message of a FloatingPointError.

    Raises:
        FloatingPointError: raised inside the context; here with the longer message.
    """
    try:
        yield
    except FloatingPointError as error:
        reason = str(error).rstrip(".")
        raise FloatingPointError(f"iteration {iteration}: {reason}; {_ADVICE}") from error


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with a nan or an infinity; synchronises once if there are none."""
    if not tensors:
        return []
    separate = torch._foreach_norm([tensor.detach() for tensor in tensors.values()])
    norms = whole(torch.stack([norm.float() for norm in separate]))
    # The norm of a tensor may overflow although every element is finite, so those are looked at.
    return [
        name
        for (name, tensor), norm in zip(tensors.items(), norms.tolist(), strict=True)
        if not math.isfinite(norm) and not tensor.isfinite().all()
    ]


def check_losses(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of the losses, with one device synchronisation.

    Raises:
        FloatingPointError: losses are not finite; the message names them.
    """
    stacked = torch.stack([loss.detach() for loss in losses.values()])
    values = dict(zip(losses, stacked.tolist(), strict=True))
    bad = [f"{name} {value:g}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"the loss is not finite ({', '.join(bad)}): the input or the weights are not finite, "
            "or training has diverged"
        )
    return values


def check_gradients(model: nn.Module) -> None:
    """Check the gradients between the backward pass and the optimizer's step.

    Args:
        model: a detector, which may be wrapped in DistributedDataParallel. Its parameters are
            assumed to be in the order of the forward pass, so that the backward pass reaches the
            last one first.

    Raises:
        FloatingPointError: a gradient is not finite; the message names the parameter that the
            backward pass reached first.
    """
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    bad = non_finite(grads)
    if bad:
        name = bad[-1]
        grad = whole(grads[name])
        wrong = grad[~grad.isfinite()]
        raise FloatingPointError(
            f"the gradient of {name.removeprefix('module.')} is {wrong[0].item()} in "
            f"{wrong.numel()} of {grad.numel()} elements, the first that the backward met of "
            f"{len(bad)} non-finite among {len(grads)} gradients; the weights are still those of "
            "the iteration before"
        )


class GradientGuard:
    """Raises an error for gradients that are not finite, or counts them if a GradScaler skips them.

    The count is part of the checkpoint, so that a resumed training continues it.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._scale = 0.0

    def after_backward(self, model: nn.Module, scaler: torch.amp.GradScaler | None) -> None:
        """Call this between the backward pass and the step of the scaler or optimizer.

        Raises:
            FloatingPointError: there is no enabled scaler, and a gradient is not finite.
        """
        if scaler is None or not scaler.is_enabled():
            check_gradients(model)
        else:
            self._scale = scaler.get_scale()

    def after_step(self, iteration: int, scaler: torch.amp.GradScaler | None) -> dict[str, float]:
        """Call this after the scaler's update.

        Returns:
            Scalars to log; empty without an enabled scaler.
        """
        if scaler is None or not scaler.is_enabled():
            return {}
        scale = scaler.get_scale()
        # The scaler lowers it only after a skipped step.
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
