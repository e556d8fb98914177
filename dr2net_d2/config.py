"""Config keys that both engines share, and what they mean in terms of ``core``.

Works on any fvcore ``CfgNode``; Detectron2's is one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from dr2net_d2.core import CoefficientSchedule
from dr2net_d2.core.schedule import BETA_GRID, snap_to_grid
from dr2net_d2.errors import ConfigError, config_section

logger = logging.getLogger(__name__)

LEAN_PARTS = ("pyramid", "rpn", "roi")

BACKBONE_SECTIONS = ("VIT", "SWIN", "MVIT")
"""Sections of MODEL, each of which describes one kind of backbone."""


def add_dr2net_config(cfg: CfgNode) -> None:
    """Add the keys of this project to a config.

    MODEL.VIT.*, MODEL.SWIN.*, MODEL.MVIT.*, MODEL.DR2NET.*, two of SOLVER.
    """
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
    # Pad both sides of every image to a multiple of this, in px; 0: of the coarsest stride.
    vit.SQUARE_PAD = 0

    _add_swin(cfg.MODEL)
    _add_mvit(cfg.MODEL)

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
    # Patterns of model keys that a detector checkpoint may lack or have in another shape.
    dr2net.ALLOW_PARTIAL = []
    # How alpha and beta move during training; see core.CoefficientSchedule.
    dr2net.SCHEDULE = node()
    dr2net.SCHEDULE.KIND = "convex"
    dr2net.SCHEDULE.START_BETA = 1 / 16
    dr2net.SCHEDULE.END_BETA = 0.5
    # The fraction of training after which the final coefficients hold.
    dr2net.SCHEDULE.DURATION = 0.5
    # Number of stages within it; 0 moves every iteration.
    dr2net.SCHEDULE.UPDATES = 0

    # "SGD" or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning-rate factor per ViT layer, counted down from the head; 1 turns it off.
    cfg.SOLVER.LAYER_DECAY = 1.0


def _add_swin(model: CfgNode) -> None:
    # Swin; the defaults are Swin-T. Both stock and Dr2Net backbones read these.
    model.SWIN = swin = type(model)()
    # Width of the first stage; it doubles with every further one.
    swin.EMBED_DIM = 96
    # Blocks and attention heads of each stage.
    swin.DEPTHS = [2, 2, 6, 2]
    swin.NUM_HEADS = [3, 6, 12, 24]
    # Window side in tokens.
    swin.WINDOW_SIZE = 7
    swin.MLP_RATIO = 4.0
    swin.QKV_BIAS = True
    # Stochastic depth rate of the last block; it grows linearly from 0 at the first.
    swin.DROP_PATH_RATE = 0.2
    # Absolute positions, and the side in px of the pretraining images, which sizes their table.
    swin.APE = False
    swin.PRETRAIN_IMG_SIZE = 224
    # LayerNorm after the patch embedding.
    swin.PATCH_NORM = True
    # What stays as pretrained: -1 nothing, 0 the patch embedding, n > 1 also n - 1 stages.
    swin.FROZEN_STAGES = -1
    # Pad both sides of every image to a multiple of this, in px; 0: of the coarsest stride.
    swin.SQUARE_PAD = 0


def _add_mvit(model: CfgNode) -> None:
    # MViTv2; the defaults are MViTv2-T. Both stock and Dr2Net backbones read these.
    model.MVIT = mvit = type(model)()
    # Side in px that relative position tables are sized for; others are interpolated.
    mvit.IMG_SIZE = 224
    # Width and attention heads of the first stage; both double with every further one.
    mvit.EMBED_DIM = 96
    mvit.NUM_HEADS = 1
    mvit.DEPTH = 10
    # The last block of each of the four stages.
    mvit.LAST_BLOCK_INDEXES = [0, 2, 7, 9]
    # Stride of the pooled keys and values in the first stage; it halves with every further one.
    mvit.ADAPTIVE_KV_STRIDE = 4
    # Window side in tokens in the first stage; it halves with every further one.
    mvit.ADAPTIVE_WINDOW_SIZE = 56
    # Add the pooled queries to what attention gives.
    mvit.RESIDUAL_POOLING = True
    mvit.MLP_RATIO = 4.0
    mvit.QKV_BIAS = True
    # Stochastic depth rate of the last block; it grows linearly from 0 at the first.
    mvit.DROP_PATH_RATE = 0.1
    mvit.USE_ABS_POS = False
    mvit.USE_REL_POS = True
    # Side in px of the pretraining images, which sizes the absolute position table.
    mvit.PRETRAIN_IMG_SIZE = 224
    mvit.PRETRAIN_USE_CLS_TOKEN = True
    # Pad both sides of every image to a multiple of this, in px; 0: of the coarsest stride.
    mvit.SQUARE_PAD = 0


def backbone_section(cfg: CfgNode, section: str) -> CfgNode:
    """MODEL.``section``, one of ``BACKBONE_SECTIONS``, to build a backbone from.

    Raises:
        ConfigError: a key of another of these sections has been set, which would not be read.
    """
    defaults = CfgNode({"MODEL": {}, "SOLVER": {}})
    add_dr2net_config(defaults)
    for other in BACKBONE_SECTIONS:
        for key, default in defaults.MODEL[other].items() if other != section else ():
            if (value := cfg.MODEL[other][key]) != default:
                raise ConfigError(
                    f"MODEL.{other}.{key} is {value!r}, but MODEL.BACKBONE.NAME "
                    f"{cfg.MODEL.BACKBONE.NAME} is built from MODEL.{section}; name a backbone of "
                    f"MODEL.{other}, or leave that section at its defaults"
                )
    return cfg.MODEL[section]


def require_plain_vit(cfg: CfgNode, what: str) -> None:
    """Refuse a backbone of stages, an FPN on a ResNet, Swin or MViT, for ``what``.

    Raises:
        ConfigError: names it and MODEL.BACKBONE.NAME.
    """
    if cfg.MODEL.BACKBONE.NAME.endswith("_fpn_backbone"):
        raise ConfigError(
            f"{what} is for plain ViTs, but MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}"
        )


def vit_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments that Detectron2's ``ViT`` and our ``Dr2NetViT`` have in common.

    Raises:
        ConfigError: see ``backbone_section``.
    """
    vit = backbone_section(cfg, "VIT")
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
    """Keyword arguments that only our backbones have."""
    dr2net = cfg.MODEL.DR2NET
    return {
        "reversible": dr2net.REVERSIBLE,
        "arithmetic": dr2net.ARITHMETIC,
        "first_state": dr2net.FIRST_STATE,
        "output": dr2net.OUTPUT,
    }


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


