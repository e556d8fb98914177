"""Metrics on result files in COCO format; no detector framework is imported here."""

from dr2net_d2.evaluation.boxes import (
    EVALUATION_FILE,
    RESULTS_FILE,
    Evaluation,
    Matches,
    evaluate_boxes,
)
from dr2net_d2.evaluation.protocols import (
    PROTOCOLS,
    Metric,
    Protocol,
    SizeBin,
    choose_protocol,
)

__all__ = [
    "EVALUATION_FILE",
    "PROTOCOLS",
    "RESULTS_FILE",
    "Evaluation",
    "Matches",
    "Metric",
    "Protocol",
    "SizeBin",
    "choose_protocol",
    "evaluate_boxes",
]
