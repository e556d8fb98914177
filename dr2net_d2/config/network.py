"""What the keys of a backbone mean in terms of ``core``."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from dr2net_d2.config.keys import LEAN_PARTS, add_dr2net_config
from dr2net_d2.errors import ConfigError

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
