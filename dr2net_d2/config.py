"""Config keys that both engines share, and what they mean in terms of ``core``.

Works on any fvcore ``CfgNode``; Detectron2's is one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode

from dr2net_d2.core import CoefficientSchedule
from dr2net_d2.core.schedule import BETA_GRID, snap_to_grid
from dr2net_d2.errors import ConfigError, config_section

logger = logging.getLogger(__name__)

LEAN_PARTS = ("pyramid", "rpn", "roi")
AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def add_dr2net_config(cfg: CfgNode) -> None:
    """Add the keys of this project to a config: MODEL.VIT, MODEL.DR2NET and what recipes need."""
    node = type(cfg)

    # The plain ViT; the defaults are ViTDet-B. Both stock and Dr2Net backbones read these.
    cfg.MODEL.VIT = vit = node()
    # Side in px that relative position tables of global attention are sized for.
    vit.IMG_SIZE = 1024
    vit.PATCH_SIZE = 16
    vit.EMBED_DIM = 768
    vit.DEPTH = 12
    vit.NUM_HEADS = 12
    vit.MLP_RATIO = 4.0
    vit.QKV_BIAS = True
    # Stochastic depth rate of the last block; it grows linearly from 0 at the first.
    vit.DROP_PATH_RATE = 0.1
    vit.USE_ABS_POS = True
    vit.USE_REL_POS = True
    # Window side in tokens, and the blocks that attend within windows; the others are global.
    vit.WINDOW_SIZE = 14
    vit.WINDOW_BLOCK_INDEXES = [0, 1, 3, 4, 6, 7, 9, 10]
    # Side in px of the pretraining images, which sizes the absolute position table.
    vit.PRETRAIN_IMG_SIZE = 224
    vit.PRETRAIN_USE_CLS_TOKEN = True
    # Pyramid levels: stride = PATCH_SIZE / scale. Their width is MODEL.FPN.OUT_CHANNELS.
    vit.SCALE_FACTORS = [4.0, 2.0, 1.0, 0.5]
    # Coarser levels after those: "LastLevelMaxPool" (one), "LastLevelP6P7" (two) or "" (none).
    vit.TOP_BLOCK = "LastLevelMaxPool"
    # Pad both sides of every image to a multiple of this, in px; 0: of the coarsest stride.
    vit.SQUARE_PAD = 0

    cfg.MODEL.DR2NET = dr2net = node()
    # False stores activations as an ordinary network does, with the same arithmetic.
    dr2net.REVERSIBLE = True
    # "exact" (fixed-point streams, inverted bit for bit) or "float" (the literature's way).
    dr2net.ARITHMETIC = "exact"
    # The state before the first step: "copy" of the first, or "zero".
    dr2net.FIRST_STATE = "copy"
    # What the backbone returns: the "last" stream or the "mean" of the last two.
    dr2net.OUTPUT = "last"
    # Parts around the backbone that keep little for their backward, exactly: "pyramid", "rpn",
    # "roi" (the heads). [] leaves all as they are elsewhere.
    dr2net.LEAN = list(LEAN_PARTS)
    # Patterns of keys of a checkpoint or of the model that may be superfluous, missing, or of
    # another shape, as the error that refuses them names them.
    dr2net.ALLOW_PARTIAL = []
    # How alpha and beta move during training; see core.CoefficientSchedule.
    dr2net.SCHEDULE = node()
    dr2net.SCHEDULE.KIND = "convex"
    dr2net.SCHEDULE.START_BETA = 1 / 16
    dr2net.SCHEDULE.END_BETA = 0.5
    # When the final coefficients are reached, from when on they hold.
    dr2net.SCHEDULE.DURATION = 0.5
    # Of DURATION: "fraction" of the training, "iterations" or "epochs".
    dr2net.SCHEDULE.UNIT = "fraction"
    # Number of stages within it; 0 moves every iteration.
    dr2net.SCHEDULE.UPDATES = 0

    # Of META_ARCHITECTURE "FCOS"; as those of MODEL.RETINANET.
    cfg.MODEL.FCOS = fcos = node()
    fcos.NUM_CLASSES = 80
    fcos.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    fcos.NUM_CONVS = 4
    fcos.NORM = "GN"
    fcos.PRIOR_PROB = 0.01
    # In strides around the centre of an object: the locations that learn it.
    fcos.CENTER_SAMPLING_RADIUS = 1.5
    fcos.FOCAL_LOSS_ALPHA = 0.25
    fcos.FOCAL_LOSS_GAMMA = 2.0
    # Of sqrt(class score * centerness).
    fcos.SCORE_THRESH_TEST = 0.2
    fcos.TOPK_CANDIDATES_TEST = 1000
    fcos.NMS_THRESH_TEST = 0.6

    _add_recipe_config(cfg)


def _add_recipe_config(cfg: CfgNode) -> None:
    node = type(cfg)

    # "SGD" or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning-rate factor per ViT layer, counted down from the head; 1 turns it off.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Pairs [pattern, weight decay] for names of parameters; the last that fits counts.
    cfg.SOLVER.WEIGHT_DECAY_OVERRIDES = [["*pos_embed", 0.0]]
    # Parts that the IMS_PER_BATCH images of an iteration go through the network in.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Of the moving average of the weights, which is evaluated and kept in place of them; 0: none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Send gradients between GPUs in half precision.
    cfg.SOLVER.FP16_COMPRESSION = False
    # "float16", with loss scaling, or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"

    # Large-scale jittering (arXiv 2012.07177): flip, rescale, crop. Replaces INPUT.MIN_SIZE_TRAIN.
    cfg.INPUT.LSJ = lsj = node()
    lsj.ENABLED = False
    # Side in px of the square that a rescaled image is cropped to.
    lsj.IMAGE_SIZE = 1024
    # Range of the scale: 1 fits the image into the square.
    lsj.MIN_SCALE = 0.1
    lsj.MAX_SCALE = 2.0

    # Keep the weights that were best in this result, such as "bbox/AP", in model_best.pth; "": no.
    cfg.TEST.BEST_CHECKPOINT = ""


def vit_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments that Detectron2's ``ViT`` and our ``Dr2NetViT`` have in common."""
    vit = cfg.MODEL.VIT
    return {
        "img_size": vit.IMG_SIZE,
        "patch_size": vit.PATCH_SIZE,
        "in_chans": len(cfg.MODEL.PIXEL_MEAN),
        "embed_dim": vit.EMBED_DIM,
        "depth": vit.DEPTH,
        "num_heads": vit.NUM_HEADS,
        "mlp_ratio": vit.MLP_RATIO,
        "qkv_bias": vit.QKV_BIAS,
        "drop_path_rate": vit.DROP_PATH_RATE,
        "use_abs_pos": vit.USE_ABS_POS,
        "use_rel_pos": vit.USE_REL_POS,
        "window_size": vit.WINDOW_SIZE,
        "window_block_indexes": tuple(vit.WINDOW_BLOCK_INDEXES),
        "pretrain_img_size": vit.PRETRAIN_IMG_SIZE,
        "pretrain_use_cls_token": vit.PRETRAIN_USE_CLS_TOKEN,
    }


