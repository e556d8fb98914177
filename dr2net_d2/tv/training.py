"""Training loop and evaluation of the torchvision detector, on one CPU or GPU."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import PeriodicCheckpointer
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dr2net_d2.config import (
    amp_dtype,
    build_slicing,
    coefficient_schedule,
    evaluation_protocol,
    training_tiles,
)
from dr2net_d2.core import Schedule
from dr2net_d2.core.memory import peak_memory_bytes
from dr2net_d2.core.replay import rng_state, set_rng_state
from dr2net_d2.data import CocoRecord
from dr2net_d2.errors import UserError, WeightsError, config_section
from dr2net_d2.evaluation import EVALUATION_FILE, RESULTS_FILE, evaluate_boxes
from dr2net_d2.training import (
    GradientGuard,
    build_optimizer,
    check_losses,
    divergence_at,
    update_coefficients,
)
from dr2net_d2.tv.dataset import (
    Jitter,
    Split,
    TestImages,
    TrainingStream,
    as_lists,
    choose_training_tiles,
)
from dr2net_d2.tv.lr_schedule import lr_multiplier
from dr2net_d2.tv.output import MetricWriter
from dr2net_d2.tv.predictor import detect
from dr2net_d2.weights import StrictCheckpointer

logger = logging.getLogger(__name__)

LOG_PERIOD = 20
"""Iterations between two lines of metrics.json."""


class Training:
    """A training that can be interrupted after any checkpoint and resumed.

    On a CPU, with the same number of threads, the result is bit for bit that of an uninterrupted
    training.

    Args:
        cfg: a checked config.
        model: on its device; takes the weights of MODEL.WEIGHTS, or of the last checkpoint.
        records: the training images.
        seed: of the image stream; a resumed training keeps the seed it was started with.
        resume: continue from the last checkpoint in OUTPUT_DIR, if there is one.

    Attributes:
        schedule: progress in [0, 1] -> (alpha, beta); may be replaced before ``run``.

    Raises:
        UserError: config, weights and images do not fit together. Nothing is written before
            ``run``.
    """

    def __init__(
        self, cfg: CfgNode, model: nn.Module, records: Sequence[CocoRecord], seed: int, resume: bool
    ) -> None:
        self.cfg = cfg
        self.model = model
        self.records = records
        choice = training_tiles(cfg)
        # From the config's seed, or 0, because a resumed training must draw the same tiles.
        seed_of_tiles = max(cfg.SEED, 0)
        self.tiles = choose_training_tiles(records, choice, seed_of_tiles) if choice else None
        self.seed = seed
        self.device = next(model.parameters()).device
        self.schedule: Schedule = coefficient_schedule(cfg, lambda: len(self.tiles or records))
        self.multiplier = lr_multiplier(cfg)
        with config_section("SOLVER"):
            self.optimizer = build_optimizer(cfg, model)
        self._base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        amp = cfg.SOLVER.AMP
        self.amp_dtype = amp_dtype(amp.ENABLED, amp.DTYPE, cfg.MODEL.DEVICE)
        scaled = self.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.guard = GradientGuard()
        self.checkpointer = StrictCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            allow_partial=cfg.MODEL.DR2NET.ALLOW_PARTIAL,
            optimizer=self.optimizer,
            scaler=self.scaler,
            guard=self.guard,
        )
        self.start = 0
        if resume and self.checkpointer.has_checkpoint():
            self._resume()
        else:
            self.checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])

    def _resume(self) -> None:
        path = self.checkpointer.get_checkpoint_file()
        try:
            saved = self.checkpointer.load(path)
            self.start = saved["iteration"] + 1
            self.seed = saved["seed"]
            set_rng_state(self.device, saved["rng"])
        except UserError:
            raise
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise WeightsError(
                f"{path} does not continue this training ({error}); resume with the engine, device "
                "and config that wrote it, or choose another OUTPUT_DIR"
            ) from error
        logger.info("Resuming after iteration %d", saved["iteration"])

    def run(self, test: Split | None, output_dir: Path) -> dict[str, dict[str, float]]:
        """Train to MAX_ITER with checkpoints, logs and evaluations.

        Args:
            test: the dataset to evaluate on, if there is one.
            output_dir: an existing folder.

        Returns:
            {"bbox": metrics of the last evaluation}; empty without ``test``.

        Raises:
            FloatingPointError: the training has diverged; the last checkpoint is still good.
        """
        max_iter, period = self.cfg.SOLVER.MAX_ITER, self.cfg.TEST.EVAL_PERIOD
        saver = PeriodicCheckpointer(self.checkpointer, self.cfg.SOLVER.CHECKPOINT_PERIOD, max_iter)
        window: dict[str, list[float]] = defaultdict(list)
        # Shown on terminals only; the log has a line every LOG_PERIOD iterations.
        progress = tqdm(initial=self.start, total=max_iter, dynamic_ncols=True, disable=None)
        with closing(MetricWriter(output_dir, self.start)) as writer, progress:
            clock = time.perf_counter()
            self.model.train()
            for iteration, (images, targets) in enumerate(self._batches(), self.start):
                done = iteration + 1
                state = self._set_schedules(iteration)
                with divergence_at(iteration):
                    losses = self._step(images, targets)
                state |= self.guard.after_step(iteration, self.scaler)
                for name, value in losses.items():
                    window[name].append(value)
                state["memory/peak_mb"] = peak_memory_bytes(self.device) / 2**20
                progress.set_postfix_str(_summary(losses | state))
                progress.update()
                if done % LOG_PERIOD == 0 or done == max_iter:
                    means = {name: sum(values) / len(values) for name, values in window.items()}
                    seconds = (time.perf_counter() - clock) / len(window["total_loss"])
                    writer.write(iteration, {**means, **state, "time": seconds})
                    left = timedelta(seconds=round(seconds * (max_iter - done)))
                    text = _summary(means | state)
                    logger.info("iteration %d of %d, %s left: %s", done, max_iter, left, text)
                    window.clear()
                    clock = time.perf_counter()
                with divergence_at(iteration):
                    saver.step(iteration, seed=self.seed, rng=rng_state(self.device))
                if test is not None and period and done % period == 0 and done < max_iter:
                    self._evaluate(test, output_dir, writer, iteration)
                    clock = time.perf_counter()
            if test is None:
                return {}
            return {"bbox": self._evaluate(test, output_dir, writer, max_iter - 1)}

    def _batches(self) -> DataLoader[Any]:
        data = self.cfg.INPUT
        lsj = data.LSJ
        jitter = Jitter(lsj.IMAGE_SIZE, lsj.MIN_SCALE, lsj.MAX_SCALE) if lsj.ENABLED else None
        stream = TrainingStream(
            self.records,
            shortest_sides=data.MIN_SIZE_TRAIN,
            longest_side=data.MAX_SIZE_TRAIN,
            flip=data.RANDOM_FLIP == "horizontal",
            channel_order=data.FORMAT,
            seed=self.seed,
            tiles=self.tiles,
            jitter=jitter,
            pixel_mean=self.cfg.MODEL.PIXEL_MEAN,
            fill_ignored=data.FILL_IGNORED,
        )
        size, length = self.cfg.SOLVER.IMS_PER_BATCH, self.cfg.SOLVER.MAX_ITER
        positions = range(self.start * size, length * size)
        return _loader(self.cfg, self.device, stream, batch_size=size, sampler=positions)

    def _set_schedules(self, iteration: int) -> dict[str, float]:
        max_iter = self.cfg.SOLVER.MAX_ITER
        factor = self.multiplier(iteration / max_iter)
        for group, base_lr in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base_lr * factor
        coefficients = update_coefficients(self.model, self.schedule, iteration, max_iter)
        return {"lr": self.cfg.SOLVER.BASE_LR * factor, **coefficients}

    def _step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, float]:
        images = [image.to(self.device, non_blocking=True).float() for image in images]
        targets = [
            {name: tensor.to(self.device, non_blocking=True) for name, tensor in target.items()}
            for target in targets
        ]
        with torch.autocast(self.device.type, self.amp_dtype, enabled=bool(self.amp_dtype)):
            losses = self.model(images, targets)
            losses["total_loss"] = torch.stack(list(losses.values())).sum()
        values = check_losses(losses)
        self.optimizer.zero_grad()
        self.scaler.scale(losses["total_loss"]).backward()
        self.guard.after_backward(self.model, self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values

    def _evaluate(
        self, test: Split, output_dir: Path, writer: MetricWriter, iteration: int
    ) -> dict[str, float]:
        metrics = evaluate(self.cfg, self.model, test, output_dir)
        self.model.train()
        scalars = {f"bbox/{name}": value for name, value in metrics.items()}
        writer.write(iteration, scalars, protocol=self.cfg.TEST.PROTOCOL)
        return metrics


@torch.no_grad()
def evaluate(cfg: CfgNode, model: nn.Module, test: Split, output_dir: Path) -> dict[str, float]:
    """Run the detector on a test set; log and return the metrics of TEST.PROTOCOL.

    Writes inference/coco_instances_results.json and inference/evaluation.json into ``output_dir``,
    and leaves ``model`` in evaluation mode.
    """
    model.eval()
    device = next(model.parameters()).device
    records, category_ids = test.content.records, test.content.category_ids
    slicing = build_slicing(cfg)
    results: list[dict[str, Any]] = []
    loader = _loader(cfg, device, TestImages(records, cfg.INPUT.FORMAT), batch_size=1)
    for (image,), (index,) in tqdm(loader, desc="evaluating", leave=False, disable=None):
        boxes, scores, labels = (t.tolist() for t in detect(model, image.to(device), slicing))
        for (x0, y0, x1, y1), label, score in zip(boxes, labels, scores, strict=True):
            category = {"category_id": category_ids[label]}
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
            results.append({"image_id": records[index].image_id, **category, **box})
    file = output_dir / RESULTS_FILE
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(results))
    protocol = evaluation_protocol(cfg)
    evaluation = evaluate_boxes(test.json_file, results, protocol)
    evaluation.save(file.with_name(EVALUATION_FILE))
    logger.info("Boxes on %s by %s\n%s", cfg.DATASETS.TEST[0], protocol.title, evaluation.table())
    return evaluation.metrics


def _loader(
    cfg: CfgNode, device: torch.device, data: Dataset[Any], **kwargs: Any
) -> DataLoader[Any]:
    return DataLoader(
        data,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=as_lists,
        pin_memory=device.type == "cuda",
        # A generator of its own, because a loader draws from it when it starts.
        generator=torch.Generator(),
        **kwargs,
    )


def _summary(scalars: dict[str, float]) -> str:
    text = f"loss {scalars['total_loss']:.3f}, lr {scalars['lr']:.2e}"
    if "dr2net/alpha" in scalars:
        text += f", α {scalars['dr2net/alpha']:.3f}, β {scalars['dr2net/beta']:.3f}"
    return f"{text}, {scalars['memory/peak_mb']:.0f} MiB"
