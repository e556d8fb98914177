"""Metrics and kinds of errors, by the protocols of the benchmarks; no detector framework.

In: ground truth and detections in COCO format. Out: metrics, the match of every detection, and the
kind of every error.
"""

from dr2net_d2.evaluation.boxes import (
    EVALUATION_FILE,
    RESULTS_FILE,
    Evaluation,
    evaluate_boxes,
    evaluate_tables,
    without_nan,
)
from dr2net_d2.evaluation.counting import Matches
from dr2net_d2.evaluation.error_kinds import (
    CLASSIFICATION,
    DUPLICATE,
    KINDS,
    Errors,
    best_threshold,
    confusion,
    find_errors,
)
from dr2net_d2.evaluation.protocols import (
    PROTOCOLS,
    Metric,
    Protocol,
    SizeBin,
    choose_protocol,
)
from dr2net_d2.evaluation.tables import GroundTruth, Table, read_results, read_truth

__all__ = [
    "CLASSIFICATION",
    "DUPLICATE",
    "EVALUATION_FILE",
    "KINDS",
    "PROTOCOLS",
    "RESULTS_FILE",
    "Errors",
    "Evaluation",
    "GroundTruth",
    "Matches",
    "Metric",
    "Protocol",
    "SizeBin",
    "Table",
    "best_threshold",
    "choose_protocol",
    "confusion",
    "evaluate_boxes",
    "evaluate_tables",
    "find_errors",
    "read_results",
    "read_truth",
    "without_nan",
]
