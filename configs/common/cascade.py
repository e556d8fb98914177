"""From Mask R-CNN to Cascade Mask R-CNN (arXiv 1712.00726)."""

from detectron2.config import LazyCall as L
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads

STAGES = ((0.5, (10, 10, 5, 5)), (0.6, (20, 20, 10, 10)), (0.7, (30, 30, 15, 15)))
"""IoU from which a proposal is an object, weights of the box regression."""


def use_cascade(model):
    """Give a Mask R-CNN three box heads, each for better boxes than the one before, in place."""
    heads = model.roi_heads
    box_head, box_predictor = heads.pop("box_head"), heads.pop("box_predictor")
    del heads.proposal_matcher
    box_predictor.cls_agnostic_bbox_reg = True
    # One level deeper than before.
    box_predictor.num_classes = "${...num_classes}"
    heads.update(
        _target_=CascadeROIHeads,
        box_heads=[box_head] * len(STAGES),
        box_predictors=[box_predictor] * len(STAGES),
        proposal_matchers=[
            L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
            for iou, _ in STAGES
        ],
    )
    for predictor, (_, weights) in zip(heads.box_predictors, STAGES, strict=True):
        predictor.box2box_transform.weights = weights
