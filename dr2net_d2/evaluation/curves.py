"""Precision-recall curves of ranked detections, in the arithmetic of pycocotools."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dr2net_d2.evaluation.protocols import Protocol

RECALLS = np.linspace(0.0, 1.0, 101)


class Curve(NamedTuple):
    """Precision over recall of one set of detections.

    Attributes:
        precision: ``(101,)``, the best precision at each of ``RECALLS`` or any higher recall; 0
            beyond the highest recall.
        scores: ``(101,)``, the score of the detection that reaches each of ``RECALLS``.
        recall: highest recall.
        all_points: area under the best precision over all recalls that are reached, as in VOC.
    """

    precision: np.ndarray
    scores: np.ndarray
    recall: float
    all_points: float

    def average(self, protocol: Protocol) -> float:
        """Average precision as the protocol defines it."""
        if protocol.interpolation == "all points":
            return self.all_points
        return float(self.precision.mean())


UNDEFINED = Curve(np.full(len(RECALLS), -1.0), np.full(len(RECALLS), -1.0), -1.0, -1.0)
"""Stands for the curve of a set without any object to find."""


def curve(scores: np.ndarray, correct: np.ndarray, wrong: np.ndarray, objects: int) -> Curve:
    """Compute the curve of n detections.

    Args:
        scores: ``(n,)``, descending.
        correct: ``(n,)`` bool, true positives.
        wrong: ``(n,)`` bool, false positives; detections that are neither are ignored.
        objects: number of objects to find, at least 1.
    """
    precision, scores_at = np.zeros(len(RECALLS)), np.zeros(len(RECALLS))
    if not len(scores):
        return Curve(precision, scores_at, 0.0, 0.0)
    # Precision rises at true positives only, so the curve needs no other point.
    hits = np.flatnonzero(correct)
    true = np.arange(1.0, len(hits) + 1)
    false = np.searchsorted(np.flatnonzero(wrong), hits).astype(float)
    recall = true / objects
    best = true / (false + true + np.spacing(1))
    best = np.maximum.accumulate(best[::-1])[::-1]
    reached = np.searchsorted(recall, RECALLS, side="left")
    reached = reached[reached < len(recall)]
    precision[: len(reached)], scores_at[: len(reached)] = best[reached], scores[hits[reached]]
    # Recall 0 is reached by the first detection, whether it is correct or not.
    scores_at[0] = scores[0]
    return Curve(precision, scores_at, len(hits) / objects, float(best.sum() / objects))
