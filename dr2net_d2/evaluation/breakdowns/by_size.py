"""Recall, errors and curves by the size of the objects and by their number per image.

In all groups ``low`` is inclusive and ``high``, which may be infinite, exclusive. Undefined values
are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dr2net_d2.evaluation.boxes import Evaluation
from dr2net_d2.evaluation.curves import RECALLS
from dr2net_d2.evaluation.error_kinds import CLASSIFICATION, KINDS, LOCALISATION, Errors
from dr2net_d2.evaluation.tables import GroundTruth, Table

SCORES = (0.0, 0.1, 0.3, 0.5, 0.7)
"""Minimum scores that recall is given for."""

SIDES = (0, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, math.inf)
"""Bounds of the size groups, in pixels; a side is the square root of the annotated area."""

OBJECTS_PER_IMAGE = (1, 3, 6, 11, 21, 51, 101, 201, 501, math.inf)
"""Bounds of the density groups."""

CURVE_RECALLS = tuple(RECALLS.tolist())
"""Recalls at which ``SizeCurve`` has its precision."""


@dataclass(frozen=True)
class RecallGroup:
    """Recall of a group of objects.

    Attributes:
        low, high: bounds of the group.
        objects: number of objects to find.
        images: number of images that have them.
        matched: number of matched objects, at any score.
        matched_at_threshold: number of objects that are matched at the threshold or above.
        recall: minimum score, one of ``SCORES`` -> recall.
    """

    low: float
    high: float
    objects: int
    images: int
    matched: int
    matched_at_threshold: int
    recall: dict[float, float]


@dataclass(frozen=True)
class KindsGroup:
    """Errors of the detections, or missed objects, of a range of sizes.

    Attributes:
        low, high: bounds of the side, in pixels.
        numbers: kind -> number of errors.
    """

    low: float
    high: float
    numbers: dict[str, int]


@dataclass(frozen=True)
class SizeCurve:
    """Precision over recall in a size bin of the protocol, averaged over the classes.

    Attributes:
        size: name of the size bin.
        average_precision: in per cent, by the protocol's interpolation.
        objects: number of objects to find.
        precision: at ``CURVE_RECALLS``.
    """

    size: str
    average_precision: float
    objects: int
    precision: list[float]


def recall_by_side(errors: Errors, truth: GroundTruth, threshold: float) -> list[RecallGroup]:
    """Recall by the size of the object, from the first to the last group with objects.

    Args:
        errors, truth: of the same evaluation.
        threshold: score of ``RecallGroup.matched_at_threshold``.
    """
    return _recall(errors, truth, np.sqrt(truth.objects.area), SIDES, threshold)


def recall_by_density(errors: Errors, truth: GroundTruth, threshold: float) -> list[RecallGroup]:
    """Recall by the number of objects in the image, otherwise as ``recall_by_side``."""
    image = truth.objects.image
    per_image = np.bincount(image[errors.matches.to_find], minlength=len(truth.image_ids))
    return _recall(errors, truth, per_image[image], OBJECTS_PER_IMAGE, threshold)


def kinds_by_side(
    errors: Errors, truth: GroundTruth, results: Table, minimum_score: float
) -> list[KindsGroup]:
    """Numbers of errors by the size of the detection, or of the missed object.

    An object is missed if no detection with the minimum score is matched with it, and no
    classification or localisation error with that score targets it.
    """
    kept = (errors.kind >= 0) & (errors.score >= minimum_score)
    missed = errors.matches.to_find & (errors.matched_score < minimum_score)
    missed[errors.target[kept & np.isin(errors.kind, (CLASSIFICATION, LOCALISATION))]] = False
    sides = np.sqrt(np.append(results.area[kept], truth.objects.area[missed]))
    kind = np.append(errors.kind[kept], np.full(np.count_nonzero(missed), KINDS.index("missed")))
    numbers = np.zeros((len(SIDES) - 1, len(KINDS)), int)
    np.add.at(numbers, (np.searchsorted(SIDES, sides, "right") - 1, kind), 1)
    occupied = np.flatnonzero(numbers.any(axis=1)).tolist()
    return [
        KindsGroup(
            low=SIDES[group],
            high=SIDES[group + 1],
            numbers=dict(zip(KINDS, numbers[group].tolist(), strict=True)),
        )
        for group in (range(occupied[0], occupied[-1] + 1) if occupied else ())
    ]


def curves_by_size(
    evaluation: Evaluation, class_weights: np.ndarray, iou: float
) -> list[SizeCurve]:
    """Mean precision of the classes, for each size bin that has objects.

    Args:
        evaluation: whose curves are averaged.
        class_weights: ``(K,)`` weight of each class.
        iou: one of the protocol's thresholds.
    """
    protocol = evaluation.protocol
    t = protocol.iou_thresholds.index(iou)
    curves = []
    for a, size in enumerate(protocol.size_bins):
        average = evaluation.average_precision[t, :, a, -1]
        valid = (average > -1) & (class_weights > 0)
        if not valid.any():
            continue
        share = class_weights[valid] / class_weights[valid].sum()
        precision = evaluation.precision[t, :, valid, a, -1].T
        curves.append(
            SizeCurve(
                size=size.name,
                average_precision=100 * float(average[valid] @ share),
                objects=int(evaluation.per_size[size.name]["objects"]),
                precision=(precision @ share).tolist(),
            )
        )
    return curves


def _recall(
    errors: Errors,
    truth: GroundTruth,
    value: np.ndarray,
    bounds: Sequence[float],
    threshold: float,
) -> list[RecallGroup]:
    """Recall of the objects, grouped by a value of each."""
    to_find = errors.matches.to_find
    place = np.searchsorted(bounds, value, "right") - 1
    occupied = np.unique(place[to_find])
    groups = []
    for index in range(occupied.min(), occupied.max() + 1) if len(occupied) else ():
        members = to_find & (place == index)
        score = errors.matched_score[members]
        groups.append(
            RecallGroup(
                low=bounds[index],
                high=bounds[index + 1],
                objects=len(score),
                images=len(np.unique(truth.objects.image[members])),
                matched=int(np.isfinite(score).sum()),
                matched_at_threshold=int(np.count_nonzero(score >= threshold)),
                recall={
                    minimum: float((score >= minimum).mean()) if len(score) else math.nan
                    for minimum in SCORES
                },
            )
        )
    return groups