def dr2net_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments that only ``Dr2NetViT`` has."""
    dr2net = cfg.MODEL.DR2NET
    return {
        "reversible": dr2net.REVERSIBLE,
        "arithmetic": dr2net.ARITHMETIC,
        "first_state": dr2net.FIRST_STATE,
        "output": dr2net.OUTPUT,
    }


def head_section(cfg: CfgNode) -> str:
    """The section of MODEL that has NUM_CLASSES of the detector."""
    sections = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
    return sections.get(cfg.MODEL.META_ARCHITECTURE, "ROI_HEADS")


def lean_parts(cfg: CfgNode) -> tuple[str, ...]:
    """MODEL.DR2NET.LEAN.

    Raises:
        ConfigError: it names something else than ``LEAN_PARTS``.
    """
    parts = cfg.MODEL.DR2NET.LEAN
    if unknown := [part for part in parts if part not in LEAN_PARTS]:
        raise ConfigError(
            f"MODEL.DR2NET.LEAN has {unknown[0]!r}; list some of {list(LEAN_PARTS)}, or none"
        )
    return tuple(parts)


def amp_dtype(enabled: bool, name: str, device: str) -> torch.dtype | None:
    """The dtype of autocast during training, None where mixed precision is not enabled.

    Args:
        name: SOLVER.AMP.DTYPE.
        device: MODEL.DEVICE.

    Raises:
        ConfigError: another name, or float16 without a GPU.
    """
    if not enabled:
        return None
    if name not in AMP_DTYPES:
        raise ConfigError(f"the dtype of AMP is {name!r}; use {' or '.join(AMP_DTYPES)}")
    if name == "float16" and not device.startswith("cuda"):
        raise ConfigError(
            f"AMP in float16 is for GPUs, and the device is {device!r}; use the dtype bfloat16 "
            "(SOLVER.AMP.DTYPE), or turn AMP off"
        )
    return AMP_DTYPES[name]


def coefficient_schedule(
    cfg: CfgNode, count_images: Callable[[], int] | None = None
) -> CoefficientSchedule:
    """The schedule of MODEL.DR2NET.SCHEDULE; a beta that exact arithmetic has to snap is logged.

    Args:
        count_images: gives the number of training images, for a duration in epochs. Without it
            such a schedule takes the same values, over the whole training.
    """
    schedule = cfg.MODEL.DR2NET.SCHEDULE
    exact = cfg.MODEL.DR2NET.ARITHMETIC == "exact"
    for key in ("START_BETA", "END_BETA") if exact else ():
        if (snapped := snap_to_grid(schedule[key])) != schedule[key]:
            logger.info(
                "MODEL.DR2NET.SCHEDULE.%s %g is snapped to %g: exact arithmetic takes multiples "
                "of 1/%d",
                key,
                schedule[key],
                snapped,
                BETA_GRID,
            )
    with config_section("MODEL.DR2NET.SCHEDULE"):
        return CoefficientSchedule(
            kind=schedule.KIND,
            start_beta=schedule.START_BETA,
            end_beta=schedule.END_BETA,
            duration=_fraction(cfg, count_images),
            updates=schedule.UPDATES,
            exact=exact,
        )


def _fraction(cfg: CfgNode, count_images: Callable[[], int] | None) -> float:
    """MODEL.DR2NET.SCHEDULE.DURATION as a fraction of the training."""
    unit, duration = cfg.MODEL.DR2NET.SCHEDULE.UNIT, cfg.MODEL.DR2NET.SCHEDULE.DURATION
    if unit == "fraction":
        return duration
    if unit == "iterations":
        fraction = duration / cfg.SOLVER.MAX_ITER
    elif unit == "epochs":
        if count_images is None:
            return 1.0
        fraction = duration * count_images() / (cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.MAX_ITER)
    else:
        raise ConfigError(
            f"MODEL.DR2NET.SCHEDULE.UNIT is {unit!r}; use 'fraction', 'iterations' or 'epochs'"
        )
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"MODEL.DR2NET.SCHEDULE.DURATION is {duration} {unit}, {fraction:.2f} of the "
            f"{cfg.SOLVER.MAX_ITER} iterations of the training; it must be part of it"
        )
    return fraction


def merge_config(cfg: CfgNode, config_file: str | None, overrides: Sequence[str]) -> None:
    """Merge a YAML file (with ``_BASE_``), if there is one, and ``KEY VALUE`` pairs into ``cfg``.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a value of a wrong type, a seed too
            large for NumPy.
    """
    if config_file is not None and not Path(config_file).is_file():
        raise ConfigError(f"config file {config_file!r} does not exist; see configs/ for some")
    if len(overrides) % 2:
        raise ConfigError(
            f"overrides come as KEY VALUE pairs, but {list(overrides)} has {len(overrides)} words"
        )
    try:
        if config_file is not None:
            # Without its default, which lets a YAML file run code.
            cfg.merge_from_file(config_file, allow_unsafe=False)
    except (KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {config_file}: {_one_line(error)}") from error
    try:
        cfg.merge_from_list(list(overrides))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"command line: {_one_line(error)}") from error
    if cfg.SEED >= 2**32:
        raise ConfigError(f"SEED is {cfg.SEED}; it must be below 2^32, or negative to draw one")


def check_categories(datasets: Mapping[str, Sequence[str]], key: str, num_classes: int) -> None:
    """Refuse datasets (name -> category names) that differ from each other or from the model.

    Raises:
        ConfigError: names the datasets and ``key``, that of ``num_classes``.
    """
    first = next(iter(datasets), "")
    for name, categories in datasets.items():
        if len(categories) != num_classes:
            raise ConfigError(
                f"{key} is {num_classes}, but {name} has {len(categories)} "
                f"categories; set it to {len(categories)}"
            )
        if tuple(categories) != tuple(datasets[first]):
            raise ConfigError(
                f"DATASETS: {name} has other categories than {first}, or another order; use "
                "datasets whose categories agree"
            )


def check_weights_to_evaluate(cfg: CfgNode, resuming: bool) -> None:
    """Refuse an evaluation that has neither MODEL.WEIGHTS nor a checkpoint to resume from."""
    if not (cfg.MODEL.WEIGHTS or resuming):
        raise ConfigError(
            "--eval-only without weights: set MODEL.WEIGHTS to a checkpoint, or add --resume with "
            "the OUTPUT_DIR of a training"
        )


def _one_line(error: Exception) -> str:
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split())
