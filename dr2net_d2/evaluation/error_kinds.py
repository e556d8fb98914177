"""Errors that lower AP: the kind of each wrong detection and missed object, as defined by TIDE.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", arXiv 2008.08115.

Whether a detection is correct, wrong or ignored, and whether an object is to be found, follows the
protocol at IoU 0.5. Ignored objects and ignore regions are therefore no errors, and detections are
not compared with them. For a wrong detection let

    own      largest IoU with an object to be found of the same class
    other    largest IoU with an object to be found of another class

Its kind is the first one whose condition holds:

    localisation     0.1 <= own <= 0.5    right class, inaccurate box
    classification   other >= 0.5         box on an object of another class
    duplicate        own >= 0.5           a better detection has matched that object already
    background       own, other <= 0.1    no object there
    both             otherwise            wrong class and inaccurate box

Localisation and duplicate errors target the object of ``own``, classification errors that of
``other``. An object is "missed" if it is unmatched and no classification or localisation error
targets it.

The gain of a kind is the AP50 with all of its errors fixed, less the AP50 as it is. The fixes are:

    classification,    The detection gets the class or the box of its target. Of the errors of both
    localisation       kinds with the same target, only that of the highest score is fixed; the
                       others are removed, as are those whose target is matched.
    duplicate,         The detection is removed.
    background, both
    missed             The object is removed; a class without any objects left is not counted.

Gains do not add up to 100, as each one starts from the same detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dr2net_d2.evaluation.counting import MATCH_IOU, Counts, Matches, count
from dr2net_d2.evaluation.curves import curve
from dr2net_d2.evaluation.matching import (
    Boxes,
    Pairs,
    find_pairs,
    match_greedily,
    sort_by_preference,
)
from dr2net_d2.evaluation.protocols import Protocol
from dr2net_d2.evaluation.tables import GroundTruth, Table

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
"""All kinds of errors. The first five are those of detections, numbered as in ``Errors.kind``."""

CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(5)
BACKGROUND_IOU = 0.1


@dataclass(frozen=True, eq=False)
class Errors:
    """Errors of n detections, in the order of the results, and g objects, in that of the JSON.

    Attributes:
        matches: matches of all detections and objects.
        classes: positions of the evaluated classes, among K.
        class_weights: ``(K,)`` weight of each class in means.
        score: ``(n,)`` score of each detection.
        kind: ``(n,)`` position in ``KINDS`` of each wrong detection, -1 for the others.
        target: ``(n,)`` object that the error targets, -1 if its kind has none.
        missed: ``(g,)`` bool, errors of the kind "missed".
        ap50: AP50 in per cent.
        gains: kind -> gain in points of AP50, at least 0; also "false positives", the gain if all
            wrong detections were removed, and "false negatives", if all unmatched objects were.
            NaN where there is nothing to find.
    """

    matches: Matches
    classes: list[int]
    class_weights: np.ndarray
    score: np.ndarray
    kind: np.ndarray
    target: np.ndarray
    missed: np.ndarray
    ap50: float
    gains: dict[str, float]

    @property
    def matched_score(self) -> np.ndarray:
        """``(g,)`` score of the detection matched with each object, -inf if there is none."""
        return np.append(self.score, -np.inf)[self.matches.detection]


def find_errors(truth: GroundTruth, results: Table, protocol: Protocol) -> Errors:
    """Assign a kind to every wrong detection and missed object; see the module for the rules."""
    counts = count(truth, results, _at_match_iou(protocol))
    matches = counts.matches
    kind, target = _assign_kinds(truth, results, matches)
    has_target = np.isin(kind, (CLASSIFICATION, LOCALISATION))
    missed = matches.missed.copy()
    missed[target[has_target]] = False
    ap50 = _Ap50(counts, truth, results, protocol)
    actual = ap50()

    fixable = has_target.copy()
    fixable[has_target] = matches.detection[target[has_target]] < 0
    best = ap50.best_per_target(fixable, target)
    values = {}
    for number, name in enumerate(KINDS[:-1]):
        errors = kind == number
        fixed = best & errors
        category = results.category.copy()
        category[fixed] = truth.objects.category[target[fixed]]
        values[name] = ap50(
            correct=matches.correct | fixed, wrong=matches.wrong & ~errors, category=category
        )
    values["missed"] = ap50(removed=missed)
    values["false positives"] = ap50(wrong=np.zeros_like(matches.wrong))
    values["false negatives"] = ap50(removed=matches.missed)
    return Errors(
        matches=matches,
        classes=counts.targets.classes,
        class_weights=counts.targets.class_weights,
        score=results.score,
        kind=kind,
        target=target,
        missed=missed,
        ap50=actual,
        gains={name: float(np.maximum(value - actual, 0)) for name, value in values.items()},
    )


def best_threshold(errors: Errors) -> tuple[float, float]:
    """Find the score threshold with the best F1 over all classes together.

    F1 is 2 correct / (correct + wrong + objects).

    Returns:
        The threshold and its F1; (0, 0) if no detection is correct.
    """
    matches = errors.matches
    rows = np.flatnonzero(matches.correct | matches.wrong)
    rows = rows[np.argsort(-errors.score[rows], kind="stable")]
    if not matches.correct.any():
        return 0.0, 0.0
    correct = np.cumsum(matches.correct[rows])
    f1 = 2 * correct / (np.arange(1, len(rows) + 1) + np.count_nonzero(matches.to_find))
    score = errors.score[rows]
    f1[:-1][score[:-1] == score[1:]] = 0  # a threshold cannot separate equal scores
    best = int(f1.argmax())
    return float(score[best]), float(f1[best])


def confusion(
    errors: Errors, truth: GroundTruth, results: Table, minimum_score: float
) -> np.ndarray:
    """Count which classes are mistaken for which, at IoU 0.5.

    Correct detections are on the diagonal. The other detections, in the order of their scores, are
    matched with the object of the largest IoU, of any class, that has no match yet.

    Args:
        errors, truth, results: of the same evaluation.
        minimum_score: detections with lower scores are left out.

    Returns:
        ``(K + 1, K + 1)`` int, with a row for the class of the object and a column for that of the
        detection, both in the order of ``errors.classes``. The last row is the background:
        detections without an object, duplicates among them. The last column has the missed objects.
    """
    background = len(errors.classes)
    label = np.full(len(truth.classes), -1)
    label[errors.classes] = range(background)
    kept = results.score >= minimum_score
    unmatched = errors.matches.to_find & (errors.matched_score < minimum_score)
    d, g = _by_image(results, errors.matches.wrong & kept), _by_image(truth.objects, unmatched)
    pairs = _pairs_of_any_class(results, truth, d, g, MATCH_IOU)
    nowhere = np.zeros(len(g), bool)
    ordered = sort_by_preference(pairs, np.arange(len(pairs.truth)), pairs.iou, nowhere)
    pair = match_greedily(pairs, ordered, reusable=nowhere, detections=len(d))
    hits = np.flatnonzero(pair >= 0)
    confused = g[pairs.truth[pair[hits]]]
    missed = np.setdiff1d(g, confused)
    predicted, actual = label[results.category], label[truth.objects.category]
    matrix = np.zeros((background + 1, background + 1), np.int64)
    correct = predicted[errors.matches.correct & kept]
    np.add.at(matrix, (correct, correct), 1)
    np.add.at(matrix, (actual[confused], predicted[d[hits]]), 1)
    np.add.at(matrix, (background, predicted[np.delete(d, hits)]), 1)
    np.add.at(matrix, (actual[missed], background), 1)
    return matrix


def _at_match_iou(protocol: Protocol) -> Protocol:
    """Reduce a protocol to IoU 0.5, all sizes and its largest number of detections."""
    return replace(
        protocol,
        iou_thresholds=(MATCH_IOU,),
        size_bins=protocol.size_bins[:1],
        max_detections=protocol.max_detections[-1:],
    )


def _assign_kinds(
    truth: GroundTruth, results: Table, matches: Matches
) -> tuple[np.ndarray, np.ndarray]:
    """Compute ``kind`` and ``target`` of ``Errors``."""
    d, g = _by_image(results, matches.wrong), _by_image(truth.objects, matches.to_find)
    pairs = _pairs_of_any_class(results, truth, d, g, BACKGROUND_IOU)
    same_class = results.category[d[pairs.detection]] == truth.objects.category[g[pairs.truth]]
    own, own_object = _largest_iou(pairs, np.flatnonzero(same_class), len(d))
    other, other_object = _largest_iou(pairs, np.flatnonzero(~same_class), len(d))
    conditions = {
        LOCALISATION: (own >= BACKGROUND_IOU) & (own <= MATCH_IOU),
        CLASSIFICATION: other >= MATCH_IOU,
        DUPLICATE: own >= MATCH_IOU,
        BACKGROUND: np.maximum(own, other) <= BACKGROUND_IOU,
    }
    n = len(matches.wrong)
    kind, target = np.full(n, -1), np.full(n, -1)
    kind[d] = np.select([*conditions.values()], [*conditions], BOTH)
    targets = {LOCALISATION: own_object, DUPLICATE: own_object, CLASSIFICATION: other_object}
    for number, objects in targets.items():
        rows = kind[d] == number
        target[d[rows]] = g[objects[rows]]
    return kind, target


def _largest_iou(pairs: Pairs, rows: np.ndarray, detections: int) -> tuple[np.ndarray, np.ndarray]:
    """``(detections,)`` largest IoU of each detection among some pairs, or 0; and its object."""
    rows = rows[np.lexsort((-pairs.iou[rows], pairs.detection[rows]))]
    first = rows[np.flatnonzero(np.diff(pairs.detection[rows], prepend=-1))]
    iou, truth = np.zeros(detections), np.full(detections, -1)
    iou[pairs.detection[first]] = pairs.iou[first]
    truth[pairs.detection[first]] = pairs.truth[first]
    return iou, truth


def _by_image(table: Table, selected: np.ndarray) -> np.ndarray:
    """Rows of the selected boxes, by image and descending score."""
    rows = np.flatnonzero(selected)
    return rows[np.lexsort((-table.score[rows], table.image[rows]))]


def _pairs_of_any_class(
    results: Table, truth: GroundTruth, d: np.ndarray, g: np.ndarray, minimum: float
) -> Pairs:
    """Find pairs of detections ``d`` and objects ``g``, numbered by their positions there."""
    return find_pairs(
        Boxes(results.image[d], results.xywh[d]),
        Boxes(truth.objects.image[g], truth.objects.xywh[g]),
        by_cover=np.zeros(len(g), bool),
        minimum=minimum,
    )


class _Ap50:
    """AP50 under the protocol, as it is and with changed detections and objects."""

    def __init__(
        self, counts: Counts, truth: GroundTruth, results: Table, protocol: Protocol
    ) -> None:
        self._matches, self._targets = counts.matches, counts.targets
        self._score, self._category = results.score, results.category
        self._object_category, self._protocol = truth.objects.category, protocol
        # As in ``counting``: by score, equal scores by image.
        self._order = np.lexsort((results.image, -results.score))

    def __call__(
        self,
        *,
        correct: np.ndarray | None = None,
        wrong: np.ndarray | None = None,
        category: np.ndarray | None = None,
        removed: np.ndarray | None = None,
    ) -> float:
        """Compute AP50 in per cent.

        Args:
            correct, wrong: ``(n,)`` bool, true and false positives in place of the actual ones.
            category: ``(n,)`` int, classes of the detections in place of the actual ones.
            removed: ``(g,)`` bool, objects to leave out.
        """
        correct = self._matches.correct if correct is None else correct
        wrong = self._matches.wrong if wrong is None else wrong
        category = self._category if category is None else category
        in_recall, weights = self._targets.in_recall[0], self._targets.class_weights
        remaining = in_recall if removed is None else in_recall & ~removed
        objects = np.bincount(self._object_category[remaining], minlength=len(weights))
        rows = self._order[(correct | wrong)[self._order]]
        rows = rows[np.argsort(category[rows], kind="stable")]
        rows_of = np.split(rows, np.searchsorted(category[rows], range(1, len(objects))))
        classes: Sequence[int] = [k for k in self._targets.classes if objects[k]]
        values = []
        for k in classes:
            rows = rows_of[k]
            class_curve = curve(self._score[rows], correct[rows], wrong[rows], objects[k])
            values.append(class_curve.average(self._protocol))
        weights = weights[classes]
        return 100 * float(weights @ np.array(values) / weights.sum()) if values else np.nan

    def best_per_target(self, selected: np.ndarray, target: np.ndarray) -> np.ndarray:
        """``(n,)`` bool, the selected detection of the highest score for each target."""
        rows = self._order[selected[self._order]]
        best = np.zeros_like(selected)
        best[rows[np.unique(target[rows], return_index=True)[1]]] = True
        return best
