"""Detectron2's RPN and ROI heads, which keep less for their backward and compute the same."""

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
from dr2net_d2.d2.replacement import Replacement, replace_modules
from dr2net_d2.errors import detector_being_built

logger = logging.getLogger(__name__)

# Norms without running statistics, which recomputation would update a second time.
_NORMS = (type(None), LayerNorm, nn.GroupNorm, FrozenBatchNorm2d)


class LeanRPN(Replacement, RPN):
    """``RPN`` that in training keeps and differentiates only what the sampled anchors depend on.

    The dense predictions have the stock values, but are made without gradients. The head is called
    as usual, so its hooks see predictions without a graph. Where images are so small that the
    samples depend on everything, training is the stock one.

    Args:
        rpn: a built RPN whose head is a ``StandardRPNHead``.
    """

    def __init__(self, rpn: RPN) -> None:
        super().__init__(rpn)
        for module in self.modules():
            if isinstance(module, Conv2d) and type(module.activation) is nn.ReLU:
                # The backward of a convolution does not need its output.
                module.activation.inplace = True

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
        # The order of anchors is level, row, column, then the anchors of a position.
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
        """Labels (N, anchors) -> image indices and anchor indices of the anchors in the loss."""
        return (labels >= 0).nonzero(as_tuple=True)

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """``RPN``'s labels and boxes, computed from ``MATCHED_AT_ONCE`` pairs at a time.

        Returns:
            For each image, labels 1, 0 or -1 (anchors,) and boxes to regress to (anchors, 4).
        """
        all_anchors = Boxes.cat(anchors)
        num_objects = max(len(instances) for instances in gt_instances)
        few = num_objects * len(all_anchors) <= MATCHED_AT_ONCE
        if few or self.anchor_boundary_thresh >= 0:
            return super().label_and_sample_anchors(anchors, gt_instances)
        labels, boxes = [], []
        for instances in gt_instances:
            matches, label = _match(self.anchor_matcher, instances.gt_boxes, all_anchors)
            labels.append(self._subsample_labels(label))
            objects = instances.gt_boxes.tensor
            if len(objects):
                boxes.append(objects[matches])
            else:
                boxes.append(all_anchors.tensor.new_zeros(len(all_anchors), 4))
        return labels, boxes


def _with_gradient(dense: list[Tensor], at: tuple[Tensor, ...], values: Tensor) -> Tensor:
    """Concatenate predictions of all levels, with the gradients of ``values`` at some anchors.

    Args:
        dense: predictions without gradients, (N, anchors of a level, ...) for each level.
        at: image indices and anchor indices, (n,) each.
        values: the same predictions with gradients, (n, ...).
    """
    levels = torch.cat(dense, dim=1)
    return levels.index_put(at, with_gradient_of(levels[at], values))


def _match(matcher: Matcher, objects: Boxes, anchors: Boxes) -> tuple[Tensor, Tensor]:
    """``matcher``'s indices and labels for the IoUs of ``objects`` with ``anchors``, in chunks."""
    if not len(objects):
        return matcher(pairwise_iou(objects, anchors))
    iou, matches, is_best = best_matches(
        lambda some_objects, some_anchors: pairwise_iou(Boxes(some_objects), Boxes(some_anchors)),
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


class LeanBoxHead(Replacement, FastRCNNConvFCHead):
    """``FastRCNNConvFCHead`` that recomputes every other convolution in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        if has_inner_hooks(self):
            return super().forward(x)
        return lean_chain(_layers(self), x, products=2)


class LeanMaskHead(Replacement, MaskRCNNConvUpsampleHead):
    """``MaskRCNNConvUpsampleHead`` that recomputes every other convolution in the backward."""

    def layers(self, x: Tensor) -> Tensor:
        if has_inner_hooks(self):
            return super().layers(x)
        return lean_chain(_layers(self), x, products=2)


def _layers(head: nn.Sequential) -> list[Layer]:
    layers: list[Layer] = []
    for module in head:
        if isinstance(module, Conv2d) and (module.norm or module.activation):
            steps = (BareConvolution(module), module.norm, module.activation)
            layers += [step for step in steps if step is not None]
        else:
            layers.append(module)
    return layers


def build_detector(cfg: CfgNode) -> nn.Module:
    """Detectron2's ``build_model``; a detector on a reversible backbone is also made lean.

    Args:
        cfg: MODEL.DR2NET.LEAN names the parts to make lean.

    Raises:
        ConfigError: keys of MODEL do not fit together.
    """
    parts = lean_parts(cfg)
    with detector_being_built():
        model = build_model(cfg)
    return make_lean(model, parts) if reversible_stacks(model) else model


def make_lean(model: nn.Module, parts: Collection[str]) -> nn.Module:
    """Make parts of a built detector keep less for their backward, exactly, and log which.

    Parameters, state dict, values and gradients stay the same, up to rounding in the gradients.
    Our pyramid can be made lean, and modules of exactly Detectron2's own classes; other modules,
    and heads whose norms keep running statistics, stay as they are.

    Args:
        model: a detector, changed in place.
        parts: some of ``dr2net_d2.config.LEAN_PARTS``.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown part.
    """
    if unknown := set(parts) - set(LEAN_PARTS):
        raise ValueError(f"parts has {sorted(unknown)}; use some of {list(LEAN_PARTS)}")
    replacements: dict[nn.Module, nn.Module] = {}
    lean_names: list[str] = []
    stock_names: list[str] = []
    for name, module in model.named_modules():
        if _part(name, module) not in parts:
            continue
        lean = lean_version(module)
        if lean is None:
            stock_names.append(f"{name} ({type(module).__name__})")
        else:
            replacements[module] = lean
            lean_names.append(f"{name} ({type(lean).__name__})")
    replace_modules(model, replacements)
    logger.info("lean: %s", ", ".join(lean_names) or "nothing")
    if stock_names:
        logger.info("not lean, of another kind: %s", ", ".join(stock_names))
    return model


def _part(name: str, module: nn.Module) -> str | None:
    """Which part of a detector a module is, by its type or its name; None for no such part."""
    if isinstance(module, SimpleFeaturePyramid):
        return "pyramid"
    if isinstance(module, RPN) or name.endswith("proposal_generator"):
        return "rpn"
    *_, parent, last = ["", "", *name.split(".")]
    # The heads of a cascade are numbered in a list that has the name of the head.
    head = parent if last.isdigit() else last
    if head in ("box_head", "mask_head", "keypoint_head") and not isinstance(module, nn.ModuleList):
        return "roi"
    return None


def lean_version(module: nn.Module) -> nn.Module | None:
    """The lean module to use in place of a part of a detector, or None if there is none for it.

    A part that can be lean by itself, or is already, is its own lean version.
    """
    if isinstance(module, SimpleFeaturePyramid):
        module.lean = True
        return module
    if isinstance(module, (LeanRPN, LeanBoxHead, LeanMaskHead)):
        return module
    if type(module) is RPN and type(module.rpn_head) is StandardRPNHead:
        return LeanRPN(module)
    convolutions = [child for child in module.modules() if isinstance(child, Conv2d)]
    if not all(isinstance(convolution.norm, _NORMS) for convolution in convolutions):
        return None
    if type(module) is FastRCNNConvFCHead:
        return LeanBoxHead(module)
    if type(module) is MaskRCNNConvUpsampleHead:
        return LeanMaskHead(module)
    return None
