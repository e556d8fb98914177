"""torchvision's detectors in use."""

from __future__ import annotations

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dr2net_d2.checkpointer import StrictCheckpointer
from dr2net_d2.inference import Detections, category_names, load_weights
from dr2net_d2.slicing import Found, Slicing, build_slicing
from dr2net_d2.tv.dataset import as_tensor, load_split
from dr2net_d2.tv.model import build_model


def load_detector(cfg: CfgNode) -> nn.Module:
    """The trained detector of a checked config, in evaluation mode on MODEL.DEVICE.

    Raises:
        UserError: the config cannot be used, or its weights are not those of the whole detector.
    """
    model = build_model(cfg).to(cfg.MODEL.DEVICE)
    return load_weights(StrictCheckpointer, model, cfg.MODEL.WEIGHTS)


def detect(model: nn.Module, image: Tensor, slicing: Slicing | None) -> Found:
    """What a detector in evaluation mode finds in an image.

    Args:
        model: of torchvision.
        image: (3, H, W) uint8 on its device.
        slicing: of TEST.TILES.

    Returns:
        labels are category indices from 0.
    """

    def whole(images: list[Tensor]) -> list[Found]:
        found = model([pixels.float() for pixels in images])
        # torchvision's labels start with the background.
        return [Found(one["boxes"], one["scores"], one["labels"] - 1) for one in found]

    return slicing.detect(image, whole) if slicing else whole([image])[0]


class Predictor:
    """A trained detector that knows its categories; it goes over tiles as TEST.TILES says.

    Raises:
        UserError: see ``load_detector``.
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
        """Find objects in (H, W, 3) uint8, BGR, of any size."""
        pixels = as_tensor(image, self._cfg.INPUT.FORMAT).to(self._cfg.MODEL.DEVICE)
        found = detect(self.model, pixels, self._slicing)
        return Detections(*(tensor.cpu().numpy() for tensor in found))
