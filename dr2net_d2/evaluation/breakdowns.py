"""What an evaluation says by size, density, score and image, as rows of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dr2net_d2.evaluation.boxes import Evaluation
from dr2net_d2.evaluation.curves import RECALLS
from dr2net_d2.evaluation.error_kinds import CLASSIFICATION, DUPLICATE, KINDS, LOCALISATION, Errors
from dr2net_d2.evaluation.tables import GroundTruth, Table

SCORES = (0.0, 0.1, 0.3, 0.5, 0.7)
"""Recall is given for the detections from each of these scores on."""

SIDES = (0, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, math.inf)
"""Bounds in px of the groups by size; a side is the root of the annotated area."""

CROWDS = (1, 3, 6, 11, 21, 51, 101, 201, 501, math.inf)
"""Bounds of the groups by the number of objects of an image."""

SCORE_EDGES = np.linspace(0, 1, 21)

Row = dict[str, Any]


def recall_by_side(errors: Errors, truth: GroundTruth) -> list[Row]:
    """How many objects of each size are found; groups from the first to the last with objects."""
    return _recall(errors, np.sqrt(truth.objects.area), SIDES)


def kinds_by_side(
    errors: Errors, truth: GroundTruth, results: Table, least_score: float
) -> list[Row]:
    """How many errors of each kind, by the side of the detection, or of the missed object.

    Of detections from a score on; "missed" are all objects that are not found by one of them, but
    those that a classification or localisation error from there on points to.
    """
    kept = (errors.kind >= 0) & (errors.score >= least_score)
    covered = np.zeros(len(errors.to_find), bool)
    covered[errors.target[kept & np.isin(errors.kind, (CLASSIFICATION, LOCALISATION))]] = True
    missed = errors.to_find & (errors.found_score < least_score) & ~covered
    sides = np.sqrt(np.append(results.area[kept], truth.objects.area[missed]))
    kind = np.append(errors.kind[kept], np.full(np.count_nonzero(missed), KINDS.index("missed")))
    numbers = np.zeros((len(SIDES) - 1, len(KINDS)), int)
    np.add.at(numbers, (np.searchsorted(SIDES, sides, "right") - 1, kind), 1)
    inhabited = np.flatnonzero(numbers.any(axis=1)).tolist()
    return [
        {**_group(SIDES, index), "kinds": dict(zip(KINDS, numbers[index].tolist(), strict=True))}
        for index in (range(inhabited[0], inhabited[-1] + 1) if inhabited else ())
    ]


def recall_by_density(errors: Errors, truth: GroundTruth) -> list[Row]:
    """How many objects are found, by how many their image has; and how many "images"."""
    image = truth.objects.image
    per_image = np.bincount(image[errors.to_find], minlength=len(truth.image_ids))
    rows = _recall(errors, per_image[image], CROWDS)
    for row in rows:
        high = math.inf if row["high"] is None else row["high"]
        row["images"] = int(np.count_nonzero((per_image >= row["low"]) & (per_image < high)))
    return rows


def curves_by_size(evaluation: Evaluation, weights: np.ndarray, iou: float) -> list[Row]:
    """Mean precision of the classes at 101 recalls, for each size bin that has objects.

    "AP" is the protocol's own; where it does not interpolate at 101 recalls, it is not quite the
    mean of the precision.

    Args:
        weights: ``(K,)`` of the classes.
        iou: one of the protocol's thresholds.
    """
    protocol = evaluation.protocol
    t = protocol.iou_thresholds.index(iou)
    rows = []
    for a, size in enumerate(protocol.size_bins):
        average = evaluation.average_precision[t, :, a, -1]
        valid = (average > -1) & (weights > 0)
        if not valid.any():
            continue
        share = weights[valid] / weights[valid].sum()
        precision = evaluation.precision[t, :, valid, a, -1].T
        row = {"size": size.name, "AP": 100 * float(average[valid] @ share)}
        objects = evaluation.per_size[size.name]["objects"]
        rows.append({**row, "objects": objects, "precision": (precision @ share).tolist()})
    return rows


def recalls() -> list[float]:
    """Where ``curves_by_size`` has its precision."""
    return RECALLS.tolist()


def by_score(errors: Errors) -> Row:
    """Histograms of the counted detections over ``SCORE_EDGES``: right, duplicate, other wrong."""
    duplicate = errors.kind == DUPLICATE
    groups = {
        "right": errors.right,
        "duplicate": duplicate,
        "otherwise wrong": errors.wrong & ~duplicate,
    }
    numbers = {
        name: np.histogram(np.clip(errors.score[rows], 0, 1), SCORE_EDGES)[0].tolist()
        for name, rows in groups.items()
    }
    return {"edges": SCORE_EDGES.tolist(), **numbers}


def calibration(errors: Errors) -> list[Row]:
    """Per bin of scores: the mean "score", and "precision", the share of what is right."""
    either = errors.right | errors.wrong
    score, right = errors.score[either], errors.right[either]
    place = np.clip(np.searchsorted(SCORE_EDGES, score, "right") - 1, 0, len(SCORE_EDGES) - 2)
    rows = []
    for index in np.unique(place).tolist():
        inside = place == index
        row = {"low": float(SCORE_EDGES[index]), "high": float(SCORE_EDGES[index + 1])}
        row |= {"detections": int(inside.sum()), "score": float(score[inside].mean())}
        rows.append({**row, "precision": float(right[inside].mean())})
    return rows


def duplicate_overlaps(errors: Errors, results: Table, least_score: float) -> Row:
    """How much duplicates overlap the detection that has their object.

    Returns:
        "duplicates": how many from ``least_score`` on; "objects": that they are on; "iou": bounds
        of "removed", the share that has at least that IoU, so that a suppression there removes it.
    """
    rows = np.flatnonzero((errors.kind == DUPLICATE) & (errors.score >= least_score))
    first = results.xywh[errors.finder[errors.target[rows]]]
    iou = _iou(results.xywh[rows], first)
    bounds = np.linspace(0.3, 1, 15)
    removed = [float((iou >= bound).mean()) if len(iou) else None for bound in bounds]
    objects = len(np.unique(errors.target[rows]))
    result = {"score": least_score, "duplicates": len(rows), "objects": objects}
    return {**result, "iou": bounds.tolist(), "removed": removed}


def largest_confusions(matrix: np.ndarray, names: Sequence[str], most: int = 20) -> list[Row]:
    """The pairs of classes that are confused most often, of the matrix of ``errors.confusion``."""
    between = matrix[:-1, :-1] * ~np.eye(len(names), dtype=bool)
    objects = matrix[:-1].sum(axis=1)
    order = np.argsort(-between, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, between.shape), strict=True)
    return [
        {
            "object": names[row],
            "detected as": names[column],
            "number": int(between[row, column]),
            "share": float(between[row, column] / objects[row]),
        }
        for row, column in pairs
        if between[row, column]
    ]


def per_class(errors: Errors, truth: GroundTruth, results: Table, least_score: float) -> list[Row]:
    """By class: found, missed and wrong from a score on, precision and recall there."""
    rows = []
    at_least = errors.score >= least_score
    for k in errors.classes:
        objects = int(np.count_nonzero(errors.to_find & (truth.objects.category == k)))
        own = at_least & (results.category == k)
        right, wrong = (int(np.count_nonzero(own & rows)) for rows in (errors.right, errors.wrong))
        row = {"class": truth.classes[k], "found": right, "missed": objects - right, "wrong": wrong}
        row["precision"] = right / (right + wrong) if right + wrong else None
        rows.append({**row, "recall": right / objects if objects else None})
    return rows


def per_image(errors: Errors, truth: GroundTruth, results: Table, least_score: float) -> Row:
    """``(images,)`` numbers from a score on: "missed" objects, "wrong" detections, and of these
    "wrong class", which are classification errors, and "duplicates"."""
    count = len(truth.image_ids)
    missed = errors.to_find & (errors.found_score < least_score)
    at_least = errors.score >= least_score
    confused, duplicate = errors.kind == CLASSIFICATION, errors.kind == DUPLICATE
    return {
        "missed": np.bincount(truth.objects.image[missed], minlength=count),
        "wrong": np.bincount(results.image[errors.wrong & at_least], minlength=count),
        "wrong class": np.bincount(results.image[confused & at_least], minlength=count),
        "duplicates": np.bincount(results.image[duplicate & at_least], minlength=count),
    }


def _group(bounds: Sequence[float], index: int) -> Row:
    high = bounds[index + 1]
    return {"low": bounds[index], "high": high if high < math.inf else None}


def _recall(errors: Errors, value: np.ndarray, bounds: Sequence[float]) -> list[Row]:
    """Of the objects by a value of each; "low" <= value < "high", which is None without a bound."""
    to_find = errors.to_find
    place = np.searchsorted(bounds, value, "right") - 1
    inhabited = np.unique(place[to_find])
    rows = []
    for index in range(inhabited.min(), inhabited.max() + 1) if len(inhabited) else ():
        score = errors.found_score[to_find & (place == index)]
        row: Row = {**_group(bounds, index), "objects": len(score)}
        row["found"] = int(np.isfinite(score).sum())
        row["recall"] = {
            f"{least:g}": float((score >= least).mean()) if len(score) else None for least in SCORES
        }
        rows.append(row)
    return rows


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``(n,)`` of n pairs of XYWH."""
    low = np.maximum(first[:, :2], second[:, :2])
    high = np.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    return shared / (first[:, 2:].prod(axis=1) + second[:, 2:].prod(axis=1) - shared)
