"""The training loop of both config styles: accumulation, autocast, hooks, exact resuming."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.engine.defaults import create_ddp_model, default_writers
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dr2net_d2.core import Schedule
from dr2net_d2.d2.checkpointer import Dr2NetCheckpointer
from dr2net_d2.d2.data import skip_batches
from dr2net_d2.d2.hooks import (
    BestWeights,
    CoefficientHook,
    LossNormalizer,
    MovingAverage,
    NonFiniteGuard,
    PeakMemory,
    SeedIterations,
)
from dr2net_d2.d2.sharding import load_optimizer_shards, unsharded, without_reduction
from dr2net_d2.errors import WeightsError
from dr2net_d2.training import divergence_at

logger = logging.getLogger(__name__)

Results = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a training runs; YAML and LazyConfig files are both translated to it.

    Attributes:
        output_dir: of checkpoints, logs and results.
        max_iter: length in iterations, resumed parts included.
        schedule: of the coefficients.
        seed: makes it repeatable; negative: another one each time.
        amp_dtype: of autocast; None trains in the weights' precision. float16 has its loss scaled.
        accumulation_steps: batches of the train loader that an iteration goes through.
        ema_decay: of the moving average of the weights, which is evaluated in their place and
            written to model_ema.pth; 0 for none.
        eval_period, checkpoint_period, log_period: in iterations; 0 evaluates at the end alone.
        max_checkpoints: periodic ones to keep; None keeps all.
        best_metric: the result, such as "bbox/AP", whose best weights are kept; "" keeps none.
        allow_partial: see ``StrictCheckpointer``.
        expected_results: rows of task, metric, value, tolerance; the command fails without them.
        ddp: arguments of DistributedDataParallel, and Detectron2's ``fp16_compression``; of no
            effect on a model that is sharded.

    Raises:
        ValueError: no iterations, or a decay outside [0, 1).
    """

    output_dir: str
    max_iter: int
    schedule: Schedule
    seed: int = -1
    amp_dtype: torch.dtype | None = None
    accumulation_steps: int = 1
    ema_decay: float = 0.0
    eval_period: int = 0
    checkpoint_period: int = 5000
    max_checkpoints: int | None = None
    log_period: int = 20
    best_metric: str = ""
    allow_partial: Sequence[str] = ()
    expected_results: Sequence[Sequence[Any]] = ()
    ddp: Mapping[str, Any] = field(default_factory=lambda: {"broadcast_buffers": False})

    def __post_init__(self) -> None:
        if self.max_iter < 1:
            raise ValueError(f"max_iter is {self.max_iter}; it must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay is {self.ema_decay}; it must be at least 0, for none, and below 1"
            )


