"""Breakdowns of an evaluation and its errors, as rows of plain numbers."""

from dr2net_d2.evaluation.breakdowns.by_class import (
    ClassErrors,
    Confusion,
    ImageErrors,
    errors_by_class,
    errors_by_image,
    largest_confusions,
)
from dr2net_d2.evaluation.breakdowns.by_score import (
    SCORE_EDGES,
    CalibrationBin,
    DuplicateOverlap,
    ScoreHistogram,
    calibration,
    duplicate_overlaps,
    score_histogram,
)
from dr2net_d2.evaluation.breakdowns.by_size import (
    CURVE_RECALLS,
    OBJECTS_PER_IMAGE,
    SCORES,
    SIDES,
    KindsGroup,
    RecallGroup,
    SizeCurve,
    curves_by_size,
    kinds_by_side,
    recall_by_density,
    recall_by_side,
)

__all__ = [
    "CURVE_RECALLS",
    "OBJECTS_PER_IMAGE",
    "SCORES",
    "SCORE_EDGES",
    "SIDES",
    "CalibrationBin",
    "ClassErrors",
    "Confusion",
    "DuplicateOverlap",
    "ImageErrors",
    "KindsGroup",
    "RecallGroup",
    "ScoreHistogram",
    "SizeCurve",
    "calibration",
    "curves_by_size",
    "duplicate_overlaps",
    "errors_by_class",
    "errors_by_image",
    "kinds_by_side",
    "largest_confusions",
    "recall_by_density",
    "recall_by_side",
    "score_histogram",
]
