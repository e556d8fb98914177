"""Scores of correct and wrong detections, and overlaps of duplicates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dr2net_d2.evaluation.error_kinds import DUPLICATE, Errors
from dr2net_d2.evaluation.tables import Table

SCORE_EDGES = np.linspace(0, 1, 21)


@dataclass(frozen=True)
class ScoreHistogram:
    """Numbers of counted detections in bins of scores.

    Attributes:
        edges: bounds of the bins, one more than there are bins.
        correct, duplicate, other_wrong: number of detections in each bin.
    """

    edges: list[float]
    correct: list[int]
    duplicate: list[int]
    other_wrong: list[int]


@dataclass(frozen=True)
class CalibrationBin:
    """Precision in a range of scores.

    Attributes:
        low, high: bounds of the scores.
        detections: number of correct and wrong detections.
        score: their mean score.
        precision: share of correct ones.
    """

    low: float
    high: float
    detections: int
    score: float
    precision: float


@dataclass(frozen=True)
class DuplicateOverlap:
    """Overlap of duplicates with the better detections of the same objects.

    Attributes:
        minimum_score: lowest score of the duplicates.
        duplicates: number of duplicates.
        objects: number of objects with duplicates.
        iou: lower bounds of the overlap.
        removed: share of the duplicates with at least that overlap, which non-maximum suppression
            at that IoU would remove.
    """

    minimum_score: float
    duplicates: int
    objects: int
    iou: list[float]
    removed: list[float]


def score_histogram(errors: Errors) -> ScoreHistogram:
    """Histograms of the counted detections over ``SCORE_EDGES``."""

    def histogram(rows: np.ndarray) -> list[int]:
        numbers: list[int] = np.histogram(np.clip(errors.score[rows], 0, 1), SCORE_EDGES)[
            0
        ].tolist()
        return numbers

    duplicate = errors.kind == DUPLICATE
    return ScoreHistogram(
        edges=SCORE_EDGES.tolist(),
        correct=histogram(errors.matches.correct),
        duplicate=histogram(duplicate),
        other_wrong=histogram(errors.matches.wrong & ~duplicate),
    )


def calibration(errors: Errors) -> list[CalibrationBin]:
    """Precision by score, for each bin of ``SCORE_EDGES`` that has detections."""
    either = errors.matches.correct | errors.matches.wrong
    score, correct = errors.score[either], errors.matches.correct[either]
    place = np.clip(np.searchsorted(SCORE_EDGES, score, "right") - 1, 0, len(SCORE_EDGES) - 2)
    bins = []
    for index in np.unique(place).tolist():
        inside = place == index
        bins.append(
            CalibrationBin(
                low=float(SCORE_EDGES[index]),
                high=float(SCORE_EDGES[index + 1]),
                detections=int(inside.sum()),
                score=float(score[inside].mean()),
                precision=float(correct[inside].mean()),
            )
        )
    return bins


def duplicate_overlaps(errors: Errors, results: Table, minimum_score: float) -> DuplicateOverlap:
    """How much duplicates overlap the detections that are matched with their objects."""
    rows = np.flatnonzero((errors.kind == DUPLICATE) & (errors.score >= minimum_score))
    better = results.xywh[errors.matches.detection[errors.target[rows]]]
    iou = _iou(results.xywh[rows], better)
    bounds = np.linspace(0.3, 1, 15)
    return DuplicateOverlap(
        minimum_score=minimum_score,
        duplicates=len(rows),
        objects=len(np.unique(errors.target[rows])),
        iou=bounds.tolist(),
        removed=[float((iou >= bound).mean()) if len(iou) else math.nan for bound in bounds],
    )


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``(n,)`` IoU of the boxes in the same rows of two ``(n, 4)`` arrays of XYWH."""
    low = np.maximum(first[:, :2], second[:, :2])
    high = np.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    return shared / (first[:, 2:].prod(axis=1) + second[:, 2:].prod(axis=1) - shared)
