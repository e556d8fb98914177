"""ViT backbones for MODEL.BACKBONE.NAME: ours and Detectron2's own, from the same config keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import vit as stock
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dr2net_d2.config import dr2net_arguments, lean_parts, value_of, vit_arguments
from dr2net_d2.core import Dr2NetViT, SimpleFeaturePyramid
from dr2net_d2.d2.replacement import Replacement, replace_modules
from dr2net_d2.errors import ConfigError, config_section

_NORM = partial(nn.LayerNorm, eps=1e-6)


class PaddedBackbone(Backbone):
    """A backbone whose images are padded to multiples of ``size_divisibility`` pixels.

    To pad to squares, the side of the square is that multiple. Detectron2's own option for squares
    silently cuts larger images down, and its pyramid misspells the key for multiples of a stride.
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
    """Our simple feature pyramid with the arguments of Detectron2's, levels "p<log2 of stride>".

    Args:
        net: a ``Dr2NetBackbone`` or a ``StockBackbone``.
        in_feature: name of the feature map of ``net``.
        out_channels, scale_factors, lean: see ``core.SimpleFeaturePyramid``.
        top_block: computes coarser levels: ``LastLevelMaxPool`` or ``LastLevelP6P7``.
        norm: only "LN" is available.
        square_pad: pad both sides of every image to a multiple of this many pixels, rounded up to
            whole strides.

    Raises:
        ValueError: another norm, or a feature map or level that does not exist.
    """

    def __init__(
        self,
        net: Dr2NetBackbone | StockBackbone,
        in_feature: str = "last_feat",
        out_channels: int = 256,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        top_block: Any = None,
        norm: str = "LN",
        square_pad: int = 0,
        lean: bool = False,
    ) -> None:
        if norm != "LN" or in_feature != net.out_feature:
            raise ValueError(
                f"norm is {norm!r} and in_feature {in_feature!r}; the pyramid has 'LN' and reads "
                f"{net.out_feature!r}"
            )
        super().__init__(
            net,
            out_channels=out_channels,
            scale_factors=scale_factors,
            top_level=False,
            lean=lean,
        )
        self.size_divisibility *= math.ceil(square_pad / self.size_divisibility) or 1
        self.top_block = top_block
        strides = [*self.strides.values()]
        if top_block is not None:
            if top_block.in_feature not in self.strides:
                raise ValueError(
                    f"top_block reads {top_block.in_feature!r}; use one of {[*self.strides]}"
                )
            strides += [strides[-1] << i for i in range(1, top_block.num_levels + 1)]
        self._output_shape = {
            f"p{int(math.log2(stride))}": ShapeSpec(channels=out_channels, stride=stride)
            for stride in strides
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = super().forward(x)
        if self.top_block is None:
            return maps
        coarser = self.top_block(maps[self.top_block.in_feature])
        return dict(zip(self._output_shape, (*maps.values(), *coarser), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._output_shape


class StockBackbone(PaddedBackbone, stock.ViT):
    """Detectron2's ViT, padded like ours, with the attributes that our pyramid reads."""

    @property
    def out_feature(self) -> str:
        (name,) = self.output_shape()
        return name

    @property
    def embed_dim(self) -> int:
        return self.output_shape()[self.out_feature].channels

    @property
    def patch_size(self) -> int:
        return self.output_shape()[self.out_feature].stride


class StockPyramid(PaddedBackbone, stock.SimpleFeaturePyramid):
    """Detectron2's simple feature pyramid, padded like ours."""


class UncroppedPyramid(Replacement, StockPyramid):
    """A built pyramid of Detectron2's, padded like ours.

    Args:
        pyramid: its images are padded to multiples of its square, or of its coarsest stride if it
            has none.
    """

    def __init__(self, pyramid: stock.SimpleFeaturePyramid) -> None:
        super().__init__(pyramid)
        constraints = pyramid.padding_constraints
        strides = [shape.stride for shape in pyramid.net.output_shape().values()]
        stride = max(constraints["size_divisiblity"], *strides)
        square = math.ceil(constraints["square_size"] / stride) * stride
        self.size_divisibility = square or stride


@BACKBONE_REGISTRY.register()
def build_dr2net_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Dr2NetBackbone:
    """Build our ViT alone; its output is "last_feat"."""
    with config_section("MODEL.VIT, MODEL.DR2NET"):
        vit = Dr2NetBackbone(norm_layer=_NORM, **vit_arguments(cfg), **dr2net_arguments(cfg))
    vit.size_divisibility = padding(cfg, "VIT", vit.patch_size)
    return vit


@BACKBONE_REGISTRY.register()
def build_dr2net_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Dr2NetPyramid:
    """Build our ViT and our simple feature pyramid; its outputs are "p<log2 of stride>"."""
    vit = build_dr2net_vit_backbone(cfg, input_shape)
    with config_section("MODEL.VIT"):
        pyramid = Dr2NetPyramid(vit, lean="pyramid" in lean_parts(cfg), **_pyramid_arguments(cfg))
    pyramid.size_divisibility = padding(cfg, "VIT", pyramid.size_divisibility)
    return pyramid


@BACKBONE_REGISTRY.register()
def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> StockBackbone:
    """Build Detectron2's ViT alone; its output is "last_feat"."""
    vit = StockBackbone(norm_layer=_NORM, **vit_arguments(cfg))
    vit.size_divisibility = padding(cfg, "VIT", cfg.MODEL.VIT.PATCH_SIZE)
    return vit


@BACKBONE_REGISTRY.register()
def build_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PaddedBackbone:
    """Build Detectron2's ViT and its simple feature pyramid; outputs "p<log2 of stride>"."""
    vit = build_vit_backbone(cfg, input_shape)
    patch_size, scale_factors = cfg.MODEL.VIT.PATCH_SIZE, cfg.MODEL.VIT.SCALE_FACTORS
    # Detectron2's factors end at 4. Ours, unless lean, has the same layers and stores the same.
    kind = Dr2NetPyramid if 8 in scale_factors else StockPyramid
    pyramid = kind(vit, **_pyramid_arguments(cfg))
    pyramid.size_divisibility = padding(
        cfg, "VIT", max(patch_size, int(patch_size / scale_factors[-1]))
    )
    return pyramid


def _pyramid_arguments(cfg: CfgNode) -> dict[str, Any]:
    vit, channels = cfg.MODEL.VIT, cfg.MODEL.FPN.OUT_CHANNELS
    coarsest = f"p{int(math.log2(vit.PATCH_SIZE / vit.SCALE_FACTORS[-1]))}"
    top_blocks: dict[str, Callable[[], Any]] = {
        "": lambda: None,
        "LastLevelMaxPool": LastLevelMaxPool,
        "LastLevelP6P7": lambda: LastLevelP6P7(channels, channels),
    }
    if vit.TOP_BLOCK not in top_blocks:
        raise ConfigError(f"MODEL.VIT.TOP_BLOCK is {vit.TOP_BLOCK!r}; use one of {[*top_blocks]}")
    top_block = top_blocks[vit.TOP_BLOCK]()
    if top_block is not None:
        top_block.in_feature = coarsest
    return {
        "in_feature": "last_feat",
        "out_channels": channels,
        "scale_factors": vit.SCALE_FACTORS,
        "top_block": top_block,
    }


def padding(cfg: CfgNode, section: str, stride: int) -> int:
    """The number of pixels whose multiples images are padded to.

    Args:
        cfg: MODEL.``section``.SQUARE_PAD, the side of the square to pad to, and INPUT are read.
        section: the backbone's section of MODEL.
        stride: the coarsest stride of the backbone, in pixels.

    Returns:
        The side of the square, rounded up to whole strides; the stride if the side is 0.

    Raises:
        ConfigError: INPUT allows images that are larger than the square.
    """
    square = math.ceil(cfg.MODEL[section].SQUARE_PAD / stride) * stride
    train = "LSJ.IMAGE_SIZE" if cfg.INPUT.LSJ.ENABLED else "MAX_SIZE_TRAIN"
    for key in (train, "MAX_SIZE_TEST"):
        if 0 < square < (longest := value_of(cfg.INPUT, key)):
            raise ConfigError(
                f"INPUT.{key} is {longest} and MODEL.{section}.SQUARE_PAD is {square}: larger "
                "images would need several squares; lower the former or raise the latter (0 pads "
                "to strides)"
            )
    return square or stride


def without_cropping(model: nn.Module) -> nn.Module:
    """Make Detectron2's own simple feature pyramids pad images that exceed ``square_pad``.

    Our pyramids never crop. Detectron2's, which LazyConfigs use, silently drops the pixels outside
    its square, whatever ViT it holds.

    Args:
        model: a detector, changed in place; see ``UncroppedPyramid`` for the padding.

    Returns:
        ``model``.
    """
    pyramids = [m for m in model.modules() if type(m) is stock.SimpleFeaturePyramid]
    replace_modules(model, {pyramid: UncroppedPyramid(pyramid) for pyramid in pyramids})
    return model
