"""Detectron2's Mask R-CNN with ViTDet-B, made reversible by the classes of its backbone."""

from detectron2.config import LazyCall as L

from dr2net_d2.config import LEAN_PARTS
from dr2net_d2.core import CoefficientSchedule
from dr2net_d2.d2 import Dr2NetBackbone, Dr2NetPyramid
from dr2net_d2.d2.zoo import zoo_config

model = zoo_config("common/models/mask_rcnn_vitdet.py").model
model.backbone._target_ = Dr2NetPyramid
model.backbone.net._target_ = Dr2NetBackbone

dr2net = dict(
    # How alpha and beta move during training.
    schedule=L(CoefficientSchedule)(
        kind="convex", start_beta=1 / 16, end_beta=1 / 2, duration=0.5, updates=0
    ),
    # Parts around the backbone that keep little for their backward, exactly.
    lean=[*LEAN_PARTS],
    # Patterns of model keys that a detector checkpoint may lack or have in another shape.
    allow_partial=[],
)
