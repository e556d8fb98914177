"""Training with the torchvision engine, for the planner."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dr2net_d2.plan.engine import PlannedEngine
from dr2net_d2.plan.simulation import DefiniteSizes
from dr2net_d2.tv.model import build_model


class TorchvisionEngine(PlannedEngine):
    """What ``tv.Training`` trains; there is no stock ViT."""

    keeps_inputs = True

    def build(self, cfg: CfgNode, stock: bool) -> nn.Module:
        return build_model(cfg)

    def stride(self, model: Any) -> int:
        return model.transform.size_divisible

    def sample_in_full(self, model: Any, sizes: DefiniteSizes) -> None:
        rpn, roi, pooler = model.rpn, model.roi_heads, model.roi_heads.box_roi_pool
        anchors, proposals = rpn.fg_bg_sampler, roi.fg_bg_sampler
        taken, positive = anchors.batch_size_per_image, anchors.positive_fraction
        one_level = sizes.even(len(rpn.anchor_generator.sizes))
        # The RPN concatenates the images' sample masks, first the positive, then the negative.
        shares = itertools.cycle((positive, 1 - positive))
        per_image = sampled = 0  # anchors

        def of_one_image(mask: Tensor) -> int:
            nonlocal per_image, sampled
            per_image, sampled = mask.numel(), 0
            return taken

        def of_all_images(mask: Tensor) -> int:
            nonlocal sampled
            if mask.numel() == sampled:
                return one_level(mask)
            chosen = round(mask.numel() // per_image * min(taken, per_image) * next(shares))
            sampled += chosen
            return chosen

        sizes.during(rpn, "forward", of_all_images)
        sizes.during(rpn, "fg_bg_sampler", of_one_image)
        sizes.during(rpn, "assign_targets_to_anchors", lambda mask: taken)
        sizes.during(rpn, "filter_proposals", Tensor.numel)
        fraction = proposals.positive_fraction
        sizes.during(roi, "forward", lambda mask: int(mask.numel() * fraction))
        sizes.during(roi, "select_training_samples", lambda mask: proposals.batch_size_per_image)
        sizes.during(pooler, "forward", sizes.even(len(pooler.strides)))

    def inputs(self, cfg: CfgNode, image_size: int, batch_size: int, boxes: Tensor) -> list[Any]:
        channels = len(cfg.MODEL.PIXEL_MEAN)
        images = [torch.empty(channels, image_size, image_size) for _ in range(batch_size)]
        labels = torch.tensor([1] * len(boxes))
        return [images, [{"boxes": boxes.clone(), "labels": labels.clone()} for _ in images]]
