"""Swin and MViTv2 with a feature pyramid network: ours and Detectron2's own, from the same keys."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.mvit import MViT
from detectron2.modeling.backbone.swin import SwinTransformer
from fvcore.common.config import CfgNode
from torch import nn

from dr2net_d2.config import backbone_section, dr2net_arguments
from dr2net_d2.d2.backbone import PaddedBackbone, padding
from dr2net_d2.d2.stages import Dr2NetMViT, Dr2NetSwin
from dr2net_d2.errors import ConfigError, config_section


class PaddedFPN(PaddedBackbone, FPN):
    """Detectron2's feature pyramid network, padded like our pyramid."""


@BACKBONE_REGISTRY.register()
def build_dr2net_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PaddedFPN:
    """Build our Swin and a feature pyramid network; four stages give "p2" ... "p6"."""
    with config_section("MODEL.SWIN, MODEL.DR2NET"):
        swin = Dr2NetSwin(**swin_arguments(cfg), **dr2net_arguments(cfg))
    return _pyramid_on(swin, cfg, "SWIN")


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PaddedFPN:
    """Build Detectron2's Swin and a feature pyramid network; four stages give "p2" ... "p6"."""
    return _pyramid_on(SwinTransformer(**swin_arguments(cfg)), cfg, "SWIN")


@BACKBONE_REGISTRY.register()
def build_dr2net_mvit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PaddedFPN:
    """Build our MViTv2 and a feature pyramid network; four stages give "p2" ... "p6"."""
    with config_section("MODEL.MVIT, MODEL.DR2NET"):
        mvit = Dr2NetMViT(**mvit_arguments(cfg), **dr2net_arguments(cfg))
    return _pyramid_on(mvit, cfg, "MVIT")


@BACKBONE_REGISTRY.register()
def build_mvit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PaddedFPN:
    """Build Detectron2's MViTv2 and a feature pyramid network; four stages give "p2" ... "p6"."""
    return _pyramid_on(MViT(**mvit_arguments(cfg)), cfg, "MVIT")


def swin_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments shared by Detectron2's ``SwinTransformer`` and our ``Dr2NetSwin``.

    Raises:
        ConfigError: see ``backbone_section``; or the number of heads of a stage does not divide its
            width.
    """
    swin = backbone_section(cfg, "SWIN")
    widths = [swin.EMBED_DIM * 2**stage for stage in range(len(swin.DEPTHS))]
    _check_heads("SWIN", swin.NUM_HEADS, widths)
    features = _in_features(cfg, [f"p{stage}" for stage in range(len(widths))])
    return _lower_case(swin) | {
        "in_chans": len(cfg.MODEL.PIXEL_MEAN),
        "out_indices": [int(name.removeprefix("p")) for name in features],
    }


def mvit_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments shared by Detectron2's ``MViT`` and our ``Dr2NetMViT``.

    Raises:
        ConfigError: see ``backbone_section``; or the last stage does not end with the last block,
            or the number of heads does not divide the width.
    """
    mvit = backbone_section(cfg, "MVIT")
    ends = list(mvit.LAST_BLOCK_INDEXES)
    in_order = ends == sorted({*ends} & {*range(mvit.DEPTH)})
    if len(ends) < 3 or not in_order or ends[-1] != mvit.DEPTH - 1:
        raise ConfigError(
            f"MODEL.MVIT.LAST_BLOCK_INDEXES is {ends}; list the last block of each stage, for at "
            f"least 3 stages, in order and up to MODEL.MVIT.DEPTH - 1, which is {mvit.DEPTH - 1}"
        )
    _check_heads("MVIT", [mvit.NUM_HEADS], [mvit.EMBED_DIM])
    return _lower_case(mvit) | {
        "in_chans": len(cfg.MODEL.PIXEL_MEAN),
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "out_features": _in_features(cfg, [f"scale{stage + 2}" for stage in range(len(ends))]),
    }


def _lower_case(section: CfgNode) -> dict[str, Any]:
    """The keys as arguments of Detectron2's classes, which only SQUARE_PAD is not."""
    return {key.lower(): value for key, value in section.items() if key != "SQUARE_PAD"}


def _check_heads(section: str, heads: list[int], widths: list[int]) -> None:
    if len(heads) != len(widths) or any(
        width % number for width, number in zip(widths, heads, strict=True)
    ):
        raise ConfigError(
            f"MODEL.{section}.NUM_HEADS is {heads}; it needs divisors of the widths {widths}, "
            f"which follow from MODEL.{section}.EMBED_DIM"
        )


def _in_features(cfg: CfgNode, outputs: list[str]) -> list[str]:
    """MODEL.FPN.IN_FEATURES, or all outputs of the backbone if that is empty."""
    if unknown := [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in outputs]:
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES has {unknown[0]!r}; choose from {outputs}, the outputs of "
            f"{cfg.MODEL.BACKBONE.NAME}"
        )
    return list(cfg.MODEL.FPN.IN_FEATURES) or outputs


def _pyramid_on(bottom_up: Backbone, cfg: CfgNode, section: str) -> PaddedFPN:
    shapes = bottom_up.output_shape()
    coarsest = max(shape.stride for shape in shapes.values())
    top_block = LastLevelMaxPool()
    top_block.in_feature = f"p{int(math.log2(coarsest))}"
    pyramid = PaddedFPN(
        bottom_up,
        in_features=list(shapes),
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    pyramid.size_divisibility = padding(cfg, section, coarsest)
    return pyramid
