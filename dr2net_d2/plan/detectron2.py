"""Detectron2's detectors for the memory planner: built without weights, fed, sampled in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from torch import Tensor, nn

import dr2net_d2.d2.backbone  # noqa: F401  registers its builders
from dr2net_d2.d2.detector import build_detector
from dr2net_d2.errors import ConfigError
from dr2net_d2.plan.simulation import DefiniteSizes

STOCK_VIT = True
"""Whether the engine has a ViT of its own."""

KEEPS_INPUTS = False
"""Whether the trainer holds what it has moved to the GPU until the backward has ended."""


def build(cfg: CfgNode, stock: bool) -> nn.Module:
    """The detector that ``Trainer`` trains, or the same on Detectron2's own ViT, on meta.

    Raises:
        ConfigError: see ``build_detector``; a detector whose sampling the planner does not know.
    """
    cfg.MODEL.DEVICE = "meta"
    name = cfg.MODEL.BACKBONE.NAME.replace("build_dr2net_", "build_")
    cfg.MODEL.BACKBONE.NAME = name if stock else name.replace("build_", "build_dr2net_")
    model: Any = build_detector(cfg)
    parts = (("", GeneralizedRCNN), ("proposal_generator", RPN), ("roi_heads", StandardROIHeads))
    for path, known in parts:
        found = type(model.get_submodule(path))
        if not issubclass(found, known):
            raise ConfigError(
                f"MODEL: the detector has a {found.__name__}, whose sampling the planner does not "
                f"know; it plans for a {known.__name__}"
            )
    if model.roi_heads.keypoint_on:
        raise ConfigError("MODEL.KEYPOINT_ON is True; the planner knows boxes and masks: turn off")
    return model


def stride(model: Any) -> int:
    """Px that images are padded to whole multiples of."""
    return model.backbone.padding_constraints["size_divisibility"]


def sample_in_full(model: Any, sizes: DefiniteSizes) -> None:
    """Let every image give as many samples to RPN and ROI heads as the config allows."""
    rpn, roi = model.proposal_generator, model.roi_heads
    level = sizes.even(len(rpn.in_features))

    def anchors(mask: Tensor) -> int:
        """Of (images, anchors), those sampled; of (sampled,), those on a level."""
        return level(mask) if mask.dim() == 1 else len(mask) * rpn.batch_size_per_image

    sizes.during(rpn, "forward", anchors)
    sizes.during(rpn, "label_and_sample_anchors", lambda mask: rpn.batch_size_per_image)
    sizes.during(rpn, "predict_proposals", Tensor.numel)
    fraction = roi.positive_fraction
    sizes.during(roi, "forward", lambda mask: int(mask.numel() * fraction))
    sizes.during(roi, "label_and_sample_proposals", lambda mask: roi.batch_size_per_image)
    if isinstance(roi, CascadeROIHeads):
        sizes.during(roi, "_create_proposals_from_boxes", Tensor.numel)
    for pooler in model.modules():
        if isinstance(pooler, ROIPooler):
            levels = len(pooler.level_poolers)
            sizes.during(pooler, "forward", sizes.even(levels))


def inputs(cfg: CfgNode, image_size: int, batch_size: int, boxes: Tensor) -> list[Any]:
    """What the trainer calls the model with: images of a size, with the same boxes on each."""
    size = (image_size, image_size)

    def image() -> dict[str, Any]:
        truth = Instances(size, gt_boxes=Boxes(boxes.clone()))
        truth.gt_classes = torch.tensor([0] * len(boxes))
        if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "bitmask":
            truth.gt_masks = BitMasks(torch.empty(len(boxes), *size, dtype=torch.bool))
        elif cfg.MODEL.MASK_ON:
            truth.gt_masks = _Polygons(len(boxes))
        pixels = torch.empty(len(cfg.MODEL.PIXEL_MEAN), *size, dtype=torch.uint8)
        return {"image": pixels, "instances": truth}

    return [[image() for _ in range(batch_size)]]


@contextmanager
def training() -> Iterator[None]:
    """What the trainer runs the model in."""
    with EventStorage():
        yield


class _Polygons:
    """Stands for PolygonMasks, which live on the host; what they give to a GPU is as large."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, chosen: Tensor) -> _Polygons:
        return _Polygons(len(torch.empty(self._count)[chosen]))

    def to(self, *args: Any, **kwargs: Any) -> _Polygons:
        return self

    def crop_and_resize(self, boxes: Tensor, side: int) -> Tensor:
        return torch.empty(len(boxes), side, side, dtype=torch.bool)
