"""A YAML config of Detectron2's: checked, and translated to what ``Trainer`` takes."""

from __future__ import annotations

import argparse
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from fvcore.common.config import CfgNode
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from dr2net_d2.commands import load_config, torch_device
from dr2net_d2.config import (
    amp_dtype,
    box_limits,
    coefficient_schedule,
    evaluation_protocol,
    head_section,
    lean_parts,
    warn_of_limits,
)
from dr2net_d2.d2.checks import check_batch_size, check_datasets, check_tta, check_weights
from dr2net_d2.d2.data import CheckedMapper, tile_dicts
from dr2net_d2.d2.detector import build_detector
from dr2net_d2.d2.evaluation import ProtocolEvaluator
from dr2net_d2.d2.sharding import shard
from dr2net_d2.d2.sliced_detector import check_tiles, sliced
from dr2net_d2.d2.trainer import Results, Settings, Trainer
from dr2net_d2.errors import ConfigError, config_section
from dr2net_d2.evaluation import choose_protocol
from dr2net_d2.training import build_optimizer

logger = logging.getLogger(__name__)


class YamlExperiment:
    """A training, or an evaluation, that a YAML config describes. Nothing has been written yet.

    Args:
        args: of ``engine.run``.

    Attributes:
        cfg: frozen.
        settings: of the training.
        weights: MODEL.WEIGHTS.
        model: the detector on its device, without the weights.

    Raises:
        UserError: the config, a dataset or the path of the weights cannot be used.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        cfg = load_config(args.config_file, args.opts, "detectron2")
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        cfg.freeze()
        self.weights = cfg.MODEL.WEIGHTS
        lean_parts(cfg)
        torch_device(cfg.MODEL.DEVICE)
        check_tiles(cfg)
        self._splits = ("TEST",) if args.eval_only else ("TRAIN", "TEST")
        self._densest = self._check_datasets()
        if cfg.DATASETS.TEST:
            self._check_evaluation()
        self.settings = self._settings()
        if not args.eval_only:
            steps = cfg.SOLVER.ACCUMULATION_STEPS
            self._batch = check_batch_size("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH, steps)
        check_weights(args, self.weights, cfg.OUTPUT_DIR)
        seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
        self.model = build_detector(cfg)
        sliced(cfg, self.model)  # refuses what cannot be sliced before anything is trained
        if cfg.TEST.AUG.ENABLED:
            check_tta(cfg, self.model)
        if not args.eval_only:
            with config_section("SOLVER"):
                if cfg.SOLVER.FSDP:
                    shard(self.model, cfg.SOLVER.FP16_COMPRESSION)
                self._optimizer = build_optimizer(cfg, self.model)
                self._lr_scheduler = build_lr_scheduler(cfg, self._optimizer)

    def _settings(self) -> Settings:
        cfg = self.cfg
        solver = cfg.SOLVER
        with config_section("SOLVER"):
            return Settings(
                output_dir=cfg.OUTPUT_DIR,
                max_iter=solver.MAX_ITER,
                schedule=coefficient_schedule(cfg, self._count_images),
                seed=cfg.SEED,
                amp_dtype=amp_dtype(solver.AMP.ENABLED, solver.AMP.DTYPE, cfg.MODEL.DEVICE),
                accumulation_steps=solver.ACCUMULATION_STEPS,
                ema_decay=solver.EMA_DECAY,
                eval_period=cfg.TEST.EVAL_PERIOD,
                checkpoint_period=solver.CHECKPOINT_PERIOD,
                best_metric=cfg.TEST.BEST_CHECKPOINT,
                allow_partial=cfg.MODEL.DR2NET.ALLOW_PARTIAL,
                expected_results=cfg.TEST.EXPECTED_RESULTS,
                ddp={
                    "broadcast_buffers": False,
                    "fp16_compression": solver.FP16_COMPRESSION,
                },
            )

    def _check_datasets(self) -> dict[str, int]:
        cfg, splits = self.cfg, self._splits
        if not cfg.DATASETS[splits[0]]:
            raise ConfigError(f"DATASETS.{splits[0]} is empty; name at least one dataset")
        section = head_section(cfg)
        names = [name for split in splits for name in cfg.DATASETS[split]]
        key = f"MODEL.{section}.NUM_CLASSES"
        return check_datasets(key, cfg.MODEL[section].NUM_CLASSES, names)

    def warn(self) -> None:
        """Log what will run, but hardly as it was meant."""
        for split in self._splits:
            names = self._densest.keys() & {*self.cfg.DATASETS[split]}
            densest = {name: self._densest[name] for name in names}
            warn_of_limits(box_limits(self.cfg, split), densest)

    def _check_evaluation(self) -> None:
        choose_protocol(self.cfg.TEST.PROTOCOL, self.cfg.TEST.DETECTIONS_PER_IMAGE)
        for name in self.cfg.DATASETS.TEST:
            evaluator_kind(self.cfg, name)

    def _count_images(self) -> int:
        filter_empty = self.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        tiles = self._tile_dicts()
        return len(tiles or get_detection_dataset_dicts(self.cfg.DATASETS.TRAIN, filter_empty))

    def _tile_dicts(self) -> list[dict[str, Any]] | None:
        """What is trained on, if that is tiles."""
        cfg, tiles = self.cfg, self.cfg.INPUT.TILES
        if not tiles.ENABLED:
            return None
        return tile_dicts(
            cfg.DATASETS.TRAIN,
            tiles.SIZE,
            tiles.OVERLAP,
            tiles.MIN_VISIBLE,
            tiles.EMPTY_RATIO,
            # Of a negative seed, too, all processes and resumed trainings must have the same.
            seed=max(cfg.SEED, 0),
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        )

    def trainer(self) -> Trainer:
        """Reads the training images' annotations."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.SOLVER.IMS_PER_BATCH = self._batch

        def train_loader() -> Any:
            # With a generator of its own the loader leaves the global one alone when it starts.
            seed = cfg.SEED if cfg.SEED >= 0 else None
            return build_detection_train_loader(
                cfg, mapper=CheckedMapper(cfg, True), dataset=self._tile_dicts(), seed=seed
            )

        extra: list[HookBase] = []
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            count = cfg.TEST.PRECISE_BN.NUM_ITER
            extra.append(hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, train_loader(), count))
        return Trainer(
            self.model,
            self._optimizer,
            self._lr_scheduler,
            train_loader(),
            self.evaluate,
            self.settings,
            extra,
        )

    def evaluate(self, model: nn.Module, final: bool) -> Results:
        """Detectron2's results, under the names of the datasets if there are several.

        Args:
            final: those of TEST.AUG as well, with "_TTA" behind their keys.
        """
        results = self._evaluate(model, "inference")
        if final and self.cfg.TEST.AUG.ENABLED:
            augmented = self._evaluate(GeneralizedRCNNWithTTA(self.cfg, model), "inference_TTA")
            results |= {f"{key}_TTA": value for key, value in augmented.items()}
        return results

    def _evaluate(self, model: nn.Module, folder: str) -> Results:
        results: Results = OrderedDict()
        protocol = evaluation_protocol(self.cfg)
        model = sliced(self.cfg, model)
        for name in self.cfg.DATASETS.TEST:
            loader = build_detection_test_loader(
                self.cfg, name, mapper=CheckedMapper(self.cfg, False)
            )
            evaluator = build_evaluator(self.cfg, name, folder)
            results[name] = inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                logger.info("Results on %s by the protocol %s:", name, protocol.name)
                print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    def test_set(self) -> str | None:
        """The dataset that was evaluated last."""
        return self.cfg.DATASETS.TEST[-1] if self.cfg.DATASETS.TEST else None