def coefficient_schedule(cfg: CfgNode) -> CoefficientSchedule:
    """The schedule of MODEL.DR2NET.SCHEDULE; a beta that exact arithmetic has to snap is logged."""
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
            duration=schedule.DURATION,
            updates=schedule.UPDATES,
            exact=exact,
        )


def merge_config(cfg: CfgNode, config_file: str, overrides: Sequence[str]) -> None:
    """Merge a YAML file (with ``_BASE_``) and ``KEY VALUE`` pairs into ``cfg``.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a value of a wrong type, a seed too
            large for NumPy.
    """
    if not Path(config_file).is_file():
        raise ConfigError(f"config file {config_file!r} does not exist; see configs/ for some")
    if len(overrides) % 2:
        raise ConfigError(
            f"overrides come as KEY VALUE pairs, but {list(overrides)} has {len(overrides)} words"
        )
    try:
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


def check_categories(datasets: Mapping[str, Sequence[str]], section: str, num_classes: int) -> None:
    """Refuse datasets (name -> category names) that differ from each other or from NUM_CLASSES.

    Raises:
        ConfigError: names the datasets and the key under MODEL.``section``.
    """
    first = next(iter(datasets), "")
    for name, categories in datasets.items():
        if len(categories) != num_classes:
            raise ConfigError(
                f"MODEL.{section}.NUM_CLASSES is {num_classes}, but {name} has {len(categories)} "
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
