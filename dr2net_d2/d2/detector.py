"""Detectron2's RPN and ROI heads with little kept for their backward, exactly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dr2net_d2.config import LEAN_PARTS, lean_parts
from dr2net_d2.core import SimpleFeaturePyramid, reversible_stacks
from dr2net_d2.core.lean_chain import (
    BareConvolution,
    Layer,
    autocast_without_cache,
    has_inner_hooks,
    lean_chain,
)
from dr2net_d2.core.sampled import (
    MATCHED_AT_ONCE,
    best_matches,
    is_sparse,
    predictions_at,
    with_gradient_of,
)
from dr2net_d2.errors import detector_being_built

logger = logging.getLogger(__name__)

# Without running statistics, which a second run would update again.
_NORMS = (type(None), LayerNorm, nn.GroupNorm, FrozenBatchNorm2d)


class LeanRPN(RPN):
    """``RPN`` whose training keeps and differentiates only what the sampled anchors see.

    The dense predictions are made without gradients; their values are the stock ones. The head is
    called as always, so its hooks see predictions without a graph. Where images are so small that
    the samples see everything, training is the stock one.
    """

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        maps = [features[name] for name in self.in_features]
        head = self.rpn_head
        hidden = [head.conv] if isinstance(head.conv, nn.Conv2d) else list(head.conv)
        sparse = is_sparse(maps, self.batch_size_per_image, len(hidden))
        if not (self.training and torch.is_grad_enabled() and sparse):
            return super().forward(images, features, gt_instances)
        anchors = self.anchor_generator(maps)
        with torch.no_grad(), autocast_without_cache(maps[0].device):
            logits, deltas = head(maps)
        # Anchors are numbered in the order level, row, column, kind.
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        box_dim = self.anchor_generator.box_dim
        deltas = [
            x.unflatten(1, (-1, box_dim)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas
        ]
        assert gt_instances is not None, "training needs gt_instances"
        labels, boxes = self.label_and_sample_anchors(anchors, gt_instances)
        sampled = self.sampled_anchors(torch.stack(labels))
        outputs = (head.objectness_logits, head.anchor_deltas)
        own_logits, own_deltas = predictions_at(hidden, outputs, maps, *sampled)
        losses = self.losses(
            anchors,
            [_with_gradient(logits, sampled, own_logits[:, 0])],
            labels,
            [_with_gradient(deltas, sampled, own_deltas)],
            boxes,
        )
        return self.predict_proposals(anchors, logits, deltas, images.image_sizes), losses

    def sampled_anchors(self, labels: Tensor) -> tuple[Tensor, ...]:
        """Labels (N, anchors) -> indices of image and anchor of those that the loss reads."""
        return (labels >= 0).nonzero(as_tuple=True)

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As ``RPN``'s, with IoUs of ``MATCHED_AT_ONCE`` pairs at a time.

        Returns:
            labels 1, 0 or -1 (anchors,) and boxes to regress to (anchors, 4), per image.
        """
        together = Boxes.cat(anchors)
        most = max(len(instances) for instances in gt_instances)
        if most * len(together) <= MATCHED_AT_ONCE or self.anchor_boundary_thresh >= 0:
            return super().label_and_sample_anchors(anchors, gt_instances)
        labels, boxes = [], []
        for instances in gt_instances:
            matches, label = _match(self.anchor_matcher, instances.gt_boxes, together)
            labels.append(self._subsample_labels(label))
            objects = instances.gt_boxes.tensor
            boxes.append(
                objects[matches] if len(objects) else together.tensor.new_zeros(len(together), 4)
            )
        return labels, boxes


def _with_gradient(dense: list[Tensor], at: tuple[Tensor, ...], values: Tensor) -> Tensor:
    """All levels of ``dense`` in one, with the gradients of ``values`` at some anchors."""
    together = torch.cat(dense, dim=1)
    return together.index_put(at, with_gradient_of(together[at], values))


