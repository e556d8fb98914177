"""A trained detector at work, whichever engine trained it: images, videos, a camera, pictures.

In: a config with MODEL.WEIGHTS. Out: ``Detections`` of images, drawn if wanted.
"""

from dr2net_d2.inference.detections import Detections, Predictor
from dr2net_d2.inference.drawing import draw_detections, place_labels
from dr2net_d2.inference.loading import load_model, load_predictor, open_config

__all__ = [
    "Detections",
    "Predictor",
    "draw_detections",
    "load_model",
    "load_predictor",
    "open_config",
    "place_labels",
]
