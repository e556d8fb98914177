"""The numbers of a report, which the page, the charts and report.json are made from.

Undefined numbers are NaN. "At the threshold" means with only the detections whose score is at least
that of the best F1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dr2net_d2.evaluation import (
    KINDS,
    Errors,
    Evaluation,
    GroundTruth,
    Protocol,
    Table,
    best_threshold,
    breakdowns,
    confusion,
)

CURVE_IOUS = (0.5, 0.75)
"""IoU thresholds of the precision-recall curves, where the protocol has them."""


@dataclass(frozen=True)
class Totals:
    """Numbers of images, boxes and regions.

    Attributes:
        images, detections: number of all images and detections.
        objects: number of objects to find.
        ignored_objects: number of other objects.
        ignore_regions: number of ignore regions, 0 if the protocol has no use for them.
        not_counted: number of detections beyond the protocol's limit or inside ignore regions.
    """

    images: int
    objects: int
    ignored_objects: int
    ignore_regions: int
    detections: int
    not_counted: int


@dataclass(frozen=True)
class Threshold:
    """The score with the best F1 over all classes, and the results at this threshold.

    Attributes:
        score: the threshold.
        f1, precision, recall: shares.
        correct, wrong: number of detections.
    """

    score: float
    f1: float
    correct: int
    wrong: int
    precision: float
    recall: float


@dataclass(frozen=True)
class Summary:
    """Metrics of a class or a size bin, in per cent, and its numbers of objects and images."""

    ap: float
    ap50: float
    ar: float
    objects: int
    images: int

    @classmethod
    def of(cls, row: Mapping[str, float]) -> Summary:
        """Take a row of ``Evaluation.per_class`` or ``per_size``."""
        numbers = int(row["objects"]), int(row["images"])
        return cls(row["AP"], row["AP50"], row["AR"], *numbers)


@dataclass(frozen=True)
class ClassResult:
    """Metrics of a class, and its errors at the threshold."""

    errors: breakdowns.ClassErrors
    summary: Summary


@dataclass(frozen=True)
class KindResult:
    """A kind of errors.

    Attributes:
        kind: one of ``KINDS``.
        gain: gain in AP50, in points, if all errors of the kind were fixed.
        number: number of errors at any score.
        number_at_threshold: number of errors at the threshold.
    """

    kind: str
    gain: float
    number: int
    number_at_threshold: int


@dataclass(frozen=True)
class WorstImage:
    """An image with many errors at the threshold.

    Attributes:
        position: its position in the ground truth.
        image_id, file_name: as in the JSON.
        missed: number of missed objects.
        wrong: number of wrong detections.
        wrong_class, duplicates: number of wrong detections of these kinds.
    """

    position: int
    image_id: int
    file_name: str
    missed: int
    wrong: int
    wrong_class: int
    duplicates: int


@dataclass(frozen=True, eq=False)
class Content:
    """All numbers of a report.

    Attributes:
        dataset, results: name of the dataset, path of the detections.
        protocol: the protocol of the evaluation.
        totals: numbers of images, objects and detections.
        metrics: the metrics of the protocol and "AP-<class>", in per cent.
        classes: the results of every evaluated class.
        threshold: the score with the best F1.
        ap50: AP50 in per cent.
        kinds: every kind of errors, in the order of ``KINDS``.
        gain_without_false_positives, gain_without_false_negatives: in points of AP50.
        kinds_by_size: errors at the threshold by size.
        sizes, densities: recall by the size of the object and by the number of objects per image.
        size_bins: name of the protocol's size bin -> its metrics.
        curves: IoU threshold -> curve of every size bin with objects.
        confusion: ``(K + 1, K + 1)`` int at the threshold, from ``confusion``, for K ``classes``.
        largest_confusions: the most frequent ones.
        scores, calibration, duplicates: breakdowns by score, and overlaps of duplicates.
        worst: images with errors, the worst first.
    """

    dataset: str
    results: str
    protocol: Protocol
    totals: Totals
    metrics: Mapping[str, float]
    classes: Sequence[ClassResult]
    threshold: Threshold
    ap50: float
    kinds: Sequence[KindResult]
    gain_without_false_positives: float
    gain_without_false_negatives: float
    kinds_by_size: Sequence[breakdowns.KindsGroup]
    sizes: Sequence[breakdowns.RecallGroup]
    densities: Sequence[breakdowns.RecallGroup]
    size_bins: Mapping[str, Summary]
    curves: Mapping[float, Sequence[breakdowns.SizeCurve]]
    confusion: np.ndarray
    largest_confusions: Sequence[breakdowns.Confusion]
    scores: breakdowns.ScoreHistogram
    calibration: Sequence[breakdowns.CalibrationBin]
    duplicates: breakdowns.DuplicateOverlap
    worst: Sequence[WorstImage]

    @property
    def class_names(self) -> list[str]:
        """Names of the evaluated classes."""
        return [row.errors.name for row in self.classes]


def gather(
    evaluation: Evaluation,
    errors: Errors,
    truth: GroundTruth,
    results: Table,
    *,
    dataset: str,
    results_file: str,
    file_names: Mapping[int, str],
    worst_images: int,
) -> Content:
    """Compute all numbers of a report.

    Args:
        evaluation, errors, truth, results: of the same detections.
        dataset, results_file: where the detections are from.
        file_names: image_id -> file name.
        worst_images: maximum number of worst images.
    """
    protocol = evaluation.protocol
    threshold = _threshold(errors)
    score = threshold.score
    matrix = confusion(errors, truth, results, score)
    kinds_by_size = breakdowns.kinds_by_side(errors, truth, results, score)
    return Content(
        dataset=dataset,
        results=results_file,
        protocol=protocol,
        totals=_totals(errors, truth, protocol),
        metrics=evaluation.metrics,
        classes=[
            ClassResult(row, Summary.of(evaluation.per_class[row.name]))
            for row in breakdowns.errors_by_class(errors, truth, results, score)
        ],
        threshold=threshold,
        ap50=errors.ap50,
        kinds=_kinds(errors, kinds_by_size),
        gain_without_false_positives=errors.gains["false positives"],
        gain_without_false_negatives=errors.gains["false negatives"],
        kinds_by_size=kinds_by_size,
        sizes=breakdowns.recall_by_side(errors, truth, score),
        densities=breakdowns.recall_by_density(errors, truth, score),
        size_bins={name: Summary.of(row) for name, row in evaluation.per_size.items()},
        curves={
            iou: breakdowns.curves_by_size(evaluation, errors.class_weights, iou)
            for iou in CURVE_IOUS
            if iou in protocol.iou_thresholds
        },
        confusion=matrix,
        largest_confusions=breakdowns.largest_confusions(
            matrix, [truth.classes[k] for k in errors.classes]
        ),
        scores=breakdowns.score_histogram(errors),
        calibration=breakdowns.calibration(errors),
        duplicates=breakdowns.duplicate_overlaps(errors, results, score),
        worst=_worst_images(errors, truth, results, score, file_names, worst_images),
    )


def _threshold(errors: Errors) -> Threshold:
    score, f1 = best_threshold(errors)
    kept, matches = errors.score >= score, errors.matches
    correct = int(np.count_nonzero(matches.correct & kept))
    wrong = int(np.count_nonzero(matches.wrong & kept))
    objects = int(np.count_nonzero(matches.to_find))
    return Threshold(
        score=score,
        f1=f1,
        correct=correct,
        wrong=wrong,
        precision=correct / (correct + wrong) if correct + wrong else math.nan,
        recall=correct / objects if objects else math.nan,
    )


def _totals(errors: Errors, truth: GroundTruth, protocol: Protocol) -> Totals:
    to_find = errors.matches.to_find
    objects = int(np.count_nonzero(to_find))
    return Totals(
        images=len(truth.image_ids),
        objects=objects,
        ignored_objects=len(to_find) - objects,
        ignore_regions=len(truth.regions) if protocol.ignore_regions else 0,
        detections=len(errors.score),
        not_counted=int(np.count_nonzero(~errors.matches.counted)),
    )


def _kinds(errors: Errors, by_size: Sequence[breakdowns.KindsGroup]) -> list[KindResult]:
    numbers = [np.count_nonzero(errors.kind == number) for number in range(len(KINDS) - 1)]
    return [
        KindResult(
            kind=kind,
            gain=errors.gains[kind],
            number=int(number),
            number_at_threshold=sum(group.numbers[kind] for group in by_size),
        )
        for kind, number in zip(KINDS, [*numbers, errors.missed.sum()], strict=True)
    ]


def _worst_images(
    errors: Errors,
    truth: GroundTruth,
    results: Table,
    score: float,
    file_names: Mapping[int, str],
    limit: int,
) -> list[WorstImage]:
    numbers = breakdowns.errors_by_image(errors, truth, results, score)
    total = numbers.missed + numbers.wrong
    order = np.argsort(-total, kind="stable")[:limit]
    return [
        WorstImage(
            position=position,
            image_id=int(truth.image_ids[position]),
            file_name=file_names[int(truth.image_ids[position])],
            missed=int(numbers.missed[position]),
            wrong=int(numbers.wrong[position]),
            wrong_class=int(numbers.wrong_class[position]),
            duplicates=int(numbers.duplicates[position]),
        )
        for position in order[total[order] > 0].tolist()
    ]