class Trainer(SimpleTrainer):
    """Finetunes a detector by Dr2Net, with evaluation, checkpoints and exact resuming.

    With a seed, no data loader workers and deterministic kernels, a training that was resumed ends
    with the same weights, bit for bit, as one that was not interrupted.

    Args:
        model: on its device, not wrapped, but maybe sharded (``sharding.shard``); it returns a dict
            of losses in training.
        optimizer: of its parameters.
        lr_scheduler: torch's, or fvcore's multiplier of the learning rates.
        train_loader: of Detectron2; ``accumulation_steps`` of its batches make an iteration.
        evaluate: (model, whether it is the last evaluation) -> results, as Detectron2's
            ``{"bbox": {"AP": ...}}``.
        settings: how to train.
        extra_hooks: run before checkpoints are written.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        train_loader: Any,
        evaluate: Callable[[nn.Module, bool], Results],
        settings: Settings,
        extra_hooks: Sequence[HookBase] = (),
    ) -> None:
        self.device = next(model.parameters()).device
        devices = {} if self.device.type == "cuda" else {"device_ids": None}
        wrapped = model
        if isinstance(model, FSDPModule):
            optimizer.register_load_state_dict_pre_hook(load_optimizer_shards)
        else:
            wrapped = create_ddp_model(model, **settings.ddp, **devices)
        super().__init__(wrapped, train_loader, optimizer, zero_grad_before_forward=True)
        self.settings = settings
        self.results: Results = {}
        scaled = settings.amp_dtype is torch.float16
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.checkpointer = Dr2NetCheckpointer(
            wrapped,
            settings.output_dir,
            allow_partial=settings.allow_partial,
            trainer=weakref.proxy(self),
        )
        self.register_hooks(self._build_hooks(model, evaluate, lr_scheduler, extra_hooks))

    def _build_hooks(
        self,
        model: nn.Module,
        evaluate: Callable[[nn.Module, bool], Results],
        lr_scheduler: Any,
        extra_hooks: Sequence[HookBase],
    ) -> list[HookBase | None]:
        settings, main = self.settings, comm.is_main_process()
        average = MovingAverage(settings.ema_decay, model) if settings.ema_decay else None
        weights = Dr2NetCheckpointer(model, settings.output_dir)

        def evaluate_and_keep() -> Results:
            with average.in_place() if average else nullcontext():
                with unsharded(model):
                    self.results = evaluate(model, self.iter >= settings.max_iter)
                if average:
                    weights.save_weights("model_ema")
                if best:
                    # Those of the main process: all others have none.
                    best.update(comm.all_gather(self.results)[0], self.iter)
            return self.results

        best = BestWeights(settings.best_metric, weights) if settings.best_metric else None
        ours: list[HookBase | None] = [
            hooks.IterationTimer(),
            CoefficientHook(settings.schedule, settings.max_iter),
            PeakMemory(),
            NonFiniteGuard(),
            hooks.LRScheduler(self.optimizer, lr_scheduler),
            LossNormalizer(model),
            average,
            best,
            *extra_hooks,
        ]
        if settings.seed >= 0:
            ours.insert(1, SeedIterations(settings.seed, comm.get_rank(), comm.get_world_size()))
        # Only the main process writes checkpoints, and removes them.
        period, keep = settings.checkpoint_period, settings.max_checkpoints if main else None
        ours.append(hooks.PeriodicCheckpointer(self.checkpointer, period, max_to_keep=keep))
        ours.append(hooks.EvalHook(settings.eval_period, evaluate_and_keep))
        if main:
            # Last, so that evaluation results are written too.
            writers = default_writers(settings.output_dir, settings.max_iter)
            ours.append(hooks.PeriodicWriter(writers, settings.log_period))
        return ours

    def resume_or_load(self, weights: str, resume: bool) -> None:
        """Continue from the last checkpoint of OUTPUT_DIR, or begin with a file of weights.

        Raises:
            WeightsError: the weights do not fit, or the checkpoint is of another training.
        """
        self.iter = -1
        self.checkpointer.resume_or_load(weights, resume=resume)
        if self.iter == -1 and resume and self.checkpointer.has_checkpoint():
            raise WeightsError(
                f"{self.checkpointer.get_checkpoint_file()} was not written by Detectron2; "
                "resume with the engine that wrote it, or choose another OUTPUT_DIR"
            )
        self.start_iter = self.iter + 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            super().load_state_dict(state_dict)
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        except (LookupError, RuntimeError, ValueError) as error:
            raise WeightsError(
                f"the checkpoint in {self.settings.output_dir} does not continue this training "
                f"({error}); resume with the config that wrote it, or choose another OUTPUT_DIR"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def train(self) -> Results:  # type: ignore[override]
        """From where ``resume_or_load`` left off to the end; returns the last results.

        Raises:
            FloatingPointError: the training has diverged; the last checkpoint is from before that.
        """
        skip_batches(self.data_loader, self.start_iter * self.settings.accumulation_steps)
        super().train(self.start_iter, self.settings.max_iter)
        return self.results

    def run_step(self) -> None:
        with divergence_at(self.iter):
            self._run_step()

    def _run_step(self) -> None:
        steps, dtype = self.settings.accumulation_steps, self.settings.amp_dtype
        self.optimizer.zero_grad()
        waited = 0.0
        total: dict[str, Tensor] = {}
        for step in range(1, steps + 1):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            waited += time.perf_counter() - start
            last = step == steps
            with nullcontext() if last else self._without_reduction():
                with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                    losses: dict[str, Tensor] = self.model(data)
                    loss = torch.stack([*losses.values()]).sum() / steps
                self.grad_scaler.scale(loss).backward()
            for name, value in losses.items():
                total[name] = value.detach() / steps + total.get(name, 0)
        self.after_backward()
        self._write_metrics(total, waited)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _without_reduction(self) -> Any:
        """Gradients of several passes are reduced over processes with the last of them."""
        if isinstance(self.model, FSDPModule):
            return without_reduction(self.model)
        return self.model.no_sync() if comm.get_world_size() > 1 else nullcontext()

    def after_step(self) -> None:
        with divergence_at(self.iter):
            super().after_step()

    def after_train(self) -> None:
        if self.iter < self.max_iter:
            # EvalHook would take an error in the last iteration for the end of the training.
            self._hooks: list[HookBase] = [
                hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)
            ]
        super().after_train()
