"""Training hooks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from torch import nn
from torch.utils.hooks import RemovableHandle

from dr2net_d2.core import CoefficientSchedule
from dr2net_d2.core.memory import peak_memory_bytes
from dr2net_d2.core.schedule import snap_to_grid
from dr2net_d2.finetuning import GradientGuard, check_losses, update_coefficients

logger = logging.getLogger(__name__)


class CoefficientHook(HookBase):
    """Sets alpha and beta of the reversible stacks before every iteration; period 1.

    Writes the scalars of ``finetuning.update_coefficients`` to the event storage, and to the log
    whenever beta, rounded to the grid, has changed. A model without a reversible stack is left
    alone.

    Args:
        schedule: progress -> (alpha, beta).
        max_iter: length of the whole training, resumed parts included.
    """

    def __init__(self, schedule: CoefficientSchedule, max_iter: int) -> None:
        self._schedule = schedule
        self._max_iter = max_iter
        self._logged: float | None = None

    def before_step(self) -> None:
        iteration = self.trainer.iter
        scalars = update_coefficients(self.trainer.model, self._schedule, iteration, self._max_iter)
        if not scalars:
            return
        self.trainer.storage.put_scalars(smoothing_hint=False, **scalars)
        alpha, beta = scalars["dr2net/alpha"], scalars["dr2net/beta"]
        if snap_to_grid(beta) != self._logged:
            self._logged = snap_to_grid(beta)
            logger.info("iteration %d: alpha %g, beta %g", iteration, alpha, beta)


class PeakMemory(HookBase):
    """Writes the scalar "memory/peak_mb" after every iteration: MiB at most so far; period 1.

    Detectron2's own ``max_mem`` starts anew whenever someone resets CUDA's peak, and says nothing
    on a CPU.
    """

    def __init__(self) -> None:
        self._peak = 0

    def after_step(self) -> None:
        device = next(self.trainer.model.parameters()).device
        self._peak = max(self._peak, peak_memory_bytes(device))
        self.trainer.storage.put_scalar("memory/peak_mb", self._peak / 2**20, smoothing_hint=False)


class NonFiniteGuard(HookBase):
    """Stops the training at a loss or a gradient that is not finite; period 1.

    Losses are checked before the backward, gradients between the backward and the optimizer's
    step; each costs one synchronisation with the device. With a GradScaler, as in ``AMPTrainer``,
    gradients may overflow: the scaler skips the step, and the scalar "amp/skipped_steps" has the
    number of such steps so far.

    Works in any trainer of Detectron2 whose model returns a dict of losses. Raises
    FloatingPointError, without the iteration: ``dr2net_d2.d2.Trainer`` adds it.
    """

    def __init__(self) -> None:
        self._gradients = GradientGuard()
        self._handle: RemovableHandle | None = None

    @property
    def _stepper(self) -> Any:
        """Who runs the backward: the trainer, or the one within a ``DefaultTrainer``."""
        return getattr(self.trainer, "_trainer", self.trainer)

    @property
    def _scaler(self) -> Any:
        return getattr(self._stepper, "grad_scaler", None)

    def before_train(self) -> None:
        self._handle = self.trainer.model.register_forward_hook(_check_training_losses)
        if self._stepper is not self.trainer:
            # It calls after_backward of its own hooks alone, not of DefaultTrainer's.
            self._stepper.register_hooks([_AfterBackward(self)])

    def after_train(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def after_backward(self) -> None:
        self._gradients.after_backward(self.trainer.model, self._scaler)

    def after_step(self) -> None:
        scalars = self._gradients.after_step(self.trainer.iter, self._scaler)
        self.trainer.storage.put_scalars(smoothing_hint=False, **scalars)

    def state_dict(self) -> dict[str, int]:
        return self._gradients.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self._gradients.load_state_dict(state_dict)


class _AfterBackward(HookBase):
    """Passes ``after_backward`` on to a hook of the outer trainer."""

    def __init__(self, hook: HookBase) -> None:
        self._hook = hook

    def after_backward(self) -> None:
        self._hook.after_backward()


def _check_training_losses(model: nn.Module, _: Any, output: Any) -> None:
    if model.training:
        check_losses(output)


class SeedIterations(HookBase):
    """Seeds Python's, NumPy's and torch's generators before every iteration; period 1.

    What an iteration draws then depends on its number alone, so a resumed training goes on as the
    uninterrupted one would have, whatever was drawn in between, by an evaluation for example.

    Args:
        seed: of the training; iteration i of rank r gets ``seed + i * world_size + r``.
        rank, world_size: of this process.
    """

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        self._first = seed + rank
        self._step = world_size

    def before_step(self) -> None:
        seed_all_rng((self._first + self.trainer.iter * self._step) % 2**32)
