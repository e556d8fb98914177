"""A trained detector of either engine on images, videos and cameras.

In: a config with MODEL.WEIGHTS. Out: ``Detections`` for each image, drawn if wanted.

    cfg = load_config("configs/quickstart.yaml", ["MODEL.WEIGHTS", weights], "detectron2")
    predictor = load_predictor(cfg, "detectron2")
    detections = predictor.detect(image)
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
