"""Detectron2's ``DefaultPredictor`` with strict loading, category names and tiles."""

from __future__ import annotations

from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from fvcore.common.config import CfgNode
from torch import nn

from dr2net_d2.config import category_names, head_section
from dr2net_d2.d2.checkpointer import Dr2NetCheckpointer
from dr2net_d2.d2.data import register_dataset
from dr2net_d2.d2.detector import build_detector
from dr2net_d2.d2.sliced_detector import check_tiles, sliced
from dr2net_d2.weights import load_weights


def load_detector(cfg: CfgNode) -> nn.Module:
    """Build and load the trained detector of a config, in evaluation mode on MODEL.DEVICE.

    Raises:
        UserError: the config cannot be used, or MODEL.WEIGHTS lacks a part of the detector.
    """
    return load_weights(Dr2NetCheckpointer, build_detector(cfg), cfg.MODEL.WEIGHTS)


class Predictor(DefaultPredictor):
    """``DefaultPredictor`` that knows its categories, and loads all of its weights or none.

    It goes over tiles if TEST.TILES is enabled.

    Args:
        cfg: the config of the detector.

    Attributes:
        class_names: the names of the categories, or their numbers if no dataset has the names.

    Raises:
        UserError: see ``load_detector``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg.clone()
        check_tiles(cfg)
        self.model = sliced(cfg, load_detector(self.cfg))
        sizes = cfg.INPUT
        # Tiles are resized one by one, so the image keeps its size, which 0 asks for.
        shortest = 0 if cfg.TEST.TILES.ENABLED else sizes.MIN_SIZE_TEST
        self.aug = ResizeShortestEdge([shortest] * 2, sizes.MAX_SIZE_TEST)
        self.input_format = sizes.FORMAT
        self.class_names = category_names(cfg, cfg.MODEL[head_section(cfg)].NUM_CLASSES, _names)


def _names(dataset: str) -> tuple[str, ...]:
    # Detectron2 knows the names of its own datasets without their files, which may not be here.
    return tuple(MetadataCatalog.get(dataset).get("thing_classes", ())) or register_dataset(dataset)
