"""``Predictor`` for the detectors of Detectron2."""

from __future__ import annotations

import numpy as np

from dr2net_d2 import d2
from dr2net_d2.errors import ConfigError
from dr2net_d2.inference.detections import Detections, Predictor


class Detectron2Predictor(d2.Predictor, Predictor):
    """A ``Predictor`` that is Detectron2's ``DefaultPredictor`` as well.

    Raises:
        UserError: see ``d2.predictor.load_detector``.
    """

    def detect(self, image: np.ndarray) -> Detections:
        """See ``Predictor.detect``.

        Raises:
            ConfigError: the model's output has no instances.
        """
        output = self(image)
        if "instances" not in output:
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE {self.cfg.MODEL.META_ARCHITECTURE} gives "
                f"{', '.join(output)} and no instances; use a detector of objects"
            )
        instances = output["instances"].to("cpu")
        return Detections(
            boxes=instances.pred_boxes.tensor.numpy(),
            scores=instances.scores.numpy(),
            labels=instances.pred_classes.numpy(),
            masks=instances.pred_masks.numpy() if instances.has("pred_masks") else None,
        )
