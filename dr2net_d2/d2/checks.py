"""What can be wrong in a config of either style, found before anything is written."""

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


def check_batch_size(key: str, images: int, accumulation_steps: int) -> int:
    """The images of all processes that go through the network at once.

    Args:
        key: of ``images``, those of an iteration.

    Raises:
        ConfigError: they cannot be divided among the processes and the steps.
    """
    processes = comm.get_world_size()
    if accumulation_steps < 1 or images < 1 or images % (processes * accumulation_steps):
        raise ConfigError(
            f"{key} is {images}; it must be a positive multiple of the {processes} processes "
            f"times the {accumulation_steps} accumulation steps"
        )
    return images // accumulation_steps


def check_datasets(key: str, num_classes: int, names: Iterable[str]) -> dict[str, int]:
    """Register datasets, and refuse what is missing, damaged or of other categories.

    Args:
        key: of ``num_classes``.

    Returns:
        Objects of the densest image, by name, of datasets in COCO format.

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
    """What bounds the number of boxes of an image in a built detector, by path in a LazyConfig."""
    limits = {}
    for path, module in model.named_modules(prefix="model"):
        if isinstance(module, RPN):
            for name in ("pre_nms_topk", "post_nms_topk"):
                limits[f"{path}.{name}"] = getattr(module, name)[training]
        for name in ("test_topk_candidates", "test_topk_per_image", "max_detections_per_image"):
            if not training and hasattr(module, name):
                limits[f"{path}.{name}"] = getattr(module, name)
    return limits


def check_weights(args: argparse.Namespace, weights: str, output_dir: str, *names: str) -> None:
    """Refuse an evaluation without weights, and weights that are not there.

    Args:
        args: eval_only, and resume, which reads the last checkpoint in ``output_dir`` instead.
        names: what the config calls ``weights`` and ``output_dir``; of YAML unless given.

    Raises:
        ConfigError: see ``check_weights_to_evaluate``.
        WeightsError: see ``locate_weights``.
    """
    resuming = args.resume and Path(output_dir, "last_checkpoint").is_file()
    if args.eval_only:
        check_weights_to_evaluate(weights, resuming, *names)
    if not resuming:
        locate_weights(weights)


def check_tta(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse TEST.AUG for a detector that Detectron2 cannot augment.

    Raises:
        ConfigError: names the key that stands in the way.
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
