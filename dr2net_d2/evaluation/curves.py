"""Precision over recall of ranked detections, in the arithmetic of pycocotools."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dr2net_d2.evaluation.protocols import Protocol

RECALLS = np.linspace(0.0, 1.0, 101)


class Curve(NamedTuple):
    """One class at one threshold, size and number of detections.

    Attributes:
        precision: ``(101,)`` at ``RECALLS``: the best at that recall or above, 0 where not reached.
        scores: ``(101,)`` of the detection that reaches each recall.
        recall: in the end.
        all_points: area under the best precision over every recall that is reached, as VOC has it.
    """

    precision: np.ndarray
    scores: np.ndarray
    recall: float
    all_points: float

    def average(self, protocol: Protocol) -> float:
        """The average precision as a protocol means it."""
        if protocol.interpolation == "all points":
            return self.all_points
        return float(self.precision.mean())


def curve(scores: np.ndarray, found: np.ndarray, wrong: np.ndarray, objects: int) -> Curve:
    """The curve of n detections.

    Args:
        scores: ``(n,)``, descending.
        found: ``(n,)`` bool, true positives.
        wrong: ``(n,)`` bool, false positives; a detection that is neither is ignored.
        objects: how many there are to be found, at least 1.
    """
    precision, at = np.zeros(len(RECALLS)), np.zeros(len(RECALLS))
    if not len(scores):
        return Curve(precision, at, 0.0, 0.0)
    # Precision rises where an object is found and nowhere else, so these places are all it takes.
    places = np.flatnonzero(found)
    true = np.arange(1.0, len(places) + 1)
    false = np.searchsorted(np.flatnonzero(wrong), places).astype(float)
    recall = true / objects
    best = true / (false + true + np.spacing(1))
    best = np.maximum.accumulate(best[::-1])[::-1]
    reach = np.searchsorted(recall, RECALLS, side="left")
    reach = reach[reach < len(recall)]
    precision[: len(reach)], at[: len(reach)] = best[reach], scores[places[reach]]
    # Recall 0 is reached by the first detection, whatever it is.
    at[0] = scores[0]
    return Curve(precision, at, len(places) / objects, float(best.sum() / objects))
