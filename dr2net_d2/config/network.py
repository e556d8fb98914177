"""The backbone that a config describes, in terms of ``core``."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from dr2net_d2.config.keys import DR2NET_KEYS
from dr2net_d2.config.merging import value_of
from dr2net_d2.config.table import check_value
from dr2net_d2.errors import ConfigError

BACKBONE_SECTIONS = ("VIT", "SWIN", "MVIT")
"""Sections of MODEL that each describe one kind of backbone."""


def backbone_section(cfg: CfgNode, section: str) -> CfgNode:
    """MODEL.``section``, one of ``BACKBONE_SECTIONS``, to build a backbone from.

    Raises:
        ConfigError: a key of another of these sections is set, although nothing would read it.
    """
    for other in BACKBONE_SECTIONS:
        for name, key in DR2NET_KEYS.items():
            if other == section or not name.startswith(f"MODEL.{other}."):
                continue
            if (value := value_of(cfg, name)) != key.default:
                raise ConfigError(
                    f"{name} is {value!r}, but MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} is "
                    f"built from MODEL.{section}; name a backbone of MODEL.{other}, or leave that "
                    "section at its defaults"
                )
    return cfg.MODEL[section]


def require_plain_vit(cfg: CfgNode, what: str) -> None:
    """Refuse a backbone with stages (an FPN on a ResNet, Swin or MViT) where a plain ViT is needed.

    Args:
        cfg: MODEL.BACKBONE.NAME is read.
        what: needs the plain ViT; the error begins with it.

    Raises:
        ConfigError: the backbone has stages.
    """
    if cfg.MODEL.BACKBONE.NAME.endswith("_fpn_backbone"):
        raise ConfigError(
            f"{what} is for plain ViTs, but MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}"
        )


def vit_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments that Detectron2's ``ViT`` and our ``Dr2NetViT`` share, from MODEL.VIT.

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
    """Keyword arguments that only our backbones have, from MODEL.DR2NET."""
    dr2net = cfg.MODEL.DR2NET
    return {
        "reversible": dr2net.REVERSIBLE,
        "arithmetic": dr2net.ARITHMETIC,
        "first_state": dr2net.FIRST_STATE,
        "output": dr2net.OUTPUT,
    }


def lean_parts(cfg: CfgNode) -> tuple[str, ...]:
    """The modules to make lean, some of ``LEAN_PARTS``, from MODEL.DR2NET.LEAN.

    Raises:
        ConfigError: it names another module.
    """
    name = "MODEL.DR2NET.LEAN"
    check_value(name, value_of(cfg, name), DR2NET_KEYS[name])
    return tuple(cfg.MODEL.DR2NET.LEAN)
