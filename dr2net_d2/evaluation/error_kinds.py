"""What keeps AP low: each wrong detection and each missed object by kind, as TIDE has them.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", arXiv 2008.08115.
A detection is right, wrong or ignored, and an object is to be found or not, as the protocol has it
at IoU 0.5. So ignored objects and what lies in ignore regions are no errors, and no detection is
compared with them. ``own`` is the greatest IoU of a wrong detection with the objects of its class,
``other`` that with the objects of other classes. The first line that holds gives its kind:

    localisation     0.1 <= own <= 0.5    right class, box too far off
    classification   other >= 0.5         box on an object of another class
    duplicate        own >= 0.5           that object was found by a better detection already
    background       own, other <= 0.1    nothing there
    both             else                 another class, and box too far off

    missed           an object that is not found, and that no classification or localisation error
                     points to; one points to the object of its greatest ``other``, or ``own``

What mending a kind would gain is AP50 with it less AP50:

    classification   the detection gets the class, or the box, of the object that it points to. Of
    localisation     several that point to one, of both kinds, the best by score; the others go, as
                     do those that point to an object that is found
    duplicate, background, both   the detection goes
    missed           the object goes; a class without any object left no longer counts

The gains do not add up to 100: each starts from the same detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dr2net_d2.evaluation.counting import MATCH_IOU, Counts
from dr2net_d2.evaluation.curves import curve
from dr2net_d2.evaluation.matching import Boxes, Pairs, by_preference, greedy, overlapping
from dr2net_d2.evaluation.protocols import Protocol
from dr2net_d2.evaluation.tables import GroundTruth, Table

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
"""The first five are of detections, by their positions in ``Errors.kind``."""

CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(5)
BACKGROUND_IOU = 0.1


@dataclass(frozen=True, eq=False)
class Errors:
    """n detections in the order of the results, g objects in that of the JSON, K classes.

    Attributes:
        classes: positions of those that the protocol evaluates.
        score: ``(n,)``.
        counted, right, wrong: ``(n,)`` bool; what is counted and neither is ignored.
        found: ``(n,)`` the object that a detection was matched with, or -1.
        kind: ``(n,)`` position among ``KINDS`` of each wrong detection, or -1.
        target: ``(n,)`` the object that it points to, -1 where its kind has none.
        to_find: ``(g,)`` bool.
        finder: ``(g,)`` the detection that found an object, or -1.
        missed: ``(g,)`` bool, of the kind "missed".
        weights: ``(K,)`` of the classes in means.
        ap50: in per cent.
        gains: kind -> what mending it would gain, in points of AP50, at least 0; besides "false
            positives", if all wrong detections went, and "false negatives", if all objects that are
            not found did. NaN where nothing is to be found.
    """

    classes: list[int]
    score: np.ndarray
    counted: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    found: np.ndarray
    kind: np.ndarray
    target: np.ndarray
    to_find: np.ndarray
    finder: np.ndarray
    missed: np.ndarray
    weights: np.ndarray
    ap50: float
    gains: dict[str, float]

    @property
    def found_score(self) -> np.ndarray:
        """``(g,)`` the score by which each object was found, -inf for none."""
        return np.append(self.score, -np.inf)[self.finder]


def find_errors(truth: GroundTruth, results: Table, protocol: Protocol) -> Errors:
    """Sort what is wrong into ``KINDS``; see the module."""
    counts = Counts(truth, results, _at_half(protocol))
    right = (counts.found >= 0) & ~counts.ignored
    wrong = counts.counted & (counts.found < 0) & ~counts.ignored
    to_find = counts.to_find[0]
    finder = np.full(len(to_find), -1)
    finder[counts.found[right]] = np.flatnonzero(right)
    kind, target = _kinds(truth, results, wrong, to_find)
    points = np.isin(kind, (CLASSIFICATION, LOCALISATION))
    missed = to_find & (finder < 0)
    covered = np.zeros(len(to_find), bool)
    covered[target[points]] = True
    averages = _Averages(counts, truth, results, protocol, right, wrong)
    ap50 = averages.mean()

    gains = {}
    # The place -1 is that of no target.
    free = np.append(finder < 0, False)
    best = averages.first_of_each(points & free[target], target)
    for place, name in enumerate(KINDS[:-1]):
        rows = kind == place
        mended = best & rows
        category = results.category.copy()
        category[mended] = truth.objects.category[target[mended]]
        gains[name] = averages.mean(right | mended, wrong & ~rows, category)
    gains["missed"] = averages.mean(gone=missed & ~covered)
    gains["false positives"] = averages.mean(wrong=np.zeros_like(wrong))
    gains["false negatives"] = averages.mean(gone=missed)
    return Errors(
        classes=counts.classes,
        score=results.score,
        counted=counts.counted,
        right=right,
        wrong=wrong,
        found=counts.found,
        kind=kind,
        target=target,
        to_find=to_find,
        finder=finder,
        missed=missed & ~covered,
        weights=counts.weights,
        ap50=ap50,
        gains={name: float(np.maximum(value - ap50, 0)) for name, value in gains.items()},
    )


def best_threshold(errors: Errors) -> tuple[float, float]:
    """The score that maximises F1 of all classes together, 2 right / (right + wrong + objects).

    Returns:
        The score, and F1; (0, 0) where nothing is right.
    """
    rows = np.flatnonzero(errors.right | errors.wrong)
    rows = rows[np.argsort(-errors.score[rows], kind="stable")]
    if not errors.right.any():
        return 0.0, 0.0
    right = np.cumsum(errors.right[rows])
    f1 = 2 * right / (np.arange(1, len(rows) + 1) + np.count_nonzero(errors.to_find))
    score = errors.score[rows]
    f1[:-1][score[:-1] == score[1:]] = 0  # a threshold takes all of a score, or none
    best = int(f1.argmax())
    return float(score[best]), float(f1[best])


def confusion(errors: Errors, truth: GroundTruth, results: Table, least_score: float) -> np.ndarray:
    """Which classes are taken for which, at IoU 0.5 and from a score on.

    What is right stands on the diagonal. Then the other detections take, the best by score first,
    the object of greatest IoU, whatever its class, that is not found and not taken.

    Returns:
        ``(K + 1, K + 1)`` numbers: row the class of the object, column that of the detection, by
        ``errors.classes``; last the background: a row of detections without an object, duplicates
        among them, and a column of missed objects.
    """
    size = len(errors.classes)
    label = np.full(len(truth.classes), -1)
    label[errors.classes] = range(size)
    at_least = results.score >= least_score
    missed = errors.to_find & (errors.found_score < least_score)
    wrong = errors.wrong & at_least
    d, g = _by_image(results, wrong), _by_image(truth.objects, missed)
    pairs = _pairs(results, truth, d, g, MATCH_IOU)
    every, none = np.arange(len(pairs.truth)), np.zeros(len(g), bool)
    taken = greedy(pairs, by_preference(pairs, every, pairs.iou, none), none, len(d))
    hits = np.flatnonzero(taken >= 0)
    confused = g[pairs.truth[taken[hits]]]
    matrix = np.zeros((size + 1, size + 1), np.int64)
    right = results.category[errors.right & at_least]
    np.add.at(matrix, (label[right], label[right]), 1)
    of_objects, of_detections = truth.objects.category, results.category
    np.add.at(matrix, (label[of_objects[confused]], label[of_detections[d[hits]]]), 1)
    np.add.at(matrix, (size, label[of_detections[np.delete(d, hits)]]), 1)
    left = np.setdiff1d(g, confused)
    np.add.at(matrix, (label[of_objects[left]], size), 1)
    return matrix


def _at_half(protocol: Protocol) -> Protocol:
    """What of a protocol tells right from wrong: IoU 0.5, all sizes, all that counts."""
    return replace(
        protocol,
        iou_thresholds=(MATCH_IOU,),
        size_bins=protocol.size_bins[:1],
        max_detections=protocol.max_detections[-1:],
    )


def _kinds(
    truth: GroundTruth, results: Table, wrong: np.ndarray, to_find: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``kind`` and ``target`` of ``Errors``."""
    d, g = _by_image(results, wrong), _by_image(truth.objects, to_find)
    pairs = _pairs(results, truth, d, g, BACKGROUND_IOU)
    same = results.category[d[pairs.detection]] == truth.objects.category[g[pairs.truth]]
    own, own_object = _greatest(pairs, np.flatnonzero(same), len(d))
    other, other_object = _greatest(pairs, np.flatnonzero(~same), len(d))
    tests = {
        LOCALISATION: (own >= BACKGROUND_IOU) & (own <= MATCH_IOU),
        CLASSIFICATION: other >= MATCH_IOU,
        DUPLICATE: own >= MATCH_IOU,
        BACKGROUND: np.maximum(own, other) <= BACKGROUND_IOU,
    }
    kind, target = np.full(len(wrong), -1), np.full(len(wrong), -1)
    kind[d] = np.select([*tests.values()], [*tests], BOTH)
    places = {LOCALISATION: own_object, DUPLICATE: own_object, CLASSIFICATION: other_object}
    for place, objects in places.items():
        rows = kind[d] == place
        target[d[rows]] = g[objects[rows]]
    return kind, target


