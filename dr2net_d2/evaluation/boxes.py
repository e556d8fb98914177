"""Average precision and recall of boxes under the protocol of a benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dr2net_d2.evaluation.counting import MATCH_IOU, Counts, Matches, count
from dr2net_d2.evaluation.protocols import PROTOCOLS, Metric, Protocol
from dr2net_d2.evaluation.tables import GroundTruth, Table, read_results, read_truth
from dr2net_d2.evaluation.targets import DENSITIES

RESULTS_FILE = Path("inference", "coco_instances_results.json")
"""The detections of a training in COCO format, relative to its output folder."""

EVALUATION_FILE = "evaluation.json"
"""Name of the file that ``Evaluation.save`` writes next to the detections."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics, curves and matches of a set of detections.

    Axes as in pycocotools: T IoU thresholds, R = 101 recalls, K classes, A size bins, M limits of
    the number of detections.

    Attributes:
        protocol: the protocol of the evaluation.
        metrics: the protocol's metrics in their order, then "AP-<class>" if there are several
            classes, in per cent; NaN where there is nothing to find.
        classes: K names.
        per_class, per_size, per_density: name -> {"AP", "AP50", "AR"} in per cent and the numbers
            of "objects" and "images"; a density is a range of objects per image, as "11-100".
        precision, scores: ``(T, R, K, A, M)``; -1 where undefined.
        recall, average_precision: ``(T, K, A, M)``; average precision by the protocol's
            interpolation.
        matches: matches of all detections and objects.
    """

    protocol: Protocol
    metrics: dict[str, float]
    classes: tuple[str, ...]
    per_class: dict[str, dict[str, float]]
    per_size: dict[str, dict[str, float]]
    per_density: dict[str, dict[str, float]]
    precision: np.ndarray
    scores: np.ndarray
    recall: np.ndarray
    average_precision: np.ndarray
    matches: Matches

    def table(self) -> str:
        """Format the protocol's metrics as a Markdown table."""
        names = [metric.name for metric in self.protocol.metrics]
        widths = [max(7, len(name)) for name in names]
        lines = (
            names,
            [f":{'-' * (width - 2)}:" for width in widths],
            [f"{self.metrics[name]:.3f}" for name in names],
        )
        return "\n".join(
            "| " + " | ".join(f"{c:^{w}}" for c, w in zip(line, widths, strict=True)) + " |"
            for line in lines
        )

    def save(self, file: Path) -> None:
        """Write the protocol, the metrics and the tables as JSON; NaN becomes null."""
        content = {
            "protocol": self.protocol.name,
            "description": self.protocol.description,
            "metrics": self.metrics,
            "per_class": self.per_class,
            "per_size": self.per_size,
            "per_density": self.per_density,
        }
        file.write_text(json.dumps(without_nan(content), indent=1) + "\n")


def evaluate_boxes(
    json_file: str | Path,
    results: Sequence[dict[str, Any]],
    protocol: Protocol = PROTOCOLS["coco"],
) -> Evaluation:
    """Compare detections with the ground truth.

    Args:
        json_file: ground truth in COCO format. Missing ``area`` and ``iscrowd`` are filled in;
            "ignore_regions" may be a further table of rows {"image_id", "bbox"}.
        results: ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}``, with the
            ids of the JSON; they are not changed.
        protocol: one of ``PROTOCOLS``, or from ``choose_protocol``.

    Returns:
        The evaluation. Without any detection, its ``metrics`` are NaN and have no "AP-<class>", as
        in Detectron2.

    Raises:
        DatasetError: if the results belong to another dataset or are not finite.
    """
    truth = read_truth(json_file)
    return evaluate_tables(truth, read_results(results, truth), protocol)


