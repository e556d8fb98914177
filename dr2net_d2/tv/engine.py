"""``train_net.py`` with the torchvision engine: check everything, then train or evaluate."""

from __future__ import annotations

import argparse
import logging
import random
import secrets
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from dr2net_d2.commands import load_config, torch_device
from dr2net_d2.config import box_limits, check_categories, check_weights_to_evaluate, warn_of_limits
from dr2net_d2.config.torchvision import check_config
from dr2net_d2.data import CocoRecord
from dr2net_d2.errors import ConfigError
from dr2net_d2.evaluation import RESULTS_FILE
from dr2net_d2.training import draw_curves, draw_predictions
from dr2net_d2.tv.dataset import Split, load_split
from dr2net_d2.tv.model import build_model
from dr2net_d2.tv.output import RunLog
from dr2net_d2.tv.training import Training, evaluate
from dr2net_d2.weights import StrictCheckpointer

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train and evaluate, or only evaluate; see ``commands.Engine``.

    Returns:
        {"bbox": metrics of TEST.PROTOCOL}; empty without DATASETS.TEST.

    Raises:
        UserError: the config, a dataset or the weights cannot be used; nothing has been written.
        FloatingPointError: the training has diverged; the last checkpoint is still good.
    """
    with RunLog() as log, logging_redirect_tqdm():
        cfg = load_config(args.config_file, args.opts, "torchvision")
        check_config(cfg)
        cfg.freeze()
        device = _device(cfg, args.num_gpus)
        train_splits = [] if args.eval_only else [load_split(n) for n in cfg.DATASETS.TRAIN]
        test_splits = [load_split(name) for name in cfg.DATASETS.TEST]
        _check_splits(cfg, train_splits, test_splits, args.eval_only)
        test = test_splits[0] if test_splits else None
        seed = cfg.SEED if cfg.SEED >= 0 else secrets.randbelow(2**31)
        logger.info("seed %d", seed)
        model = build_seeded_model(cfg, seed).to(device)
        if args.eval_only:
            assert test is not None
            _load_for_evaluation(cfg, model, args.resume)
            output_dir = _open_output(cfg, log)
            metrics = {"bbox": evaluate(cfg, model, test, output_dir)}
        else:
            training = Training(cfg, model, _records(cfg, train_splits), seed, args.resume)
            output_dir = _open_output(cfg, log)
            (output_dir / "config.yaml").write_text(cfg.dump())
            metrics = training.run(test, output_dir)
            draw_curves(output_dir)
        if test is not None:
            draw_predictions(
                test.json_file,
                test.image_root,
                output_dir / RESULTS_FILE,
                output_dir / "predictions.png",
            )
        return metrics


def build_seeded_model(cfg: CfgNode, seed: int) -> nn.Module:
    """Seed every random generator, then build the detector with random weights."""
    for seed_generator in (random.seed, np.random.seed, torch.manual_seed):
        seed_generator(seed)
    return build_model(cfg)


def _device(cfg: CfgNode, num_gpus: int) -> torch.device:
    if num_gpus not in (0, 1):
        raise ConfigError(
            f"--num-gpus is {num_gpus}; the torchvision engine uses one device: set it to 1, or "
            "install Detectron2 and pass --engine detectron2"
        )
    return torch_device(cfg.MODEL.DEVICE)


def _check_splits(
    cfg: CfgNode, train: Sequence[Split], test: Sequence[Split], eval_only: bool
) -> None:
    if not eval_only and not train:
        raise ConfigError("DATASETS.TRAIN is empty; name a dataset, such as small_digits_train")
    if len(test) > 1 or (eval_only and not test):
        raise ConfigError(
            f"DATASETS.TEST is {tuple(cfg.DATASETS.TEST)}; the torchvision engine evaluates on one "
            "dataset: name one"
        )
    names = [*([] if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    categories = [split.content.categories for split in (*train, *test)]
    datasets = dict(zip(names, categories, strict=True))
    check_categories(datasets, "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    for phase, splits in (("TRAIN", train), ("TEST", test)):
        counts = [split.content.densest for split in splits]
        densest = dict(zip(cfg.DATASETS[phase], counts, strict=False))
        warn_of_limits(box_limits(cfg, phase), densest)


def _records(cfg: CfgNode, splits: Sequence[Split]) -> list[CocoRecord]:
    records = list(chain.from_iterable(split.content.records for split in splits))
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        total, records = len(records), [r for r in records if not r.iscrowd.all()]
        logger.info("%d of %d training images have objects", len(records), total)
    if not records:
        raise ConfigError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no image with an object; name "
            "another dataset, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
        )
    return records


def _load_for_evaluation(cfg: CfgNode, model: nn.Module, resume: bool) -> None:
    allow_partial = cfg.MODEL.DR2NET.ALLOW_PARTIAL
    checkpointer = StrictCheckpointer(
        model, cfg.OUTPUT_DIR, allow_partial=allow_partial, plain_vit=False
    )
    check_weights_to_evaluate(cfg.MODEL.WEIGHTS, resume and checkpointer.has_checkpoint())
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)


def _open_output(cfg: CfgNode, log: RunLog) -> Path:
    output_dir = Path(cfg.OUTPUT_DIR)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        log.open(output_dir)
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} cannot be written ({error.strerror}); choose another"
        ) from error
    return output_dir
