"""Detectron2's detectors in use: prediction, test-time augmentation, images of any size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone import vit as stock
from fvcore.common.config import CfgNode
from torch import nn

from dr2net_d2.config import head_section
from dr2net_d2.d2.backbone import StockPyramid
from dr2net_d2.d2.checkpointer import Dr2NetCheckpointer
from dr2net_d2.d2.data import register_dataset
from dr2net_d2.d2.lean import build_detector
from dr2net_d2.d2.slicing import check_tiles, sliced
from dr2net_d2.errors import ConfigError
from dr2net_d2.inference import Detections, category_names, load_weights


def load_detector(cfg: CfgNode) -> nn.Module:
    """The trained detector of a config, in evaluation mode on MODEL.DEVICE.

    Raises:
        UserError: the config cannot be used, or its weights are not those of the whole detector.
    """
    return load_weights(Dr2NetCheckpointer, build_detector(cfg), cfg.MODEL.WEIGHTS)


class Predictor(DefaultPredictor):
    """``DefaultPredictor`` that knows its categories, and loads all of its weights or refuses.

    It goes over tiles where TEST.TILES is enabled.

    Raises:
        UserError: see ``load_detector``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg.clone()
        check_tiles(cfg)
        self.model = sliced(cfg, load_detector(self.cfg))
        sizes = cfg.INPUT
        # Tiles are resized one by one; 0 keeps an image as it is.
        shortest = 0 if cfg.TEST.TILES.ENABLED else sizes.MIN_SIZE_TEST
        self.aug = ResizeShortestEdge([shortest] * 2, sizes.MAX_SIZE_TEST)
        self.input_format = sizes.FORMAT
        self.class_names = category_names(cfg, cfg.MODEL[head_section(cfg)].NUM_CLASSES, _names)

    def detect(self, image: np.ndarray) -> Detections:
        """Find objects in (H, W, 3) uint8, BGR, of any size.

        Raises:
            ConfigError: the detector of the config gives something else than instances.
        """
        found = self(image)
        if "instances" not in found:
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE {self.cfg.MODEL.META_ARCHITECTURE} gives "
                f"{', '.join(found)} and no instances; use a detector of objects"
            )
        instances = found["instances"].to("cpu")
        return Detections(
            instances.pred_boxes.tensor.numpy(),
            instances.scores.numpy(),
            instances.pred_classes.numpy(),
            instances.pred_masks.numpy() if instances.has("pred_masks") else None,
        )


def check_tta(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse TEST.AUG for a detector that Detectron2 cannot augment.

    Raises:
        ConfigError: names the key that stands in the way.
    """
    reason = None
    if getattr(type(model), "inference", None) is not GeneralizedRCNN.inference:
        reason = f"a GeneralizedRCNN, and MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}"
    elif not cfg.TEST.AUG.MIN_SIZES:
        reason = "at least one size in TEST.AUG.MIN_SIZES, which is empty"
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            reason = f"a detector of boxes and masks alone, and MODEL.{key} is True"
    if reason:
        raise ConfigError(f"TEST.AUG.ENABLED needs {reason}; set TEST.AUG.ENABLED False")


def without_cropping(model: nn.Module) -> nn.Module:
    """Let Detectron2's own simple feature pyramids pad images beyond ``square_pad``, not cut them.

    Our pyramids never cut. Detectron2's, which LazyConfigs have, drops what lies beyond its square
    without a word, whatever ViT it holds.

    Args:
        model: a detector, changed in place: both sides are padded to multiples of the square, or
            of the coarsest stride where there is none.

    Returns:
        ``model``.
    """
    module: Any
    for module in model.modules():
        if type(module) is stock.SimpleFeaturePyramid:
            asked = module.padding_constraints
            strides = [shape.stride for shape in module.net.output_shape().values()]
            stride = max(asked["size_divisiblity"], *strides)
            square = math.ceil(asked["square_size"] / stride) * stride
            module.__class__ = StockPyramid
            module.size_divisibility = square or stride
    return model


def _names(dataset: str) -> tuple[str, ...]:
    # Detectron2 knows its own without their files, which are seldom where a detector is used.
    return tuple(MetadataCatalog.get(dataset).get("thing_classes", ())) or register_dataset(dataset)