def evaluate_tables(truth: GroundTruth, results: Table, protocol: Protocol) -> Evaluation:
    """Do the same as ``evaluate_boxes`` with tables that have been read."""
    counts = count(truth, results, protocol)
    summary = _Summary(counts, truth, protocol)
    return Evaluation(
        protocol=protocol,
        metrics=summary.metrics(len(results.score) > 0),
        classes=truth.classes,
        per_class=summary.per_class(),
        per_size=summary.per_size(),
        per_density=summary.per_density(),
        precision=counts.precision,
        scores=counts.scores,
        recall=counts.recall,
        average_precision=counts.average_precision,
        matches=counts.matches,
    )


def without_nan(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by None, inside dicts and lists, too."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class _Summary:
    """Means over classes and IoU thresholds, in per cent."""

    def __init__(self, counts: Counts, truth: GroundTruth, protocol: Protocol) -> None:
        self._counts, self._truth, self._protocol = counts, truth, protocol
        self._at_half = protocol.iou_thresholds.index(MATCH_IOU)

    def metrics(self, any_results: bool) -> dict[str, float]:
        listed = self._protocol.metrics
        if not any_results:
            return {metric.name: math.nan for metric in listed}
        metrics = {metric.name: self._mean(self._select(metric)) for metric in listed}
        if len(self._truth.classes) > 1:
            main = self._select(listed[0])
            for k in self._counts.targets.classes:
                metrics[f"AP-{self._truth.classes[k]}"] = self._mean(main, [k])
        return metrics

    def per_class(self) -> dict[str, dict[str, float]]:
        category, targets = self._truth.objects.category, self._counts.targets
        return {
            self._truth.classes[k]: self._row(0, targets.to_find[0] & (category == k), [k])
            for k in targets.classes
        }

    def per_size(self) -> dict[str, dict[str, float]]:
        to_find = self._counts.targets.to_find
        return {
            size.name: self._row(a, to_find[a]) for a, size in enumerate(self._protocol.size_bins)
        }

    def per_density(self) -> dict[str, dict[str, float]]:
        targets = self._counts.targets
        rows = {}
        for group, (low, high) in enumerate(zip((-1, *DENSITIES), (*DENSITIES, None), strict=True)):
            precision = self._counts.density_precision[:, :, group]
            inside = targets.density[self._truth.objects.image] == group
            rows[f"{low + 1}-{high}" if high else f"{low + 1}+"] = {
                "AP": self._mean(precision),
                "AP50": self._mean(precision[self._at_half]),
                "AR": self._mean(self._counts.density_recall[:, :, group]),
                "objects": int(np.count_nonzero(targets.to_find[0] & inside)),
                "images": int(np.count_nonzero(targets.density == group)),
            }
        return rows

    def _row(
        self, size: int, objects: np.ndarray, classes: Sequence[int] | None = None
    ) -> dict[str, float]:
        precision = self._counts.average_precision[:, :, size, -1]
        return {
            "AP": self._mean(precision, classes),
            "AP50": self._mean(precision[self._at_half], classes),
            "AR": self._mean(self._counts.recall[:, :, size, -1], classes),
            "objects": int(np.count_nonzero(objects)),
            "images": len(np.unique(self._truth.objects.image[objects])),
        }

    def _select(self, metric: Metric) -> np.ndarray:
        """``(T or 1, K)`` values whose mean is the metric."""
        protocol, counts = self._protocol, self._counts
        values = counts.average_precision if metric.kind == "AP" else counts.recall
        a = [size.name for size in protocol.size_bins].index(metric.size)
        limit = metric.max_detections or protocol.max_detections[-1]
        values = values[:, :, a, protocol.max_detections.index(limit)]
        if metric.iou is None:
            return values
        t = protocol.iou_thresholds.index(metric.iou)
        return values[t : t + 1]

    def _mean(self, values: np.ndarray, classes: Sequence[int] | None = None) -> float:
        """Mean of the defined ones of ``(..., K)`` values, weighted by class, in per cent."""
        targets = self._counts.targets
        columns = targets.classes if classes is None else classes
        chosen = values[..., columns]
        weights = np.where(chosen > -1, targets.class_weights[columns], 0)
        total = weights.sum()
        return 100 * float((chosen * weights).sum() / total) if total else math.nan
