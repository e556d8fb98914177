"""The simple feature pyramid of ViTDet: all levels from the last feature map alone.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527,
section 3. Parameter names are Detectron2's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dr2net_d2.core.lean_chain import (
    BareConvolution,
    Layer,
    NormInPieces,
    SharedCast,
    has_inner_hooks,
    lean_chain,
    lean_max_pool,
)
from dr2net_d2.core.vit import Dr2NetViT


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        # In the parameters' precision under autocast too, as layer_norm itself does.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Conv2d):
    """A convolution without bias, followed by its LayerNorm ``norm``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        self.norm = ChannelLayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class SimpleFeaturePyramid(nn.Module):
    """Feature maps of several strides from a single-scale backbone.

    Args:
        net: the backbone; has ``embed_dim``, ``patch_size`` and ``out_feature``, and gives a dict.
        out_channels: channels of every level.
        scale_factors: each is 8, 4, 2, 1 or 0.5, in descending order; level p<n> has stride
            2^n = patch_size / scale. Detectron2's own pyramid offers 4 at most; 8 applies one more
            step of the same kind, and gives a level of stride 2 for patches of 16 px.
        top_level: add one level of twice the last stride by subsampling, as Detectron2's
            ``LastLevelMaxPool`` does.
        lean: for the backward, keep only the backbone's map and the output of the last convolution
            of each level, in the autocast dtype. The other layers run again, which takes 1 % of a
            step of ViTDet-B at 1024 px. Outputs are the same; gradients are, up to rounding.

    Shape: (N, 3, H, W), H and W multiples of ``size_divisibility`` ->
    {"p2": (N, out_channels, H / 4, W / 4), ...}, finest level first.

    Raises:
        ValueError: a scale factor that is not offered, or a stride that is not a power of two.
    """

    def __init__(
        self,
        net: Dr2NetViT,
        out_channels: int = 256,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        top_level: bool = True,
        lean: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.lean = lean
        self.out_channels = out_channels
        self.top_level = top_level
        self.strides: dict[str, int] = {}
        for scale in scale_factors:
            level = math.log2(net.patch_size / scale)
            if level != int(level) or level < 0:
                raise ValueError(
                    f"scale factor {scale} of patch size {net.patch_size} gives a stride of "
                    f"{net.patch_size / scale} px; strides must be powers of two"
                )
            self.add_module(f"simfp_{int(level)}", _stage(net.embed_dim, out_channels, scale))
            self.strides[f"p{int(level)}"] = 2 ** int(level)
        self._levels = list(self.strides)
        self.size_divisibility = max(*self.strides.values(), net.patch_size)
        if top_level:
            last = max(self.strides.values())
            self.strides[f"p{int(math.log2(last)) + 1}"] = 2 * last

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.net(x)[self.net.out_feature]
        stages: list[nn.Sequential] = [getattr(self, f"simfp_{name[1:]}") for name in self._levels]
        hooked = has_inner_hooks(nn.ModuleList(stages))
        if self.lean and torch.is_grad_enabled() and not hooked:
            maps = _lean_levels(stages, feature)
        else:
            maps = [stage(feature) for stage in stages]
        if self.top_level:
            maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return dict(zip(self.strides, maps, strict=True))


def _lean_levels(stages: Iterable[nn.Sequential], feature: Tensor) -> list[Tensor]:
    shared = SharedCast(feature)
    maps = []
    for stage in stages:
        *layers, last = _in_pieces(stage)
        if isinstance(layers[0], nn.MaxPool2d):
            x = lean_max_pool(feature)
            layers = layers[1:]
        else:
            x = shared.read()
        maps.append(last(lean_chain(layers, x, products=len(layers))))
    return maps


def _in_pieces(stage: nn.Sequential) -> list[Layer]:
    """The layers of a level, with each norm and its activation as one layer; the last is a norm."""
    layers: list[Layer] = []
    for layer in stage:
        if isinstance(layer, ConvNorm):
            norm = NormInPieces(layer.norm, None, low=layer is not stage[-1])
            layers += [BareConvolution(layer), norm]
        elif isinstance(layer, ChannelLayerNorm):
            norm_of_gelu = layer
        elif isinstance(layer, nn.GELU):
            layers.append(NormInPieces(norm_of_gelu, layer, low=True))
        else:
            layers.append(layer)
    return layers


def _stage(dim: int, out_channels: int, scale: float) -> nn.Sequential:
    if scale not in (8, 4, 2, 1, 0.5):
        raise ValueError(f"scale factor {scale} is not offered; use 8, 4, 2, 1 or 0.5")
    resize: list[nn.Module] = [nn.MaxPool2d(kernel_size=2, stride=2)] if scale == 0.5 else []
    for doubling in range(round(math.log2(scale))):
        if doubling:
            resize += [ChannelLayerNorm(dim), nn.GELU()]
        resize.append(nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2))
        dim //= 2
    return nn.Sequential(
        *resize, ConvNorm(dim, out_channels, 1), ConvNorm(out_channels, out_channels, 3)
    )
