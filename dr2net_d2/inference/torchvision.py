"""``Predictor`` for the detectors of torchvision."""

from __future__ import annotations

import numpy as np
import torch
from fvcore.common.config import CfgNode

from dr2net_d2.config import build_slicing, category_names
from dr2net_d2.inference.detections import Detections, Predictor
from dr2net_d2.tv.dataset import as_tensor, load_split
from dr2net_d2.tv.predictor import detect, load_detector


class TorchvisionPredictor(Predictor):
    """A ``Predictor`` around torchvision's model.

    Attributes:
        model: the detector, in evaluation mode on MODEL.DEVICE.

    Raises:
        UserError: see ``tv.predictor.load_detector``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self._slicing = build_slicing(cfg)
        self.model = load_detector(cfg)
        self.class_names = category_names(
            cfg, cfg.MODEL.ROI_HEADS.NUM_CLASSES, lambda name: load_split(name).content.categories
        )

    @torch.no_grad()
    def detect(self, image: np.ndarray) -> Detections:
        """See ``Predictor.detect``."""
        pixels = as_tensor(image, self._cfg.INPUT.FORMAT).to(self._cfg.MODEL.DEVICE)
        found = detect(self.model, pixels, self._slicing)
        return Detections(
            boxes=found.boxes.cpu().numpy(),
            scores=found.scores.cpu().numpy(),
            labels=found.labels.cpu().numpy(),
        )
