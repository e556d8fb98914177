"""Faster R-CNN from torchvision's modules, on a ``Dr2NetViT`` with a simple feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, box_area, roi_align

from dr2net_d2.config import dr2net_arguments, lean_parts, vit_arguments
from dr2net_d2.core import Dr2NetViT, SimpleFeaturePyramid
from dr2net_d2.core.pyramid import ChannelLayerNorm
from dr2net_d2.errors import ConfigError, config_section
from dr2net_d2.tv.dataset import resize_shortest_side
from dr2net_d2.tv.lean_heads import LeanBoxHead, LeanRegionProposalNetwork


class DetectorTransform(GeneralizedRCNNTransform):
    """Normalises and pads images; resizes them in evaluation (datasets do in training)."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        if not self.training:
            image = resize_shortest_side(image, self.min_size[-1], self.max_size)
        return image, target


class ExactAnchors(AnchorGenerator):
    """Anchors of exactly the configured sizes.

    torchvision rounds their corners to whole pixels, which changes the area and the aspect ratio
    of an anchor of 10 px by tens of per cent.
    """

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        half = torch.stack([sides / roots, sides * roots], dim=-1).view(-1, 2) / 2
        return torch.cat([-half, half], dim=1)


class AlignedRoIPool(MultiScaleRoIAlign):
    """RoIAlign that samples at pixel centres, as Detectron2's ROIAlignV2 does.

    torchvision's own pooler is off by half a feature pixel, 2 px of the image at stride 4.

    Args:
        strides: stride of each level to pool from, in pixels, by name, from fine to coarse.
        resolution: side of the pooled maps.
        sampling_ratio: samples per bin and axis; 0 adapts their number to the box.

    Shape: features {name: (N, C, H / stride, W / stride)} and boxes (n_i, 4) XYXY in pixels for
    each of N images -> (sum of n_i, C, resolution, resolution).
    """

    def __init__(self, strides: dict[str, int], resolution: int, sampling_ratio: int) -> None:
        super().__init__(list(strides), resolution, sampling_ratio)
        self.strides = strides

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        images = torch.cat([boxes[0].new_full((len(b), 1), i) for i, b in enumerate(boxes)])
        corners = torch.cat(boxes)
        rois = torch.cat([images, corners], dim=1)
        # Equation 1 of FPN (arXiv 1612.03144): a box of side 224 belongs to level 4, of stride 16.
        wanted = 4 + (box_area(corners).sqrt() / 224 + 1e-8).log2().floor()
        levels = {name: int(math.log2(stride)) for name, stride in self.strides.items()}
        wanted = wanted.clamp(min(levels.values()), max(levels.values()))
        channels = x[self.featmap_names[0]].shape[1]
        pooled = corners.new_zeros(len(rois), channels, *self.output_size)
        for name, stride in self.strides.items():
            chosen = (wanted == levels[name]).nonzero()[:, 0]
            pooled[chosen] = roi_align(
                x[name].to(pooled.dtype),
                rois[chosen],
                self.output_size,
                1 / stride,
                self.sampling_ratio,
                aligned=True,
            )
        return pooled


