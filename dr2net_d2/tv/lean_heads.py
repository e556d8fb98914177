"""torchvision's RPN and box head, storing little for their backward, with the same values."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import box_iou

from dr2net_d2.core.lean_chain import autocast_without_cache, has_inner_hooks, lean_chain
from dr2net_d2.core.sampled import (
    MATCHED_AT_ONCE,
    best_matches,
    is_sparse,
    predictions_at,
    with_gradient_of,
)


class LeanRegionProposalNetwork(RegionProposalNetwork):
    """``RegionProposalNetwork`` with an ``RPNHead`` that learns from what sampled anchors see.

    Dense predictions are made without gradients, and equal torchvision's. Where images are so
    small that the sampled anchors see all of them, training is torchvision's.
    """

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        maps = list(features.values())
        sparse = is_sparse(maps, self.fg_bg_sampler.batch_size_per_image, len(self.head.conv))
        if targets is None or not (self.training and torch.is_grad_enabled() and sparse):
            return super().forward(images, features, targets)
        with torch.no_grad(), autocast_without_cache(maps[0].device):
            logits, deltas = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        counts = [level[0].numel() for level in logits]
        logits, deltas = concat_box_prediction_layers(logits, deltas)
        proposals = self.box_coder.decode(deltas, anchors).view(len(anchors), -1, 4)
        boxes, _ = self.filter_proposals(proposals, logits, images.image_sizes, counts)

        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        wanted = torch.cat(self.box_coder.encode(matched, anchors))
        return boxes, self.sampled_losses(maps, logits[:, 0], deltas, labels, wanted)

    def sampled_losses(
        self,
        maps: list[Tensor],
        logits: Tensor,
        deltas: Tensor,
        labels: list[Tensor],
        wanted: Tensor,
    ) -> dict[str, Tensor]:
        """The losses on a sample of anchors, whose graph covers only what these anchors see.

        Args:
            maps: (N, C, H, W) per level.
            logits, deltas: dense predictions, (N * anchors,) and (N * anchors, 4).
            labels: 1 positive, 0 negative, -1 ignored; (anchors,) per image.
            wanted: regression targets, (N * anchors, 4).
        """
        masks = [torch.cat(masks) for masks in self.fg_bg_sampler(labels)]
        positive, negative = (mask.nonzero()[:, 0] for mask in masks)
        sampled = torch.cat([positive, negative])
        image, anchor = sampled // len(labels[0]), sampled % len(labels[0])
        hidden = [block[0] for block in self.head.conv]
        outputs = (self.head.cls_logits, self.head.bbox_pred)
        own_logits, own_deltas = predictions_at(hidden, outputs, maps, image, anchor)
        logits = with_gradient_of(logits[sampled], own_logits[:, 0])
        deltas = with_gradient_of(deltas[positive], own_deltas[: len(positive)])
        box_loss = F.smooth_l1_loss(deltas, wanted[positive], beta=1 / 9, reduction="sum")
        return {
            "loss_objectness": F.binary_cross_entropy_with_logits(
                logits, torch.cat(labels)[sampled]
            ),
            "loss_rpn_box_reg": box_loss / len(sampled),
        }

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """torchvision's assignment, with the IoUs of ``MATCHED_AT_ONCE`` pairs at a time.

        Returns:
            Labels 1, 0 or -1 (anchors,) and boxes to regress to (anchors, 4), per image.
        """
        labels, boxes = [], []
        for candidates, target in zip(anchors, targets, strict=True):
            objects = target["boxes"]
            if len(objects) * len(candidates) <= MATCHED_AT_ONCE:
                (label,), (matched,) = super().assign_targets_to_anchors([candidates], [target])
            else:
                matches = _match(self.proposal_matcher, objects, candidates)
                matched = objects[matches.clamp(min=0)]
                label = (matches >= 0).to(torch.float32)
                label[matches == Matcher.BETWEEN_THRESHOLDS] = -1
            labels.append(label)
            boxes.append(matched)
        return labels, boxes


def _match(matcher: Matcher, objects: Tensor, anchors: Tensor) -> Tensor:
    """``matcher`` applied to the IoUs of one or more objects with ``anchors``, in chunks."""
    iou, best, is_best = best_matches(
        box_iou, objects, anchors, max(MATCHED_AT_ONCE // len(objects), 1)
    )
    by_threshold = copy.copy(matcher)
    by_threshold.allow_low_quality_matches = False
    matches = by_threshold(iou[None])
    kept = matches >= 0
    if matcher.allow_low_quality_matches:
        kept |= is_best
    return torch.where(kept, best, matches)


class LeanBoxHead(FastRCNNConvFCHead):
    """``FastRCNNConvFCHead`` that recomputes every other convolution in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        if has_inner_hooks(self):
            return super().forward(x)
        blocks = [block if isinstance(block, torch.nn.Sequential) else [block] for block in self]
        return lean_chain([layer for block in blocks for layer in block], x, products=2)
