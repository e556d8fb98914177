"""A detector of ours in SAHI, a library for sliced inference on large images.

    from sahi.predict import get_sliced_prediction

    detector = SahiModel(model=Predictor(cfg), confidence_threshold=0.5)
    result = get_sliced_prediction("large.jpg", detector, slice_height=1024, slice_width=1024)

SAHI's own ``Detectron2DetectionModel`` cannot take a model that has been built already, reads a
config without the defaults of this project's keys, and confuses the colours if INPUT.FORMAT is RGB,
as in ViTDet's configs: it then passes RGB to a ``DefaultPredictor``, which always expects BGR.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sahi.models.detectron2 import Detectron2DetectionModel

from dr2net_d2.d2.predictor import Predictor


class SahiModel(Detectron2DetectionModel):  # type: ignore[misc]
    """SAHI's Detectron2 model around the ``Predictor`` that is passed as ``model``."""

    def set_model(self, model: Predictor, **kwargs: Any) -> None:
        self.model = model
        self.category_names = list(model.class_names)
        self.category_mapping = {str(i): name for i, name in enumerate(self.category_names)}

    def perform_inference(self, image: np.ndarray) -> None:
        """Detect in a slice, (H, W, 3) uint8 in RGB."""
        self._original_predictions = self.model(image[..., ::-1])
