"""FCOS for YAML configs: Detectron2 has the detector, but only for LazyConfigs."""

from __future__ import annotations

from typing import Any

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos
from fvcore.common.config import CfgNode


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's ``FCOS`` (Tian et al., arXiv 1904.01355), built from the keys of MODEL.FCOS."""

    @configurable
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        keys = cfg.MODEL.FCOS
        shapes = backbone.output_shape()
        head = fcos.FCOSHead(
            input_shape=[shapes[name] for name in keys.IN_FEATURES],
            num_classes=keys.NUM_CLASSES,
            conv_dims=[shapes[keys.IN_FEATURES[0]].channels] * keys.NUM_CONVS,
            prior_prob=keys.PRIOR_PROB,
            norm=keys.NORM,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": keys.IN_FEATURES,
            "num_classes": keys.NUM_CLASSES,
            "center_sampling_radius": keys.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": keys.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": keys.FOCAL_LOSS_GAMMA,
            "test_score_thresh": keys.SCORE_THRESH_TEST,
            "test_topk_candidates": keys.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": keys.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }
