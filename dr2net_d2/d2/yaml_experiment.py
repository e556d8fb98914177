"""YAML configs: checked, and translated into a model, an optimizer and ``Settings``."""

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
)
from dr2net_d2.d2.checks import check_tta
from dr2net_d2.d2.data import CheckedMapper, tile_dicts
from dr2net_d2.d2.detector import build_detector
from dr2net_d2.d2.evaluation import ProtocolEvaluator
from dr2net_d2.d2.experiment import Experiment, Keys, Optimization, Split
from dr2net_d2.d2.sharding import shard
from dr2net_d2.d2.sliced_detector import check_tiles, sliced
from dr2net_d2.d2.trainer import Results, Settings
from dr2net_d2.errors import ConfigError, config_section
from dr2net_d2.evaluation import choose_protocol
from dr2net_d2.training import build_optimizer

logger = logging.getLogger(__name__)


class YamlExperiment(Experiment):
    """A training, or an evaluation, as a YAML config describes it; see ``Experiment``."""

    KEYS = Keys(weights="MODEL.WEIGHTS", output_dir="OUTPUT_DIR", batch_size="SOLVER.IMS_PER_BATCH")
    cfg: CfgNode

    @property
    def weights(self) -> str:
        weights: str = self.cfg.MODEL.WEIGHTS
        return weights

    def _load(self, args: argparse.Namespace) -> CfgNode:
        cfg = load_config(args.config_file, args.opts, "detectron2")
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        cfg.freeze()
        return cfg

    def _validate_config(self) -> None:
        lean_parts(self.cfg)
        torch_device(self.cfg.MODEL.DEVICE)
        check_tiles(self.cfg)
        split = self.splits[0]
        if not self._dataset_names(split):
            raise ConfigError(f"DATASETS.{split.upper()} is empty; name at least one dataset")

    def _check_datasets(self) -> dict[str, int]:
        densest = super()._check_datasets()
        if self._dataset_names("test"):
            self._validate_evaluation()
        return densest

    def _validate_evaluation(self) -> None:
        choose_protocol(self.cfg.TEST.PROTOCOL, self.cfg.TEST.DETECTIONS_PER_IMAGE)
        for name in self._dataset_names("test"):
            evaluator_kind(self.cfg, name)

    def _dataset_names(self, split: Split) -> list[str]:
        return list(self.cfg.DATASETS[split.upper()])

    def _num_classes(self) -> tuple[str, int]:
        section = head_section(self.cfg)
        return f"MODEL.{section}.NUM_CLASSES", self.cfg.MODEL[section].NUM_CLASSES

    def _build_settings(self) -> Settings:
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

    def _count_images(self) -> int:
        filter_empty = self.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        tiles = self._tile_dicts()
        return len(tiles or get_detection_dataset_dicts(self.cfg.DATASETS.TRAIN, filter_empty))

    def _tile_dicts(self) -> list[dict[str, Any]] | None:
        """The tiles to train on; None for a training on whole images."""
        cfg, tiles = self.cfg, self.cfg.INPUT.TILES
        if not tiles.ENABLED:
            return None
        return tile_dicts(
            names=cfg.DATASETS.TRAIN,
            size=tiles.SIZE,
            overlap=tiles.OVERLAP,
            min_visible=tiles.MIN_VISIBLE,
            empty_ratio=tiles.EMPTY_RATIO,
            # All processes and resumed trainings need the same draw, so a negative seed is fixed.
            seed=max(cfg.SEED, 0),
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        )

    def _images_per_iteration(self) -> int:
        images: int = self.cfg.SOLVER.IMS_PER_BATCH
        return images

    def _build_model(self) -> nn.Module:
        return build_detector(self.cfg)

    def _validate_model(self) -> None:
        sliced(self.cfg, self.model)
        if self.cfg.TEST.AUG.ENABLED:
            check_tta(self.cfg, self.model)

    def _build_optimization(self) -> Optimization:
        cfg = self.cfg
        with config_section("SOLVER"):
            if cfg.SOLVER.FSDP:
                shard(self.model, fp16_compression=cfg.SOLVER.FP16_COMPRESSION)
            optimizer = build_optimizer(cfg, self.model)
            return Optimization(optimizer, build_lr_scheduler(cfg, optimizer))

    def _box_limits(self, split: Split) -> dict[str, int]:
        return box_limits(self.cfg, split.upper())

    def _train_loader(self, batch_size: int) -> Any:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.SOLVER.IMS_PER_BATCH = batch_size
        return build_detection_train_loader(
            cfg,
            mapper=CheckedMapper(cfg, is_train=True),
            dataset=self._tile_dicts(),
            # With a seed of its own the loader starts without touching the global generators.
            seed=cfg.SEED if cfg.SEED >= 0 else None,
        )

    def _extra_hooks(self, batch_size: int) -> list[HookBase]:
        precise_bn = self.cfg.TEST.PRECISE_BN
        if not (precise_bn.ENABLED and get_bn_modules(self.model)):
            return []
        return [
            hooks.PreciseBN(
                period=self.cfg.TEST.EVAL_PERIOD,
                model=self.model,
                data_loader=self._train_loader(batch_size),
                num_iter=precise_bn.NUM_ITER,
            )
        ]

    def evaluate(self, model: nn.Module, final: bool) -> Results:
        """Evaluate on DATASETS.TEST; the last time with TEST.AUG as well, if it is enabled.

        Returns:
            Detectron2's results, under the names of the datasets if there are several. The keys of
            the results with TEST.AUG end in "_TTA".
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
        for name in self._dataset_names("test"):
            mapper = CheckedMapper(self.cfg, is_train=False)
            loader = build_detection_test_loader(self.cfg, name, mapper=mapper)
            evaluator = build_evaluator(self.cfg, name, folder)
            results[name] = inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                logger.info("Results on %s by the protocol %s:", name, protocol.name)
                print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    def test_set(self) -> str | None:
        # All test datasets write to the same file, so it has the results of the last one.
        return next(reversed(self._dataset_names("test")), None)


def evaluator_kind(cfg: CfgNode, dataset: str) -> str:
    """The annotation format of a registered dataset: "coco" or "lvis".

    Raises:
        ConfigError: the format is neither, or TEST.PROTOCOL does not apply to it.
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
    """Build Detectron2's evaluator for a registered dataset, or ours for TEST.PROTOCOL.

    Args:
        cfg: the config.
        dataset: its name.
        folder: where the evaluator writes its files, within OUTPUT_DIR.

    Raises:
        ConfigError: see ``evaluator_kind``.
    """
    kind = evaluator_kind(cfg, dataset)
    output_dir = str(Path(cfg.OUTPUT_DIR, folder))
    if cfg.TEST.PROTOCOL != "coco":
        return ProtocolEvaluator(dataset, protocol=cfg.TEST.PROTOCOL, output_dir=output_dir)
    evaluator = {"coco": COCOEvaluator, "lvis": LVISEvaluator}[kind]
    return evaluator(
        dataset, output_dir=output_dir, max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE
    )
