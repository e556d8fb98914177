"""The format of report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dr2net_d2.evaluation import breakdowns, without_nan
from dr2net_d2.report.content import ClassResult, Content, Summary, WorstImage

Window = tuple[int, int, int, int]


def to_json(content: Content, windows: Sequence[Window]) -> dict[str, Any]:
    """Convert a report to the types of JSON; undefined numbers become None.

    Args:
        content: of the report.
        windows: XYWH in pixels of the region shown of each of the worst images.
    """
    threshold, totals, duplicates = content.threshold, content.totals, content.duplicates
    data = {
        "dataset": content.dataset,
        "results": content.results,
        "protocol": {
            "name": content.protocol.name,
            "description": content.protocol.description,
        },
        "counts": {
            "images": totals.images,
            "objects": totals.objects,
            "ignored objects": totals.ignored_objects,
            "ignore regions": totals.ignore_regions,
            "detections": totals.detections,
            "not counted": totals.not_counted,
        },
        "metrics": {**content.metrics},
        "per_class": [_class(row) for row in content.classes],
        "threshold": {
            "score": threshold.score,
            "F1": threshold.f1,
            "right": threshold.correct,
            "wrong": threshold.wrong,
            "precision": threshold.precision,
            "recall": threshold.recall,
        },
        "errors": {
            "AP50": content.ap50,
            "kinds": [
                {
                    "kind": row.kind,
                    "gain": row.gain,
                    "number": row.number,
                    "number at threshold": row.number_at_threshold,
                }
                for row in content.kinds
            ],
            "false positives": content.gain_without_false_positives,
            "false negatives": content.gain_without_false_negatives,
            "by_size": [
                {**_bounds(group), "kinds": group.numbers} for group in content.kinds_by_size
            ],
        },
        "sizes": {
            "groups": [
                {**_recall(group), "found_at_threshold": group.matched_at_threshold}
                for group in content.sizes
            ],
            "protocol": {name: _summary(row) for name, row in content.size_bins.items()},
        },
        "curves": {
            "recall": [*breakdowns.CURVE_RECALLS],
            "by_iou": {
                f"{iou:g}": [_curve(curve) for curve in curves]
                for iou, curves in content.curves.items()
            },
        },
        "confusion": {
            "classes": content.class_names,
            "matrix": content.confusion.tolist(),
            "largest": [
                {
                    "object": row.actual,
                    "detected as": row.predicted,
                    "number": row.number,
                    "share": row.share,
                }
                for row in content.largest_confusions
            ],
        },
        "scores": {
            "edges": content.scores.edges,
            "right": content.scores.correct,
            "duplicate": content.scores.duplicate,
            "otherwise wrong": content.scores.other_wrong,
        },
        "duplicates": {
            "score": duplicates.minimum_score,
            "duplicates": duplicates.duplicates,
            "objects": duplicates.objects,
            "iou": duplicates.iou,
            "removed": duplicates.removed,
        },
        "calibration": [
            {
                **_bounds(row),
                "detections": row.detections,
                "score": row.score,
                "precision": row.precision,
            }
            for row in content.calibration
        ],
        "density": [{**_recall(group), "images": group.images} for group in content.densities],
        "worst": [
            _worst(image, window) for image, window in zip(content.worst, windows, strict=True)
        ],
    }
    without: dict[str, Any] = without_nan(data)
    return without


def _class(row: ClassResult) -> dict[str, Any]:
    return {
        "class": row.errors.name,
        "found": row.errors.matched,
        "missed": row.errors.missed,
        "wrong": row.errors.wrong,
        "precision": row.errors.precision,
        "recall": row.errors.recall,
        **_summary(row.summary),
    }


def _summary(row: Summary) -> dict[str, float]:
    return {
        "AP": row.ap,
        "AP50": row.ap50,
        "AR": row.ar,
        "objects": row.objects,
        "images": row.images,
    }


def _curve(curve: breakdowns.SizeCurve) -> dict[str, Any]:
    return {
        "size": curve.size,
        "AP": curve.average_precision,
        "objects": curve.objects,
        "precision": curve.precision,
    }


def _recall(group: breakdowns.RecallGroup) -> dict[str, Any]:
    recall: Mapping[str, float] = {f"{score:g}": value for score, value in group.recall.items()}
    return {**_bounds(group), "objects": group.objects, "found": group.matched, "recall": recall}


def _bounds(
    group: breakdowns.RecallGroup | breakdowns.KindsGroup | breakdowns.CalibrationBin,
) -> dict[str, float | None]:
    return {"low": group.low, "high": None if math.isinf(group.high) else group.high}


def _worst(image: WorstImage, window: Window) -> dict[str, Any]:
    return {
        "image_id": image.image_id,
        "file_name": image.file_name,
        "missed": image.missed,
        "wrong": image.wrong,
        "wrong class": image.wrong_class,
        "duplicates": image.duplicates,
        "window": [*window],
    }