def build_model(cfg: CfgNode) -> GeneralizedRCNN:
    """Build the detector that a checked config describes, on the CPU, with random weights.

    It takes images (3, H, W) of any size with pixels from 0 to 255 in the order of INPUT.FORMAT.
    The pyramid is ``model.backbone``, the ViT ``model.backbone.net``.

    Raises:
        ConfigError: sizes or feature names that do not fit together.
    """
    lean = lean_parts(cfg)
    with config_section("MODEL.VIT, MODEL.DR2NET"):
        vit = Dr2NetViT(
            **vit_arguments(cfg),
            **dr2net_arguments(cfg),
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    with config_section("MODEL.VIT.SCALE_FACTORS"):
        backbone = SimpleFeaturePyramid(
            vit, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.VIT.SCALE_FACTORS, lean="pyramid" in lean
        )
    return GeneralizedRCNN(
        backbone,
        _build_rpn(cfg, backbone, "rpn" in lean),
        _build_roi_heads(cfg, backbone, "roi" in lean),
        DetectorTransform(
            cfg.INPUT.MIN_SIZE_TEST,
            cfg.INPUT.MAX_SIZE_TEST,
            cfg.MODEL.PIXEL_MEAN,
            cfg.MODEL.PIXEL_STD,
            size_divisible=_size_divisible(cfg, backbone),
        ),
    )


def _build_rpn(cfg: CfgNode, backbone: SimpleFeaturePyramid, lean: bool) -> RegionProposalNetwork:
    rpn = cfg.MODEL.RPN
    anchors = _anchors(cfg, backbone)
    per_location = anchors.num_anchors_per_location()[0]
    rpn_class = LeanRegionProposalNetwork if lean else RegionProposalNetwork
    return rpn_class(
        anchors,
        RPNHead(backbone.out_channels, per_location, conv_depth=len(rpn.CONV_DIMS)),
        fg_iou_thresh=rpn.IOU_THRESHOLDS[1],
        bg_iou_thresh=rpn.IOU_THRESHOLDS[0],
        batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
        positive_fraction=rpn.POSITIVE_FRACTION,
        pre_nms_top_n={"training": rpn.PRE_NMS_TOPK_TRAIN, "testing": rpn.PRE_NMS_TOPK_TEST},
        post_nms_top_n={"training": rpn.POST_NMS_TOPK_TRAIN, "testing": rpn.POST_NMS_TOPK_TEST},
        nms_thresh=rpn.NMS_THRESH,
    )


def _build_roi_heads(cfg: CfgNode, backbone: SimpleFeaturePyramid, lean: bool) -> RoIHeads:
    roi, head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    head_class = LeanBoxHead if lean else FastRCNNConvFCHead
    return RoIHeads(
        AlignedRoIPool(
            _pooled_strides(cfg, backbone), head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO
        ),
        head_class(
            (backbone.out_channels, head.POOLER_RESOLUTION, head.POOLER_RESOLUTION),
            [head.CONV_DIM] * head.NUM_CONV,
            [head.FC_DIM] * head.NUM_FC,
            norm_layer=ChannelLayerNorm if head.NORM == "LN" else None,
        ),
        FastRCNNPredictor(head.FC_DIM, roi.NUM_CLASSES + 1),
        fg_iou_thresh=roi.IOU_THRESHOLDS[0],
        bg_iou_thresh=roi.IOU_THRESHOLDS[0],
        batch_size_per_image=roi.BATCH_SIZE_PER_IMAGE,
        positive_fraction=roi.POSITIVE_FRACTION,
        bbox_reg_weights=tuple(head.BBOX_REG_WEIGHTS),
        score_thresh=roi.SCORE_THRESH_TEST,
        nms_thresh=roi.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
    )


def _size_divisible(cfg: CfgNode, backbone: SimpleFeaturePyramid) -> int:
    # The top level counts: torchvision infers strides as image size / map size.
    needed = max(backbone.size_divisibility, *backbone.strides.values())
    square = cfg.MODEL.VIT.SQUARE_PAD
    if square % needed:
        raise ConfigError(
            f"MODEL.VIT.SQUARE_PAD is {square} px; it must be a multiple of {needed}, the coarsest "
            "stride, or 0"
        )
    return square or needed


def _anchors(cfg: CfgNode, backbone: SimpleFeaturePyramid) -> ExactAnchors:
    levels = list(backbone.strides)
    if list(cfg.MODEL.RPN.IN_FEATURES) != levels:
        raise ConfigError(
            f"MODEL.RPN.IN_FEATURES is {cfg.MODEL.RPN.IN_FEATURES}; torchvision's RPN reads every "
            f"level of the pyramid: write {levels}, or change MODEL.VIT.SCALE_FACTORS"
        )
    per_level = {}
    for name in ("SIZES", "ASPECT_RATIOS"):
        values = tuple(map(tuple, cfg.MODEL.ANCHOR_GENERATOR[name]))
        if len(values) not in (1, len(levels)) or len({*map(len, values)}) != 1:
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR.{name} is {cfg.MODEL.ANCHOR_GENERATOR[name]}; give one "
                f"list for all levels or one for each of {levels}, all of equal length"
            )
        per_level[name] = values * len(levels) if len(values) == 1 else values
    return ExactAnchors(per_level["SIZES"], per_level["ASPECT_RATIOS"])


def _pooled_strides(cfg: CfgNode, backbone: SimpleFeaturePyramid) -> dict[str, int]:
    names, levels = list(cfg.MODEL.ROI_HEADS.IN_FEATURES), list(backbone.strides)
    start = levels.index(names[0]) if names and names[0] in levels else 0
    if not names or names != levels[start : start + len(names)]:
        raise ConfigError(
            f"MODEL.ROI_HEADS.IN_FEATURES is {names}; give neighbouring levels of {levels}, from "
            "fine to coarse"
        )
    return {name: backbone.strides[name] for name in names}
