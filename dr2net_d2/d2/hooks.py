"""Hooks for the training loops of Detectron2."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
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
    """Writes the scalar "memory/peak_mb" after every iteration: the peak so far in MiB; period 1.

    Detectron2's own ``max_mem`` starts again from zero when anything resets CUDA's peak, and
    reports nothing on a CPU.
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
    step; each check synchronises with the device once. With a GradScaler, as in ``AMPTrainer``,
    gradients may overflow: the scaler then skips the step, and the scalar "amp/skipped_steps"
    counts such steps.

    The hook works in any trainer of Detectron2 whose model returns a dict of losses. It raises a
    FloatingPointError that does not tell the iteration; ``dr2net_d2.d2.Trainer`` adds it.
    """

    def __init__(self) -> None:
        self._gradients = GradientGuard()
        self._handle: RemovableHandle | None = None

    @property
    def _stepper(self) -> Any:
        """The trainer that runs the backward: this hook's, or the one inside a DefaultTrainer."""
        return getattr(self.trainer, "_trainer", self.trainer)

    @property
    def _scaler(self) -> Any:
        return getattr(self._stepper, "grad_scaler", None)

    def before_train(self) -> None:
        self._handle = self.trainer.model.register_forward_hook(_check_training_losses)
        if self._stepper is not self.trainer:
            # The inner trainer calls after_backward of its own hooks only, not of DefaultTrainer's.
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
    """Passes ``after_backward`` of an inner trainer on to a hook of the outer one."""

    def __init__(self, hook: HookBase) -> None:
        self._hook = hook

    def after_backward(self) -> None:
        self._hook.after_backward()


def _check_training_losses(model: nn.Module, _: Any, output: Any) -> None:
    if model.training:
        check_losses(output)


class SeedIterations(HookBase):
    """Seeds the generators of Python, NumPy and torch before every iteration; period 1.

    The random numbers of an iteration then depend on its index alone. A resumed training therefore
    continues exactly as the uninterrupted one, whatever was drawn in between, for example by an
    evaluation.

    Args:
        seed: seed of the training; iteration i on rank r gets ``seed + i * world_size + r``.
        rank, world_size: index of this process, and number of processes.
    """

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        self._first = seed + rank
        self._step = world_size

    def before_step(self) -> None:
        seed_all_rng((self._first + self.trainer.iter * self._step) % 2**32)


class LossNormalizer(HookBase):
    """Saves the running number of positives by which RetinaNet and FCOS divide their losses.

    Detectron2 keeps that number outside the state dict, so a resumed training would start again
    from its initial value.

    Args:
        model: any detector, not wrapped; without such a number nothing is saved.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def state_dict(self) -> dict[str, float]:
        value = getattr(self._model, "loss_normalizer", None)
        return {} if value is None else {"value": float(value)}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        self._model.loss_normalizer = state_dict["value"]


class MovingAverage(HookBase):
    """Keeps an exponential moving average of the trainable parameters; period 1.

    The average is saved with every checkpoint.

    Args:
        decay: weight of the previous average in each update, in (0, 1).
        model: the model, not wrapped.
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
        """A context in which the model's parameters are the averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # Values are copied, because FSDP gathers from the storage of each shard.
        for name, parameter in self._parameters.items():
            average = self._averages[name].clone()
            self._averages[name].copy_(parameter)
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        return self._averages

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        if state_dict.keys() != self._parameters.keys():
            raise ValueError("the moving average of the weights belongs to other parameters")
        for name, average in state_dict.items():
            self._averages[name] = placed_like(self._parameters[name], average)


class BestWeights(HookBase):
    """Writes the weights with the best evaluation so far to model_best.pth.

    It acts when ``update`` is called, and saves the best result with every checkpoint.

    Args:
        metric: name of a result, such as "bbox/AP"; higher is better, and nan is never the best.
        checkpointer: a checkpointer of the model alone.
    """

    def __init__(self, metric: str, checkpointer: StrictCheckpointer) -> None:
        self._metric = metric
        self._checkpointer = checkpointer
        self._best = -math.inf

    def update(self, results: Mapping[str, Any], iteration: int) -> None:
        """Take the results of an evaluation into account; empty ones are ignored.

        Raises:
            ConfigError: the metric is not among the results.
        """
        if not results:
            return
        values = flatten_results_dict(results)
        if self._metric not in values:
            raise ConfigError(
                f"the best checkpoint is chosen by {self._metric!r}, but results are "
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


class EvalUnlessFailed(hooks.EvalHook):
    """Detectron2's ``EvalHook``, which evaluates at the end only of a training that got there.

    ``EvalHook`` itself takes an error in the last iteration for the end of the training.
    """

    def after_train(self) -> None:
        self._eval_after_train = self.trainer.iter >= self.trainer.max_iter
        super().after_train()
