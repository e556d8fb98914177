"""A trained detector of torchvision: loaded whole, and what it finds in an image."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dr2net_d2.data.slicing import Detections, Slicing
from dr2net_d2.tv.model import build_model
from dr2net_d2.weights import StrictCheckpointer, load_weights


def load_detector(cfg: CfgNode) -> nn.Module:
    """The trained detector of a checked config, in evaluation mode on MODEL.DEVICE.

    Raises:
        UserError: the config cannot be used, or its weights are not those of the whole detector.
    """
    model = build_model(cfg).to(cfg.MODEL.DEVICE)
    return load_weights(StrictCheckpointer, model, cfg.MODEL.WEIGHTS)


def detect(model: nn.Module, image: Tensor, slicing: Slicing | None) -> Detections:
    """What a detector in evaluation mode finds in an image.

    Args:
        model: of torchvision.
        image: (3, H, W) uint8 on its device.
        slicing: of TEST.TILES.

    Returns:
        labels are category indices from 0.
    """

    def whole(images: list[Tensor]) -> list[Detections]:
        found = model([pixels.float() for pixels in images])
        # torchvision's labels start with the background.
        return [Detections(one["boxes"], one["scores"], one["labels"] - 1) for one in found]

    return slicing.detect(image, whole) if slicing else whole([image])[0]
