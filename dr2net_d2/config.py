"""What the keys that both engines share mean in terms of ``core``.

Works on any fvcore ``CfgNode``; Detectron2's is one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode

from dr2net_d2.config_keys import LEAN_PARTS, add_dr2net_config
from dr2net_d2.core import CoefficientSchedule
from dr2net_d2.core.schedule import BETA_GRID, snap_to_grid
from dr2net_d2.data.tiling import Grid, TileChoice
from dr2net_d2.errors import ConfigError, config_section
from dr2net_d2.evaluation import Protocol, choose_protocol

logger = logging.getLogger(__name__)

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

BACKBONE_SECTIONS = ("VIT", "SWIN", "MVIT")
"""Sections of MODEL, each of which describes one kind of backbone."""


def backbone_section(cfg: CfgNode, section: str) -> CfgNode:
    """MODEL.``section``, one of ``BACKBONE_SECTIONS``, to build a backbone from.

    Raises:
        ConfigError: a key of another of these sections has been set, which would not be read.
    """
    defaults = CfgNode({"MODEL": {}, "SOLVER": {"AMP": {}}, "INPUT": {}, "TEST": {}})
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


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of a key with dots."""
    return reduce(getattr, key.split("."), cfg)


def head_section(cfg: CfgNode) -> str:
    """The section of MODEL that has NUM_CLASSES of the detector."""
    sections = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
    # The torchvision engine leaves the key out.
    return sections.get(cfg.MODEL.get("META_ARCHITECTURE"), "ROI_HEADS")


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


def evaluation_protocol(cfg: CfgNode) -> Protocol:
    """That of TEST.PROTOCOL; warns if the detector gives fewer boxes than it counts.

    Raises:
        ConfigError: there is none of that name.
    """
    given = cfg.TEST.DETECTIONS_PER_IMAGE
    protocol = choose_protocol(cfg.TEST.PROTOCOL, given)
    if given < (most := protocol.max_detections[-1]):
        logger.warning(
            "TEST.DETECTIONS_PER_IMAGE is %d, but the protocol %s counts up to %d; the metrics may "
            "be lower than they could be",
            given,
            protocol.name,
            most,
        )
    return protocol


def training_tiles(cfg: CfgNode) -> TileChoice | None:
    """INPUT.TILES, None if it is not enabled.

    Raises:
        ConfigError: numbers that make no tiles.
    """
    tiles = cfg.INPUT.TILES
    if not tiles.ENABLED:
        return None
    with config_section("INPUT.TILES"):
        grid = Grid(tiles.SIZE, tiles.OVERLAP)
        return TileChoice(grid, tiles.MIN_VISIBLE, tiles.EMPTY_RATIO)


def check_jittering(lsj: CfgNode) -> None:
    """Refuse an INPUT.LSJ without a side or a range of scales.

    Raises:
        ConfigError: names them.
    """
    if lsj.IMAGE_SIZE < 1 or not 0 < lsj.MIN_SCALE <= lsj.MAX_SCALE:
        raise ConfigError(
            f"INPUT.LSJ has IMAGE_SIZE {lsj.IMAGE_SIZE} and scales {lsj.MIN_SCALE} to "
            f"{lsj.MAX_SCALE}; it needs a side of 1 px or more and 0 < MIN_SCALE <= MAX_SCALE"
        )


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


def box_limits(cfg: CfgNode, phase: str) -> dict[str, int]:
    """What bounds the number of boxes of an image, by key; those before NMS hold for each level.

    Bounds of a tile are none of an image.

    Args:
        phase: "TRAIN" or "TEST", as in DATASETS.
    """
    section = head_section(cfg)
    tiles = (cfg.INPUT if phase == "TRAIN" else cfg.TEST).TILES
    if tiles.ENABLED:
        keys = []
    elif section == "ROI_HEADS":
        keys = [f"MODEL.RPN.{when}_NMS_TOPK_{phase}" for when in ("PRE", "POST")]
    else:
        keys = [f"MODEL.{section}.TOPK_CANDIDATES_TEST"] if phase == "TEST" else []
    if phase == "TEST":
        keys.append("TEST.DETECTIONS_PER_IMAGE")
    return {key: value_of(cfg, key) for key in keys}


def warn_of_limits(limits: Mapping[str, int], densest: Mapping[str, int]) -> None:
    """Warn where fewer boxes can be found than an image has objects.

    Args:
        limits: of the boxes of an image, by key.
        densest: objects of the densest image, by dataset.
    """
    if not densest:
        return
    count, name = max((count, name) for name, count in densest.items())
    short = [f"{key} is {limit}" for key, limit in limits.items() if limit < count]
    if short:
        logger.warning(
            "%s has an image with %d objects, but %s; others are lost: raise such limits together",
            name,
            count,
            " and ".join(short),
        )


def check_weights_to_evaluate(
    weights: str, resuming: bool, key: str = "MODEL.WEIGHTS", folder: str = "OUTPUT_DIR"
) -> None:
    """Refuse an evaluation that has neither weights nor a checkpoint to resume from.

    Args:
        key, folder: what the config calls the weights and the folder of the checkpoints.
    """
    if not (weights or resuming):
        raise ConfigError(
            f"--eval-only without weights: set {key} to a checkpoint, or add --resume with the "
            f"{folder} of a training"
        )


def _one_line(error: Exception) -> str:
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split())