def _match(matcher: Matcher, objects: Boxes, anchors: Boxes) -> tuple[Tensor, Tensor]:
    """What ``matcher`` gives for the IoUs of ``objects`` with ``anchors``: indices and labels."""
    if not len(objects):
        return matcher(pairwise_iou(objects, anchors))
    iou, matches, is_best = best_matches(
        lambda some, part: pairwise_iou(Boxes(some), Boxes(part)),
        objects.tensor,
        anchors.tensor,
        max(MATCHED_AT_ONCE // len(objects), 1),
    )
    by_threshold = copy.copy(matcher)
    by_threshold.allow_low_quality_matches = False
    _, labels = by_threshold(iou[None])
    if matcher.allow_low_quality_matches:
        labels[is_best] = 1
    return matches, labels


class LeanBoxHead(FastRCNNConvFCHead):
    """``FastRCNNConvFCHead`` that runs every other convolution again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        if has_inner_hooks(self):
            return super().forward(x)
        return lean_chain(_layers(self), x, products=2)


class LeanMaskHead(MaskRCNNConvUpsampleHead):
    """``MaskRCNNConvUpsampleHead`` that runs every other convolution again in the backward."""

    def layers(self, x: Tensor) -> Tensor:
        if has_inner_hooks(self):
            return super().layers(x)
        return lean_chain(_layers(self), x, products=2)


def _layers(head: nn.Sequential) -> list[Layer]:
    layers: list[Layer] = []
    for module in head:
        if isinstance(module, Conv2d) and (module.norm or module.activation):
            parts = (BareConvolution(module), module.norm, module.activation)
            layers += [part for part in parts if part is not None]
        else:
            layers.append(module)
    return layers


def build_detector(cfg: CfgNode) -> nn.Module:
    """Detectron2's ``build_model``; made lean as MODEL.DR2NET.LEAN says on a reversible backbone.

    Raises:
        ConfigError: keys of MODEL that do not fit together.
    """
    parts = lean_parts(cfg)
    with detector_being_built():
        model = build_model(cfg)
    return make_lean(model, parts) if reversible_stacks(model) else model


def make_lean(model: nn.Module, parts: Collection[str]) -> nn.Module:
    """Let parts of a built detector keep less for their backward, exactly, and log which.

    Parameters, state dict, values and gradients stay what they are, up to the rounding of
    gradients. Only modules of exactly Detectron2's own classes change (and our pyramid); others,
    and heads whose norms keep running statistics, stay as they are.

    Args:
        model: changed in place.
        parts: of ``dr2net_d2.config.LEAN_PARTS``.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown part.
    """
    if unknown := set(parts) - set(LEAN_PARTS):
        raise ValueError(f"parts has {sorted(unknown)}; use some of {list(LEAN_PARTS)}")
    changed: list[str] = []
    left: list[str] = []
    for name, module in model.named_modules():
        part = _part(name, module)
        if part not in parts:
            continue
        if isinstance(module, SimpleFeaturePyramid):
            module.lean = True
        elif lean := _lean_class(module):
            module.__class__ = lean
        (changed if _is_lean(module) else left).append(f"{name} ({type(module).__name__})")
    logger.info("lean: %s", ", ".join(changed) or "nothing")
    if left:
        logger.info("not lean, of another kind: %s", ", ".join(left))
    return model


def _part(name: str, module: nn.Module) -> str | None:
    """The part of a detector that a module is, by its type or its place."""
    if isinstance(module, SimpleFeaturePyramid):
        return "pyramid"
    if isinstance(module, RPN) or name.endswith("proposal_generator"):
        return "rpn"
    *_, place, last = ["", "", *name.split(".")]
    head = place if last.isdigit() else last
    if head in ("box_head", "mask_head", "keypoint_head") and not isinstance(module, nn.ModuleList):
        return "roi"
    return None


def _is_lean(module: nn.Module) -> bool:
    return isinstance(module, (SimpleFeaturePyramid, LeanRPN, LeanBoxHead, LeanMaskHead))


def _lean_class(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is RPN and type(module.rpn_head) is StandardRPNHead:
        for part in module.modules():
            if isinstance(part, Conv2d) and type(part.activation) is nn.ReLU:
                part.activation.inplace = True  # the convolution does not need what it gave
        return LeanRPN
    heads: dict[type[nn.Module], type[nn.Module]] = {
        FastRCNNConvFCHead: LeanBoxHead,
        MaskRCNNConvUpsampleHead: LeanMaskHead,
    }
    convolutions = [part for part in module.modules() if isinstance(part, Conv2d)]
    if all(isinstance(part.norm, _NORMS) for part in convolutions):
        return heads.get(type(module))
    return None
