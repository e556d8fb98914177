"""Backbones for ``MODEL.BACKBONE.NAME``: ours and Detectron2's own, from the same config keys."""

from __future__ import annotations

import math
from functools import partial

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import vit as stock
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from fvcore.common.config import CfgNode
from torch import nn

from dr2net_d2.config import dr2net_arguments, lean_parts, vit_arguments
from dr2net_d2.core import Dr2NetViT, SimpleFeaturePyramid
from dr2net_d2.errors import ConfigError, config_section

_NORM = partial(nn.LayerNorm, eps=1e-6)


class PaddedBackbone(Backbone):
    """A backbone whose images are padded to multiples of ``size_divisibility`` px on both sides.

    A square to pad to is such a multiple too. Detectron2's own way to ask for a square cuts larger
    images down to it silently, and its pyramid misspells the key that asks for whole strides.
    """

    size_divisibility = 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self.size_divisibility}


class Dr2NetBackbone(Dr2NetViT, PaddedBackbone):
    """``Dr2NetViT`` as a Detectron2 backbone with one feature map, "last_feat" by default."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {self.out_feature: ShapeSpec(channels=self.embed_dim, stride=self.patch_size)}


class Dr2NetPyramid(SimpleFeaturePyramid, PaddedBackbone):
    """``SimpleFeaturePyramid`` as a Detectron2 backbone, levels "p<log2 of the stride>"."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self.out_channels, stride=stride)
            for name, stride in self.strides.items()
        }


class StockBackbone(PaddedBackbone, stock.ViT):
    """Detectron2's ViT, padded as ours."""


class StockPyramid(PaddedBackbone, stock.SimpleFeaturePyramid):
    """Detectron2's simple feature pyramid, padded as ours."""


@BACKBONE_REGISTRY.register()
def build_dr2net_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Dr2NetBackbone:
    """Our ViT alone, output "last_feat"."""
    with config_section("MODEL.VIT, MODEL.DR2NET"):
        vit = Dr2NetBackbone(norm_layer=_NORM, **vit_arguments(cfg), **dr2net_arguments(cfg))
    vit.size_divisibility = padding(cfg, "VIT", vit.patch_size)
    return vit


@BACKBONE_REGISTRY.register()
def build_dr2net_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Dr2NetPyramid:
    """Our ViT and the simple feature pyramid, outputs "p<n>"."""
    vit = build_dr2net_vit_backbone(cfg, input_shape)
    with config_section("MODEL.VIT"):
        pyramid = Dr2NetPyramid(
            vit,
            cfg.MODEL.FPN.OUT_CHANNELS,
            cfg.MODEL.VIT.SCALE_FACTORS,
            lean="pyramid" in lean_parts(cfg),
        )
    pyramid.size_divisibility = padding(cfg, "VIT", pyramid.size_divisibility)
    return pyramid


@BACKBONE_REGISTRY.register()
def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> StockBackbone:
    """Detectron2's ViT alone, output "last_feat"."""
    vit = StockBackbone(norm_layer=_NORM, **vit_arguments(cfg))
    vit.size_divisibility = padding(cfg, "VIT", cfg.MODEL.VIT.PATCH_SIZE)
    return vit


@BACKBONE_REGISTRY.register()
def build_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> StockPyramid:
    """Detectron2's ViT and simple feature pyramid, outputs "p<n>"."""
    patch_size, scale_factors = cfg.MODEL.VIT.PATCH_SIZE, cfg.MODEL.VIT.SCALE_FACTORS
    last_stride = int(patch_size / scale_factors[-1])
    top_block = LastLevelMaxPool()
    top_block.in_feature = f"p{int(math.log2(last_stride))}"
    pyramid = StockPyramid(
        build_vit_backbone(cfg, input_shape),
        in_feature="last_feat",
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=scale_factors,
        top_block=top_block,
    )
    pyramid.size_divisibility = padding(cfg, "VIT", max(patch_size, last_stride))
    return pyramid


def padding(cfg: CfgNode, section: str, stride: int) -> int:
    """The multiple of px that images are padded to: the stride, or a square of whole strides.

    Raises:
        ConfigError: INPUT allows images that are larger than the square, MODEL.section.SQUARE_PAD.
    """
    square = math.ceil(cfg.MODEL[section].SQUARE_PAD / stride) * stride
    for key in ("MAX_SIZE_TRAIN", "MAX_SIZE_TEST"):
        if 0 < square < cfg.INPUT[key]:
            raise ConfigError(
                f"INPUT.{key} is {cfg.INPUT[key]} and MODEL.{section}.SQUARE_PAD {square}: larger "
                "images would need several squares; lower the one or raise the other (0 pads to "
                "strides)"
            )
    return square or stride
