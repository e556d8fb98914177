"""What ``train_net.py`` runs with Detectron2: check everything, then train or evaluate."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import weakref
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase, default_setup, launch
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import COCOEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from fvcore.common.config import CfgNode
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException

from dr2net_d2.checkpointer import locate_weights
from dr2net_d2.commands import load_config
from dr2net_d2.config import (
    check_categories,
    check_weights_to_evaluate,
    coefficient_schedule,
    lean_parts,
)
from dr2net_d2.d2.checkpointer import Dr2NetCheckpointer
from dr2net_d2.d2.data import CheckedMapper, register_dataset, skip_samples
from dr2net_d2.d2.hooks import CoefficientHook, NonFiniteGuard, PeakMemory, SeedIterations
from dr2net_d2.d2.inference import check_tta, evaluate_with_tta
from dr2net_d2.d2.lean import build_detector
from dr2net_d2.errors import ConfigError, UserError, WeightsError, config_section
from dr2net_d2.finetuning import divergence_at
from dr2net_d2.optimizer import build_optimizer
from dr2net_d2.pictures import draw_curves, draw_predictions

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate, or only evaluate, what a config file describes.

    Args:
        args: config_file, opts (``KEY VALUE`` words), eval_only, resume, num_gpus (per machine),
            num_machines, machine_rank, dist_url, as Detectron2's ``default_argument_parser`` gives
            them.

    Returns:
        Detectron2's results, ``{"bbox": {"AP": ...}}``, under the names of the datasets if there
        are several; empty on machines other than the first.

    Raises:
        UserError: the config, a dataset or the path of the weights cannot be used, and OUTPUT_DIR
            is as it was; or the weights do not fit the model.
        FloatingPointError: the training has diverged; the last checkpoint is from before that.
    """
    available = torch.cuda.device_count()
    if not 1 <= args.num_gpus <= max(available, 1):
        raise ConfigError(
            f"--num-gpus is {args.num_gpus}, but this machine has {available} CUDA GPUs; "
            f"use {f'1 to {available}' if available > 1 else '1'} (1 is right for a CPU too)"
        )
    if args.num_gpus * args.num_machines == 1:
        return _train_or_evaluate(args)
    with multiprocessing.Manager() as manager:
        outcome = manager.dict()
        try:
            launch(
                _work,
                args.num_gpus,
                args.num_machines,
                args.machine_rank,
                args.dist_url,
                args=(args, outcome),
            )
        except ProcessRaisedException:
            if "error" in outcome:
                raise outcome["error"] from None
            raise
        return outcome.get("results", {})


def _work(args: argparse.Namespace, outcome: MutableMapping[str, Any]) -> None:
    """One of several processes."""
    try:
        results = _train_or_evaluate(args)
    except (UserError, FloatingPointError) as error:
        outcome["error"] = error
        raise
    if comm.is_main_process():
        outcome["results"] = results


