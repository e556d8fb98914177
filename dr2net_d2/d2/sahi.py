"""SAHI, sliced inference on large images, with a detector of ours.

    from sahi.predict import get_sliced_prediction

    detector = SahiModel(model=Predictor(cfg), confidence_threshold=0.5)
    result = get_sliced_prediction("large.jpg", detector, slice_height=1024, slice_width=1024)

SAHI's own ``Detectron2DetectionModel`` takes no model that is built already, opens a config without
the defaults of this project's keys, and swaps the colours where INPUT.FORMAT is RGB, as in ViTDet's
configs: it hands over RGB then, and ``DefaultPredictor`` always expects BGR.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sahi.models.detectron2 import Detectron2DetectionModel

from dr2net_d2.d2.predictor import Predictor


class SahiModel(Detectron2DetectionModel):  # type: ignore[misc]
    """SAHI's Detectron2 model around a ``Predictor``, given as ``model``."""

    def set_model(self, model: Predictor, **kwargs: Any) -> None:
        self.model = model
        self.category_names = list(model.class_names)
        self.category_mapping = {str(i): name for i, name in enumerate(self.category_names)}

    def perform_inference(self, image: np.ndarray) -> None:
        """Of a slice, (H, W, 3) uint8, RGB."""
        self._original_predictions = self.model(image[..., ::-1])
