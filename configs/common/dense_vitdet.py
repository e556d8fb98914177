"""Detectron2's RetinaNet or FCOS on our ViTDet-B, with levels of stride 8 to 128."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from dr2net_d2.d2.zoo import zoo_config

from .mask_rcnn_vitdet import model as mask_rcnn


def dense_detector(name):
    """The model "retinanet" or "fcos"."""
    model = zoo_config(f"common/models/{name}.py").model
    model.backbone = mask_rcnn.backbone
    model.backbone.scale_factors = (2.0, 1.0, 0.5)
    model.backbone.top_block = L(LastLevelP6P7)(in_channels=256, out_channels=256, in_feature="p5")
    model.pixel_mean, model.pixel_std = mask_rcnn.pixel_mean, mask_rcnn.pixel_std
    if "input_format" in model:
        model.input_format = mask_rcnn.input_format
    return model