def _train_or_evaluate(args: argparse.Namespace) -> dict[str, Any]:
    cfg = load_config(args.config_file, args.opts, "detectron2")
    cfg.freeze()
    model = _checked_model(cfg, args)

    try:
        default_setup(cfg, args)
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} cannot be written ({error.strerror}); choose another"
        ) from error
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="dr2net_d2")
    if args.eval_only:
        _checkpointer(cfg, model).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results |= evaluate_with_tta(Trainer, cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
    else:
        trainer = Trainer(cfg, model)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if comm.is_main_process():
        _draw_pictures(cfg, trained=not args.eval_only)
    return results


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` that finetunes by Dr2Net, with COCO evaluation and exact resuming.

    With SEED >= 0, no data loader workers and deterministic kernels, a training that was resumed
    ends with the same weights, bit for bit, as one that was not interrupted.

    Args:
        cfg: with the keys of ``add_dr2net_config``.
        model: the detector of ``cfg``, as ``build_model`` made it.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        self._given_model = model
        super().__init__(cfg)

    def build_model(self, cfg: CfgNode) -> nn.Module:
        logger.info("Model:\n%s", self._given_model)
        return self._given_model

    def build_hooks(self) -> list[HookBase]:
        # In place of the one that DefaultTrainer made; the hooks are the first to use it.
        self.checkpointer = _checkpointer(self.cfg, self.model, trainer=weakref.proxy(self))
        ours: list[HookBase] = [
            CoefficientHook(coefficient_schedule(self.cfg), self.max_iter),
            PeakMemory(),
            NonFiniteGuard(),
        ]
        if self.cfg.SEED >= 0:
            ours.append(SeedIterations(self.cfg.SEED, comm.get_rank(), comm.get_world_size()))
        timer, *others = super().build_hooks()
        hooks = [timer, *ours, *others]
        if self.cfg.TEST.AUG.ENABLED:
            # Behind the ordinary evaluation, before the writer of its results.
            place = next(i for i, hook in enumerate(hooks, 1) if isinstance(hook, EvalHook))
            hooks.insert(place, EvalHook(0, self._evaluate_with_tta))
        return hooks

    def resume_or_load(self, resume: bool = True) -> None:
        self.iter = -1
        super().resume_or_load(resume)
        if self.iter == -1 and resume and self.checkpointer.has_checkpoint():
            raise WeightsError(
                f"{self.checkpointer.get_checkpoint_file()} was not written by Detectron2; "
                "resume with the engine that wrote it, or choose another OUTPUT_DIR"
            )
        batch_size = self.cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        skip_samples(self.data_loader, self.start_iter * batch_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            super().load_state_dict(state_dict)
        except (LookupError, RuntimeError, ValueError) as error:
            raise WeightsError(
                f"the checkpoint in {self.cfg.OUTPUT_DIR} does not continue this training "
                f"({error}); resume with the config that wrote it, or choose another OUTPUT_DIR"
            ) from error

    def train(self) -> dict[str, Any]:
        super().train()
        return self._last_eval_results

    def run_step(self) -> None:
        with divergence_at(self.iter):
            super().run_step()

    def after_step(self) -> None:
        with divergence_at(self.iter):
            super().after_step()

    def after_train(self) -> None:
        if self.iter < self.max_iter:
            # EvalHook would take an error in the last iteration for the end of the training.
            self._hooks: list[HookBase] = [h for h in self._hooks if not isinstance(h, EvalHook)]
        super().after_train()

    def _evaluate_with_tta(self) -> dict[str, Any]:
        results = evaluate_with_tta(type(self), self.cfg, self.model)
        self._last_eval_results |= results
        return results

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        # With a generator of its own the loader leaves the global one alone when it starts.
        seed = cfg.SEED if cfg.SEED >= 0 else None
        return build_detection_train_loader(cfg, mapper=CheckedMapper(cfg, True), seed=seed)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = CheckedMapper(cfg, False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> COCOEvaluator:
        return COCOEvaluator(
            dataset_name,
            output_dir=output_folder or _inference_dir(cfg),
            max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        )


def _checkpointer(cfg: CfgNode, model: nn.Module, **checkpointables: Any) -> Dr2NetCheckpointer:
    return Dr2NetCheckpointer(
        model, cfg.OUTPUT_DIR, allow_partial=cfg.MODEL.DR2NET.ALLOW_PARTIAL, **checkpointables
    )


def _inference_dir(cfg: CfgNode) -> str:
    return str(Path(cfg.OUTPUT_DIR, "inference"))


def _draw_pictures(cfg: CfgNode, trained: bool) -> None:
    if trained:
        draw_curves(cfg.OUTPUT_DIR)
    if cfg.DATASETS.TEST:
        # The results file is that of the last dataset.
        metadata = MetadataCatalog.get(cfg.DATASETS.TEST[-1])
        draw_predictions(
            metadata.json_file,
            metadata.get("image_root", ""),
            Path(_inference_dir(cfg), "coco_instances_results.json"),
            Path(cfg.OUTPUT_DIR, "predictions.png"),
        )


def _checked_model(cfg: CfgNode, args: argparse.Namespace) -> nn.Module:
    """The detector, after a look at everything that can be wrong in what the user gave."""
    coefficient_schedule(cfg)
    lean_parts(cfg)
    _check_device(cfg)
    _check_datasets(cfg, ("TEST",) if args.eval_only else ("TRAIN", "TEST"))
    if not args.eval_only:
        _check_solver(cfg)
    resuming = args.resume and Path(cfg.OUTPUT_DIR, "last_checkpoint").is_file()
    if args.eval_only:
        check_weights_to_evaluate(cfg, resuming)
    if not resuming:
        locate_weights(cfg.MODEL.WEIGHTS)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    model = build_detector(cfg)
    if cfg.TEST.AUG.ENABLED:
        check_tta(cfg, model)
    if not args.eval_only:
        with config_section("SOLVER"):
            Trainer.build_lr_scheduler(cfg, Trainer.build_optimizer(cfg, model))
    return model


def _check_device(cfg: CfgNode) -> None:
    name = cfg.MODEL.DEVICE
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE is {name!r}; use cuda or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is {name!r}, but no CUDA GPU can be used here; set MODEL.DEVICE cpu"
        )
    if cfg.SOLVER.AMP.ENABLED and kind != "cuda":
        raise ConfigError(
            f"SOLVER.AMP.ENABLED needs a CUDA GPU and MODEL.DEVICE is {name!r}; set it to False"
        )


def _check_datasets(cfg: CfgNode, splits: Sequence[str]) -> None:
    if not cfg.DATASETS[splits[0]]:
        raise ConfigError(f"DATASETS.{splits[0]} is empty; name at least one dataset")
    section = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    names = [name for split in splits for name in cfg.DATASETS[split]]
    found = {name: categories for name in names if (categories := register_dataset(name))}
    check_categories(found, section, cfg.MODEL[section].NUM_CLASSES)


def _check_solver(cfg: CfgNode) -> None:
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a positive multiple "
            f"of the {processes} processes"
        )
    if cfg.SOLVER.MAX_ITER < 1:
        raise ConfigError(f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}; it must be at least 1")
