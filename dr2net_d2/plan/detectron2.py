"""Training with Detectron2, for the planner."""

from __future__ import annotations

from contextlib import AbstractContextManager
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
from dr2net_d2.plan.engine import PlannedEngine
from dr2net_d2.plan.simulation import DefiniteSizes

_PLANNED = {"": GeneralizedRCNN, "proposal_generator": RPN, "roi_heads": StandardROIHeads}
"""Submodule of the detector -> the class whose sampling is known, subclasses included."""


class Detectron2Engine(PlannedEngine):
    """What ``d2.Trainer`` trains."""

    keeps_inputs = False

    def build(self, cfg: CfgNode, stock: bool) -> nn.Module:
        cfg.MODEL.DEVICE = "meta"
        name = cfg.MODEL.BACKBONE.NAME.replace("build_dr2net_", "build_")
        cfg.MODEL.BACKBONE.NAME = name if stock else name.replace("build_", "build_dr2net_")
        model: Any = build_detector(cfg)
        for path, planned in _PLANNED.items():
            module = type(model.get_submodule(path))
            if not issubclass(module, planned):
                raise ConfigError(
                    f"MODEL: the detector has a {module.__name__}, and the planner does not know "
                    f"how it samples; use a {planned.__name__}"
                )
        if model.roi_heads.keypoint_on:
            raise ConfigError(
                "MODEL.KEYPOINT_ON is True, but the planner only knows boxes and masks; set it to "
                "False"
            )
        return model

    def stride(self, model: Any) -> int:
        return model.backbone.padding_constraints["size_divisibility"]

    def sample_in_full(self, model: Any, sizes: DefiniteSizes) -> None:
        rpn, roi = model.proposal_generator, model.roi_heads
        one_level = sizes.even(len(rpn.in_features))

        def anchors(mask: Tensor) -> int:
            """For an (images, anchors) mask, the samples; for a (samples,) mask, one level's."""
            return one_level(mask) if mask.dim() == 1 else len(mask) * rpn.batch_size_per_image

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
                sizes.during(pooler, "forward", sizes.even(len(pooler.level_poolers)))

    def inputs(self, cfg: CfgNode, image_size: int, batch_size: int, boxes: Tensor) -> list[Any]:
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

    def training(self) -> AbstractContextManager[object]:
        return EventStorage()


class _Polygons:
    """Stands in for ``PolygonMasks``: they stay on the host, and only their crops reach a GPU."""

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