def _greatest(pairs: Pairs, which: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """``(count,)`` the greatest IoU of each detection in some of its pairs, and the object."""
    which = which[np.lexsort((-pairs.iou[which], pairs.detection[which]))]
    first = which[np.flatnonzero(np.diff(pairs.detection[which], prepend=-1))]
    iou, truth = np.zeros(count), np.full(count, -1)
    iou[pairs.detection[first]], truth[pairs.detection[first]] = (
        pairs.iou[first],
        pairs.truth[first],
    )
    return iou, truth


def _by_image(table: Table, which: np.ndarray) -> np.ndarray:
    """Some rows, by image and descending score."""
    rows = np.flatnonzero(which)
    return rows[np.lexsort((-table.score[rows], table.image[rows]))]


def _pairs(results: Table, truth: GroundTruth, d: np.ndarray, g: np.ndarray, least: float) -> Pairs:
    """Pairs of some detections and objects of any class, numbered as in ``d`` and ``g``."""
    objects = truth.objects
    return overlapping(
        Boxes(results.image[d], results.xywh[d]),
        Boxes(objects.image[g], objects.xywh[g]),
        np.zeros(len(g), bool),
        least,
    )


class _Averages:
    """AP50 by the protocol, and what it would be with other detections and objects."""

    def __init__(
        self,
        counts: Counts,
        truth: GroundTruth,
        results: Table,
        protocol: Protocol,
        right: np.ndarray,
        wrong: np.ndarray,
    ) -> None:
        self._score, self._category, self._weights = results.score, results.category, counts.weights
        self._objects, self._classes = truth.objects.category, counts.classes
        self._in_recall = counts.in_recall[0]
        self._right, self._wrong = right, wrong
        self._protocol = protocol
        # That of ``Counts``: by score, equal scores by image.
        self._order = np.lexsort((results.image, -results.score))

    def mean(
        self,
        right: np.ndarray | None = None,
        wrong: np.ndarray | None = None,
        category: np.ndarray | None = None,
        gone: np.ndarray | None = None,
    ) -> float:
        """In per cent; what is not given stays."""
        right = self._right if right is None else right
        wrong = self._wrong if wrong is None else wrong
        category = self._category if category is None else category
        stays = self._in_recall if gone is None else self._in_recall & ~gone
        objects = np.bincount(self._objects[stays], minlength=len(self._weights))
        rows = self._order[(right | wrong)[self._order]]
        rows = rows[np.argsort(category[rows], kind="stable")]
        per_class = np.split(rows, np.searchsorted(category[rows], range(1, len(objects))))
        classes: Sequence[int] = [k for k in self._classes if objects[k]]
        values = [self._average(per_class[k], right, wrong, objects[k]) for k in classes]
        weights = self._weights[classes]
        return 100 * float(weights @ np.array(values) / weights.sum()) if values else np.nan

    def first_of_each(self, which: np.ndarray, target: np.ndarray) -> np.ndarray:
        """``(n,)`` bool: those of ``which`` that have the greatest score of their target."""
        rows = self._order[which[self._order]]
        first = np.zeros_like(which)
        first[rows[np.unique(target[rows], return_index=True)[1]]] = True
        return first

    def _average(
        self, rows: np.ndarray, right: np.ndarray, wrong: np.ndarray, objects: int
    ) -> float:
        found = curve(self._score[rows], right[rows], wrong[rows], objects)
        return found.average(self._protocol)
