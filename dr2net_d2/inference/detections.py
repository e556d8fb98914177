"""The objects found in an image, and the interface of a trained detector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects that a detector found in one image of H x W pixels.

    Attributes:
        boxes: ``(n, 4)`` float32, XYXY in pixels of the image.
        scores: ``(n,)`` float32, in [0, 1].
        labels: ``(n,)`` int64, category indices from 0.
        masks: ``(n, H, W)`` bool, or None if the detector has no masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None


class Predictor(Protocol):
    """A trained detector for single images; ``load_predictor`` gives one.

    Both engines implement it, and derive from it explicitly. It resizes images and detects in tiles
    as its config says.

    Attributes:
        class_names: names of the categories, or their numbers if no dataset gives names.
    """

    class_names: tuple[str, ...]

    def detect(self, image: np.ndarray) -> Detections:
        """Find objects in an image of any size, (H, W, 3) uint8, BGR."""
        ...
