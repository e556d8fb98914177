"""Training hooks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.env import seed_all_rng
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.hooks import RemovableHandle

from dr2net_d2.core import Schedule
from dr2net_d2.core.memory import peak_memory_bytes
from dr2net_d2.core.schedule import snap_to_grid
from dr2net_d2.d2.sharding import placed_like
from dr2net_d2.errors import ConfigError
from dr2net_d2.training import (
    GradientGuard,
    check_losses,
    format_coefficients,
    update_coefficients,
    value_range,
)
from dr2net_d2.weights import StrictCheckpointer

logger = logging.getLogger(__name__)


class CoefficientHook(HookBase):
    """Sets alpha and beta of the reversible stacks before every iteration; period 1.

    Writes the scalars of ``training.update_coefficients`` to the event storage, and the
    coefficients to the log whenever beta, rounded to the grid, has changed. If each function has
    its own, that is when the smallest or the largest beta has changed. A model without a reversible
    stack is left alone.

    Args:
        schedule: progress in [0, 1] -> (alpha, beta); see ``training.update_coefficients``.
        max_iter: length of the whole training, including what ran before it was resumed.
    """

    def __init__(self, schedule: Schedule, max_iter: int) -> None:
        self._schedule = schedule
        self._max_iter = max_iter
        self._logged: list[float] = []

    def before_step(self) -> None:
        iteration = self.trainer.iter
        scalars = update_coefficients(self.trainer.model, self._schedule, iteration, self._max_iter)
        if not scalars:
            return
        self.trainer.storage.put_scalars(smoothing_hint=False, **scalars)
        betas = [snap_to_grid(beta) for beta in value_range(scalars, "beta")]
        if betas != self._logged:
            self._logged = betas
            logger.info("iteration %d: %s", iteration, format_coefficients(scalars))


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


class LossNormalizer(HookBase):
    """Saves the running number of positives that RetinaNet and FCOS divide their losses by.

    Detectron2 keeps it outside the state dict, so that a resumed training would go on from the
    initial value.

    Args:
        model: a detector of any kind, not wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def state_dict(self) -> dict[str, float]:
        value = getattr(self._model, "loss_normalizer", None)
        return {} if value is None else {"value": float(value)}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        self._model.loss_normalizer = state_dict["value"]


class MovingAverage(HookBase):
    """An exponential moving average of the trainable parameters; period 1.

    Its state is saved with a checkpoint.

    Args:
        decay: in (0, 1), the weight of the average so far.
        model: not wrapped.
    """

    def __init__(self, decay: float, model: nn.Module) -> None:
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._averages: dict[str, Tensor] = {}
        self._average = get_ema_multi_avg_fn(decay)

    def before_train(self) -> None:
        for name, parameter in self._parameters.items():
            self._averages.setdefault(name, parameter.detach().clone())

    def after_step(self) -> None:
        values = [parameter.detach() for parameter in self._parameters.values()]
        self._average([*self._averages.values()], values, 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averages for parameters."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # By value: what FSDP gathers is the storage of a shard.
        for name, parameter in self._parameters.items():
            average = self._averages[name].clone()
            self._averages[name].copy_(parameter)
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        return self._averages

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        if state_dict.keys() != self._parameters.keys():
            raise ValueError("the moving average of the weights is of other parameters")
        for name, average in state_dict.items():
            self._averages[name] = placed_like(self._parameters[name], average)


class BestWeights(HookBase):
    """Keeps the weights of the best evaluation in model_best.pth; ``update`` is its period.

    Args:
        metric: a result such as "bbox/AP"; more is better, nan is never best.
        checkpointer: of the model alone.
    """

    def __init__(self, metric: str, checkpointer: StrictCheckpointer) -> None:
        self._metric = metric
        self._checkpointer = checkpointer
        self._best = -math.inf

    def update(self, results: Mapping[str, Any], iteration: int) -> None:
        """To be called with the results of an evaluation; empty ones are left alone.

        Raises:
            ConfigError: the metric is not among the results.
        """
        if not results:
            return
        values = flatten_results_dict(results)
        if self._metric not in values:
            raise ConfigError(
                f"the best checkpoint is to be the best in {self._metric!r}, but results are "
                f"{', '.join(values)}; choose one of them"
            )
        if values[self._metric] > self._best:
            self._best = values[self._metric]
            logger.info("iteration %d: best %s so far, %g", iteration, self._metric, self._best)
            self._checkpointer.save_weights("model_best")

    def state_dict(self) -> dict[str, float]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        self._best = state_dict["best"]
