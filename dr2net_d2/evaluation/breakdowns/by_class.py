"""Errors by class and by image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dr2net_d2.evaluation.error_kinds import CLASSIFICATION, DUPLICATE, Errors
from dr2net_d2.evaluation.tables import GroundTruth, Table


@dataclass(frozen=True)
class Confusion:
    """How often objects of a class are detected as another class.

    Attributes:
        actual, predicted: names of the classes.
        number: number of objects.
        share: share of all objects of the actual class.
    """

    actual: str
    predicted: str
    number: int
    share: float


@dataclass(frozen=True)
class ClassErrors:
    """Numbers, precision and recall of a class at a score threshold."""

    name: str
    matched: int
    missed: int
    wrong: int
    precision: float
    recall: float


@dataclass(frozen=True, eq=False)
class ImageErrors:
    """Numbers of errors per image at a score threshold.

    Attributes:
        missed: ``(images,)`` int, missed objects.
        wrong: ``(images,)`` int, wrong detections.
        wrong_class, duplicates: ``(images,)`` int, wrong detections of these kinds.
    """

    missed: np.ndarray
    wrong: np.ndarray
    wrong_class: np.ndarray
    duplicates: np.ndarray


def largest_confusions(
    matrix: np.ndarray, names: Sequence[str], limit: int = 20
) -> list[Confusion]:
    """The most frequent confusions of two classes, in descending order.

    Args:
        matrix: ``(K + 1, K + 1)``, from ``error_kinds.confusion``.
        names: K names of classes.
        limit: maximum number of confusions.
    """
    between = matrix[:-1, :-1] * ~np.eye(len(names), dtype=bool)
    objects = matrix[:-1].sum(axis=1)
    order = np.argsort(-between, axis=None, kind="stable")[:limit]
    pairs = zip(*np.unravel_index(order, between.shape), strict=True)
    return [
        Confusion(
            actual=names[row],
            predicted=names[column],
            number=int(between[row, column]),
            share=float(between[row, column] / objects[row]),
        )
        for row, column in pairs
        if between[row, column]
    ]


def errors_by_class(
    errors: Errors, truth: GroundTruth, results: Table, minimum_score: float
) -> list[ClassErrors]:
    """Numbers of each evaluated class, with the detections from a minimum score on."""
    matches, kept = errors.matches, errors.score >= minimum_score
    rows = []
    for k in errors.classes:
        objects = int(np.count_nonzero(matches.to_find & (truth.objects.category == k)))
        own = kept & (results.category == k)
        correct = int(np.count_nonzero(own & matches.correct))
        wrong = int(np.count_nonzero(own & matches.wrong))
        rows.append(
            ClassErrors(
                name=truth.classes[k],
                matched=correct,
                missed=objects - correct,
                wrong=wrong,
                precision=correct / (correct + wrong) if correct + wrong else math.nan,
                recall=correct / objects if objects else math.nan,
            )
        )
    return rows


def errors_by_image(
    errors: Errors, truth: GroundTruth, results: Table, minimum_score: float
) -> ImageErrors:
    """Numbers of errors of each image, with the detections from a minimum score on."""
    kept = errors.score >= minimum_score
    missed = errors.matches.to_find & (errors.matched_score < minimum_score)

    def per_image(rows: np.ndarray) -> np.ndarray:
        return np.bincount(results.image[rows & kept], minlength=len(truth.image_ids))

    return ImageErrors(
        missed=np.bincount(truth.objects.image[missed], minlength=len(truth.image_ids)),
        wrong=per_image(errors.matches.wrong),
        wrong_class=per_image(errors.kind == CLASSIFICATION),
        duplicates=per_image(errors.kind == DUPLICATE),
    )
