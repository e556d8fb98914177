"""torchvision's detectors in use."""

from __future__ import annotations

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from dr2net_d2.checkpointer import StrictCheckpointer
from dr2net_d2.inference import Detections, category_names, load_weights
from dr2net_d2.tv.dataset import as_tensor, load_split
from dr2net_d2.tv.model import build_model


def load_detector(cfg: CfgNode) -> nn.Module:
    """The trained detector of a checked config, in evaluation mode on MODEL.DEVICE.

    Raises:
        UserError: the config cannot be used, or its weights are not those of the whole detector.
    """
    model = build_model(cfg).to(cfg.MODEL.DEVICE)
    return load_weights(StrictCheckpointer, model, cfg.MODEL.WEIGHTS)


class Predictor:
    """A trained detector that knows its categories.

    Raises:
        UserError: see ``load_detector``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self.model = load_detector(cfg)
        self.class_names = category_names(
            cfg, cfg.MODEL.ROI_HEADS.NUM_CLASSES, lambda name: load_split(name).content.categories
        )

    @torch.no_grad()
    def detect(self, image: np.ndarray) -> Detections:
        """Find objects in (H, W, 3) uint8, BGR, of any size."""
        pixels = as_tensor(image, self._cfg.INPUT.FORMAT).to(self._cfg.MODEL.DEVICE)
        (found,) = self.model([pixels.float()])
        boxes, scores, labels = (found[key].cpu() for key in ("boxes", "scores", "labels"))
        # torchvision's labels start with the background.
        return Detections(boxes.numpy(), scores.numpy(), (labels - 1).numpy())
