"""The training loop of both config styles: accumulation, autocast, hooks, exact resumption."""

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
    EvalUnlessFailed,
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
    """How a training runs. YAML configs and LazyConfigs are both translated into it.

    Attributes:
        output_dir: folder of checkpoints, logs and results.
        max_iter: length of the whole training in iterations.
        schedule: progress -> (alpha, beta).
        seed: makes the training repeatable; with a negative one every run differs.
        amp_dtype: dtype of autocast; None trains in the precision of the weights. With float16 the
            loss is scaled.
        accumulation_steps: batches of the train loader per iteration.
        ema_decay: decay of the moving average of the weights, which is evaluated in place of the
            weights and written to model_ema.pth; 0 for none.
        eval_period: iterations between evaluations; 0 evaluates at the end only.
        checkpoint_period: iterations between checkpoints.
        max_checkpoints: number of periodic checkpoints to keep; None keeps all.
        log_period: iterations between lines of the log.
        best_metric: the result, such as "bbox/AP", by which the best weights are kept; "" keeps
            none.
        allow_partial: see ``StrictCheckpointer``.
        expected_results: rows of (task, metric, value, tolerance) that the results must match.
        ddp: arguments of DistributedDataParallel, and Detectron2's ``fp16_compression``; ignored
            for a sharded model.

    Raises:
        ValueError: max_iter is below 1, or ema_decay outside [0, 1).
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
    """Finetunes a detector as a Dr2Net, with evaluation, checkpoints and exact resumption.

    With a seed, no data loader workers and deterministic kernels, a resumed training ends with the
    same weights, bit for bit, as an uninterrupted one.

    Args:
        model: on its device and not wrapped, though it may be sharded (``sharding.shard``); in
            training it returns a dict of losses.
        optimizer: over the model's parameters.
        lr_scheduler: a scheduler of torch, or fvcore's multiplier of the learning rates.
        train_loader: Detectron2's train loader, with ``accumulation_steps`` batches an iteration.
        evaluate: (model, whether this is the last evaluation) -> results such as Detectron2's
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
        weights = Dr2NetCheckpointer(model, settings.output_dir)
        average = MovingAverage(settings.ema_decay, model) if settings.ema_decay else None
        best = BestWeights(settings.best_metric, weights) if settings.best_metric else None

        def evaluate_and_keep() -> Results:
            with average.in_place() if average else nullcontext():
                with unsharded(model):
                    self.results = evaluate(model, self.iter >= settings.max_iter)
                if average:
                    weights.save_weights("model_ema")
                if best:
                    # Only the main process has results.
                    best.update(comm.all_gather(self.results)[0], self.iter)
            return self.results

        seed = None
        if settings.seed >= 0:
            seed = SeedIterations(settings.seed, comm.get_rank(), comm.get_world_size())
        checkpoints = hooks.PeriodicCheckpointer(
            self.checkpointer,
            settings.checkpoint_period,
            # Only the main process writes checkpoints, so only it removes old ones.
            max_to_keep=settings.max_checkpoints if main else None,
        )
        writer = None
        if main:
            writers = default_writers(settings.output_dir, settings.max_iter)
            writer = hooks.PeriodicWriter(writers, settings.log_period)
        return [
            # First, so that the time of an iteration excludes what other hooks do after it.
            hooks.IterationTimer(),
            # Before anything in the iteration draws random numbers.
            seed,
            # Anywhere before the forward.
            CoefficientHook(settings.schedule, settings.max_iter),
            # Anywhere before the writer of its scalar.
            PeakMemory(),
            # What these keep is part of a checkpoint, or changes the model as PreciseBN does, so
            # they act before checkpoints are written.
            NonFiniteGuard(),
            hooks.LRScheduler(self.optimizer, lr_scheduler),
            LossNormalizer(model),
            average,
            best,
            *extra_hooks,
            # Before the evaluation, so that one which fails does not cost the checkpoint.
            checkpoints,
            # After all that changes the weights or their average.
            EvalUnlessFailed(settings.eval_period, evaluate_and_keep),
            # Last, so that the results of the evaluation are written, too.
            writer,
        ]

    def resume_or_load(self, weights: str, resume: bool) -> None:
        """Continue from the last checkpoint in the output folder, or start from a file of weights.

        Args:
            weights: path, URL or name of the weights to start from; empty for the model as it is.
            resume: continue if there is a checkpoint.

        Raises:
            WeightsError: the weights do not fit, or the checkpoint belongs to another training.
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
        """Train from where ``resume_or_load`` left off to the end; returns the last results.

        Raises:
            FloatingPointError: the training has diverged; the last checkpoint was written before.
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
        """A context in which gradients accumulate locally; the last pass reduces them."""
        if isinstance(self.model, FSDPModule):
            return without_reduction(self.model)
        return self.model.no_sync() if comm.get_world_size() > 1 else nullcontext()

    def after_step(self) -> None:
        with divergence_at(self.iter):
            super().after_step()
