"""The trained torchvision detector: load it, and detect in an image."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dr2net_d2.data.slicing import DetectedBoxes, Slicing
from dr2net_d2.tv.model import build_model
from dr2net_d2.weights import StrictCheckpointer, load_weights


def load_detector(cfg: CfgNode) -> nn.Module:
    """The trained detector of a checked config, in evaluation mode on MODEL.DEVICE.

    Raises:
        UserError: the config cannot be used, or MODEL.WEIGHTS is not a whole detector's.
    """
    model = build_model(cfg).to(cfg.MODEL.DEVICE)
    return load_weights(StrictCheckpointer, model, cfg.MODEL.WEIGHTS)


def detect(model: nn.Module, image: Tensor, slicing: Slicing | None) -> DetectedBoxes:
    """Detect in an image, or in its tiles.

    Args:
        model: torchvision detector in evaluation mode.
        image: (3, H, W) uint8 on the model's device.
        slicing: TEST.TILES, None where it is not enabled.

    Returns:
        Boxes in pixels of the image, scores, and labels as category indices from 0.
    """

    def whole(images: list[Tensor]) -> list[DetectedBoxes]:
        outputs = model([pixels.float() for pixels in images])
        # torchvision's label 0 is the background.
        return [DetectedBoxes(out["boxes"], out["scores"], out["labels"] - 1) for out in outputs]

    return slicing.detect(image, whole) if slicing else whole([image])[0]
