"""Matches and precision-recall curves of all classes, which every metric is computed from.

Axes: T IoU thresholds, R = 101 recalls, K classes, A size bins, M limits of the number of
detections, D density groups; n detections and g objects, of a class or of the dataset. Undefined
values are -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dr2net_d2.evaluation.curves import RECALLS, UNDEFINED, Curve, curve
from dr2net_d2.evaluation.matching import Boxes, find_candidates, match
from dr2net_d2.evaluation.protocols import Protocol
from dr2net_d2.evaluation.tables import GroundTruth, Table
from dr2net_d2.evaluation.targets import (
    DENSITIES,
    Targets,
    find_targets,
    outside,
    rank_detections,
)

MATCH_IOU = 0.5
"""IoU threshold of ``Matches``."""


@dataclass(frozen=True, eq=False)
class Matches:
    """Matches of n detections and g objects at IoU 0.5 and all sizes.

    Detections are in the order of the results, objects in the order of the JSON's annotations.

    Attributes:
        truth: ``(n,)`` object that each detection is matched with, or -1.
        overlap: ``(n,)`` IoU with that object, or the share of the detection inside it where the
            protocol goes by that; 0 without a match.
        counted: ``(n,)`` bool, detections within the protocol's limit and outside ignore regions.
        ignored: ``(n,)`` bool, counted detections that are neither correct nor wrong: matched with
            an ignored object, or unmatched and outside the protocol's range of sizes.
        detection: ``(g,)`` detection matched with each object, that of the highest score where
            there may be several; or -1.
        truth_ignored: ``(g,)`` bool, objects that are not to be found: ignored, inside an ignore
            region, or of a class that is not evaluated.
    """

    truth: np.ndarray
    overlap: np.ndarray
    counted: np.ndarray
    ignored: np.ndarray
    detection: np.ndarray
    truth_ignored: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """``(n,)`` bool, true positives."""
        return (self.truth >= 0) & ~self.ignored

    @property
    def wrong(self) -> np.ndarray:
        """``(n,)`` bool, false positives."""
        return self.counted & (self.truth < 0) & ~self.ignored

    @property
    def to_find(self) -> np.ndarray:
        """``(g,)`` bool, objects that the detector should find."""
        return ~self.truth_ignored

    @property
    def missed(self) -> np.ndarray:
        """``(g,)`` bool, false negatives."""
        return (self.detection < 0) & self.to_find


@dataclass(frozen=True, eq=False)
class ClassDetections:
    """The n counted detections of a class, by image and descending score.

    Attributes:
        boxes: their boxes.
        score: ``(n,)``.
        rank: ``(n,)`` int, rank by score, from 0, among the detections that share a limit.
        density: ``(n,)`` int, density group of the image.
    """

    boxes: Boxes
    score: np.ndarray
    rank: np.ndarray
    density: np.ndarray


@dataclass(frozen=True, eq=False)
class ClassObjects:
    """The g objects of a class, by image.

    Attributes:
        boxes: their boxes.
        crowd: ``(g,)`` bool.
        to_find, in_recall: ``(A, g)`` bool, as in ``Targets``.
        density: ``(g,)`` int, density group of the image.
    """

    boxes: Boxes
    crowd: np.ndarray
    to_find: np.ndarray
    in_recall: np.ndarray
    density: np.ndarray


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """The results of a class with n detections.

    Attributes:
        precision, scores: ``(T, R, A, M)``.
        recall, average_precision: ``(T, A, M)``.
        density_recall, density_precision: ``(T, D)`` recall and average precision at all sizes, in
            the images of a density group.
        truth, overlap, ignored: ``(n,)``, as in ``Matches``, for the objects of the class.
    """

    precision: np.ndarray
    scores: np.ndarray
    recall: np.ndarray
    average_precision: np.ndarray
    density_recall: np.ndarray
    density_precision: np.ndarray
    truth: np.ndarray
    overlap: np.ndarray
    ignored: np.ndarray


@dataclass(frozen=True, eq=False)
class Counts:
    """The results of all classes.

    Attributes:
        targets: what the detector should find.
        precision, scores: ``(T, R, K, A, M)``.
        recall, average_precision: ``(T, K, A, M)``.
        density_recall, density_precision: ``(T, K, D)``, as in ``ClassCounts``.
        matches: matches of all detections and objects.
    """

    targets: Targets
    precision: np.ndarray
    scores: np.ndarray
    recall: np.ndarray
    average_precision: np.ndarray
    density_recall: np.ndarray
    density_precision: np.ndarray
    matches: Matches


def count(truth: GroundTruth, results: Table, protocol: Protocol) -> Counts:
    """Match and count the detections of every class."""
    targets = find_targets(truth, protocol)
    objects, classes = truth.objects, len(truth.classes)
    rows, rank = rank_detections(truth, results, protocol)
    detections_of = _split_by_class(rows, results.category, classes)
    rank_of = _split_by_class(rows, results.category, classes, rank)
    rows = np.flatnonzero(targets.kept)
    rows = rows[np.lexsort((objects.image[rows], objects.category[rows]))]
    objects_of = _split_by_class(rows, objects.category, classes)

    axes = (
        len(protocol.iou_thresholds),
        classes,
        len(protocol.size_bins),
        len(protocol.max_detections),
    )
    sampled = (axes[0], len(RECALLS), *axes[1:])
    grouped = (*axes[:2], len(DENSITIES) + 1)
    precision, scores = np.full(sampled, -1.0), np.full(sampled, -1.0)
    recall, average_precision = np.full(axes, -1.0), np.full(axes, -1.0)
    density_recall, density_precision = np.full(grouped, -1.0), np.full(grouped, -1.0)
    n = len(results.score)
    matched, overlap = np.full(n, -1), np.zeros(n)
    counted, ignored = np.zeros(n, bool), np.zeros(n, bool)
    for k in targets.classes:
        d, g = detections_of[k], objects_of[k]
        result = count_class(
            ClassDetections(
                boxes=Boxes(results.image[d], results.xywh[d]),
                score=results.score[d],
                rank=rank_of[k],
                density=targets.density[results.image[d]],
            ),
            ClassObjects(
                boxes=Boxes(objects.image[g], objects.xywh[g]),
                crowd=objects.crowd[g],
                to_find=targets.to_find[:, g],
                in_recall=targets.in_recall[:, g],
                density=targets.density[objects.image[g]],
            ),
            protocol,
        )
        precision[:, :, k], scores[:, :, k] = result.precision, result.scores
        recall[:, k], average_precision[:, k] = result.recall, result.average_precision
        density_recall[:, k] = result.density_recall
        density_precision[:, k] = result.density_precision
        hits = result.truth >= 0
        matched[d[hits]] = g[result.truth[hits]]
        overlap[d], ignored[d], counted[d] = result.overlap, result.ignored, True
    return Counts(
        targets=targets,
        precision=precision,
        scores=scores,
        recall=recall,
        average_precision=average_precision,
        density_recall=density_recall,
        density_precision=density_precision,
        matches=Matches(
            truth=matched,
            overlap=overlap,
            counted=counted,
            ignored=ignored,
            detection=_best_detections(matched, results.score, len(objects.image)),
            truth_ignored=~targets.to_find[0],
        ),
    )


def count_class(
    detections: ClassDetections, objects: ClassObjects, protocol: Protocol
) -> ClassCounts:
    """Match and count the detections of one class."""
    candidates = find_candidates(
        detections.boxes,
        objects.boxes,
        crowd=objects.crowd,
        ignored=~objects.to_find,
        minimum=min(protocol.iou_thresholds),
        reuse_ignored=protocol.ignores_parts,
    )
    out_of_bin = [outside(detections.boxes.area, size) for size in protocol.size_bins]
    by_score = np.argsort(-detections.score, kind="stable")
    score, rank = detections.score[by_score], detections.rank[by_score]
    density, densities = detections.density[by_score], len(DENSITIES) + 1
    within_limit = [np.flatnonzero(rank < limit) for limit in protocol.max_detections]
    in_density = [np.flatnonzero(density == group) for group in range(densities)]
    objects_in_bin = np.count_nonzero(objects.in_recall, axis=1).tolist()
    density_of_objects = objects.density[objects.in_recall[0]]
    objects_in_density = np.bincount(density_of_objects, minlength=densities).tolist()

    curves: list[Curve] = []
    density_curves: list[Curve] = []
    for threshold in protocol.iou_thresholds:
        for a, (pair, on_ignored) in enumerate(match(candidates, threshold)):
            matched = pair >= 0
            ignored = np.where(matched, on_ignored, out_of_bin[a])
            correct, wrong = (matched & ~ignored)[by_score], (~matched & ~ignored)[by_score]
            number = [objects_in_bin[a]] * len(within_limit)
            curves += _curves(score, correct, wrong, within_limit, number)
            if a == 0:
                density_curves += _curves(score, correct, wrong, in_density, objects_in_density)
                if threshold == MATCH_IOU:
                    at_match_iou = pair, ignored

    axes = (len(protocol.iou_thresholds), len(out_of_bin), len(within_limit))
    grouped = (axes[0], densities)
    sampled = (*axes, len(RECALLS))
    pair, ignored = at_match_iou
    hits = np.flatnonzero(pair >= 0)
    truth, overlap = np.full(len(pair), -1), np.zeros(len(pair))
    truth[hits] = candidates.pairs.truth[pair[hits]]
    overlap[hits] = candidates.overlap[0][pair[hits]]
    return ClassCounts(
        precision=np.moveaxis(np.reshape([c.precision for c in curves], sampled), -1, 1),
        scores=np.moveaxis(np.reshape([c.scores for c in curves], sampled), -1, 1),
        recall=np.reshape([c.recall for c in curves], axes),
        average_precision=np.reshape([c.average(protocol) for c in curves], axes),
        density_recall=np.reshape([c.recall for c in density_curves], grouped),
        density_precision=np.reshape([c.average(protocol) for c in density_curves], grouped),
        truth=truth,
        overlap=overlap,
        ignored=ignored,
    )


def _curves(
    score: np.ndarray,
    correct: np.ndarray,
    wrong: np.ndarray,
    subsets: Sequence[np.ndarray],
    objects: Sequence[int],
) -> list[Curve]:
    """Compute the curves of subsets of the detections, each with its number of objects."""
    return [
        curve(score[rows], correct[rows], wrong[rows], number) if number else UNDEFINED
        for rows, number in zip(subsets, objects, strict=True)
    ]


def _best_detections(matched: np.ndarray, score: np.ndarray, objects: int) -> np.ndarray:
    """``(objects,)`` the detection of the highest score that each object is matched with."""
    rows = np.flatnonzero(matched >= 0)
    rows = rows[np.argsort(score[rows], kind="stable")]
    detection = np.full(objects, -1)
    # Of several assignments to one element the last one stays.
    detection[matched[rows]] = rows
    return detection


def _split_by_class(
    rows: np.ndarray, category: np.ndarray, classes: int, values: np.ndarray | None = None
) -> list[np.ndarray]:
    """Split rows that are sorted by class, or values of these rows, into one array per class."""
    bounds = np.searchsorted(category[rows], range(1, classes))
    return np.split(rows if values is None else values, bounds)
