"""Checks of a config of either style, made before anything is written."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from torch import nn

from dr2net_d2.config import check_categories, check_weights_to_evaluate
from dr2net_d2.d2.data import load_registered
from dr2net_d2.errors import ConfigError
from dr2net_d2.weights import locate_weights


def check_batch_size(key: str, images: int, accumulation_steps: int) -> None:
    """Refuse a batch that cannot be divided evenly among processes and accumulation steps.

    Args:
        key: the name of ``images`` in the config.
        images: images per iteration, over all processes and steps.
        accumulation_steps: forward and backward passes per iteration.

    Raises:
        ConfigError: there is no image, no step, or a remainder.
    """
    processes = comm.get_world_size()
    if accumulation_steps < 1 or images < 1 or images % (processes * accumulation_steps):
        raise ConfigError(
            f"{key} is {images}; it must be a positive multiple of the {processes} processes "
            f"times the {accumulation_steps} accumulation steps"
        )


def check_datasets(key: str, num_classes: int, names: Iterable[str]) -> dict[str, int]:
    """Register datasets; refuse those that are missing, damaged or have other categories.

    Args:
        key: the name of ``num_classes`` in the config.
        num_classes: the categories that the model tells apart.
        names: the datasets.

    Returns:
        For each dataset in COCO format, the number of objects in its densest image.

    Raises:
        DatasetError: see ``register_dataset``.
        ConfigError: see ``check_categories``.
    """
    categories, densest = {}, {}
    for name in names:
        if content := load_registered(name):
            categories[name], densest[name] = content.categories, content.densest
        elif classes := MetadataCatalog.get(name).get("thing_classes"):
            categories[name] = classes
    check_categories(categories, key, num_classes)
    return densest


def model_limits(model: nn.Module, training: bool) -> dict[str, int]:
    """The limits on the number of boxes in an image, by path in a LazyConfig.

    Args:
        model: a built detector.
        training: the limits in training, instead of those in inference.
    """
    limits = {}
    for path, module in model.named_modules(prefix="model"):
        if isinstance(module, RPN):
            for name in ("pre_nms_topk", "post_nms_topk"):
                limits[f"{path}.{name}"] = getattr(module, name)[training]
        for name in ("test_topk_candidates", "test_topk_per_image", "max_detections_per_image"):
            if not training and hasattr(module, name):
                limits[f"{path}.{name}"] = getattr(module, name)
    return limits


def check_weights(
    args: argparse.Namespace, weights: str, output_dir: str, *, weights_key: str, output_key: str
) -> None:
    """Refuse an evaluation without weights, and weights that do not exist.

    Args:
        args: ``eval_only`` and ``resume`` are read; a resumed run takes the last checkpoint in
            ``output_dir``, if there is one, in place of ``weights``.
        weights: path, URL or name of the weights; may be empty for a training.
        output_dir: the folder of the run.
        weights_key, output_key: the names of ``weights`` and ``output_dir`` in the config.

    Raises:
        ConfigError: see ``check_weights_to_evaluate``.
        WeightsError: see ``locate_weights``.
    """
    resuming = args.resume and Path(output_dir, "last_checkpoint").is_file()
    if args.eval_only:
        check_weights_to_evaluate(weights, resuming, weights_key, output_key)
    if not resuming:
        locate_weights(weights)


def check_tta(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse TEST.AUG for a detector that has no test-time augmentation in Detectron2.

    Raises:
        ConfigError: it names the key to change.
    """
    reason = None
    if getattr(type(model), "inference", None) is not GeneralizedRCNN.inference:
        reason = f"a GeneralizedRCNN, and MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}"
    elif not cfg.TEST.AUG.MIN_SIZES:
        reason = "at least one size in TEST.AUG.MIN_SIZES, which is empty"
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            reason = f"a detector of boxes and masks alone, and MODEL.{key} is True"
    if reason:
        raise ConfigError(f"TEST.AUG.ENABLED needs {reason}; set TEST.AUG.ENABLED False")
