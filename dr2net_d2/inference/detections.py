"""What a detector finds in an image, and what every trained detector here can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector finds in one image of H x W px.

    Attributes:
        boxes: ``(n, 4)`` float32, XYXY in px of the image.
        scores: ``(n,)`` float32, in [0, 1].
        labels: ``(n,)`` int64, category indices from 0.
        masks: ``(n, H, W)`` bool, or None from a detector without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None


class Predictor(Protocol):
    """A trained detector of one of the engines, for single images.

    Attributes:
        class_names: of the categories; their numbers where no dataset tells their names.
    """

    class_names: Sequence[str]

    def detect(self, image: np.ndarray) -> Detections:
        """Find objects in (H, W, 3) uint8, BGR, of any size."""
