"""Detectron2's detectors as a ``Predictor`` of this wing."""

from __future__ import annotations

import numpy as np

from dr2net_d2.d2 import Predictor
from dr2net_d2.errors import ConfigError
from dr2net_d2.inference.detections import Detections


class Detectron2Predictor(Predictor):
    """``dr2net_d2.d2.Predictor`` that gives ``Detections``."""

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
