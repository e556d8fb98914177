"""torchvision's detectors as a ``Predictor`` of this wing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from fvcore.common.config import CfgNode

from dr2net_d2.config import build_slicing, category_names
from dr2net_d2.inference.detections import Detections
from dr2net_d2.tv.dataset import as_tensor, load_split
from dr2net_d2.tv.predictor import detect, load_detector


class TorchvisionPredictor:
    """A trained detector that knows its categories; it goes over tiles as TEST.TILES says.

    Raises:
        UserError: see ``load_detector``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self._slicing = build_slicing(cfg)
        self.model = load_detector(cfg)
        self.class_names: Sequence[str] = category_names(
            cfg, cfg.MODEL.ROI_HEADS.NUM_CLASSES, lambda name: load_split(name).content.categories
        )

    @torch.no_grad()
    def detect(self, image: np.ndarray) -> Detections:
        """Find objects in (H, W, 3) uint8, BGR, of any size."""
        pixels = as_tensor(image, self._cfg.INPUT.FORMAT).to(self._cfg.MODEL.DEVICE)
        found = detect(self.model, pixels, self._slicing)
        return Detections(*(tensor.cpu().numpy() for tensor in found))