def evaluator_kind(cfg: CfgNode, dataset: str) -> str:
    """The format of a registered dataset, "coco" or "lvis".

    Raises:
        ConfigError: it is another one, or not one for TEST.PROTOCOL.
    """
    kind, protocol = MetadataCatalog.get(dataset).get("evaluator_type"), cfg.TEST.PROTOCOL
    if kind not in ("coco", "lvis"):
        raise ConfigError(
            f"DATASETS.TEST has {dataset}, whose format {kind!r} cannot be evaluated; use one in "
            "COCO or LVIS format"
        )
    if kind == "lvis" and protocol != "coco":
        raise ConfigError(
            f"DATASETS.TEST has {dataset}, which is in LVIS format, and TEST.PROTOCOL is "
            f"{protocol!r}; leave that at 'coco' for LVIS's own evaluation"
        )
    return kind


def build_evaluator(cfg: CfgNode, dataset: str, folder: str) -> DatasetEvaluator:
    """The evaluator for a registered dataset: Detectron2's, or that of TEST.PROTOCOL.

    Args:
        folder: for its files, within OUTPUT_DIR.

    Raises:
        ConfigError: see ``evaluator_kind``.
    """
    kind = evaluator_kind(cfg, dataset)
    path, most = str(Path(cfg.OUTPUT_DIR, folder)), cfg.TEST.DETECTIONS_PER_IMAGE
    if cfg.TEST.PROTOCOL != "coco":
        return ProtocolEvaluator(dataset, cfg.TEST.PROTOCOL, path)
    evaluator = {"coco": COCOEvaluator, "lvis": LVISEvaluator}[kind]
    return evaluator(dataset, output_dir=path, max_dets_per_image=most)
