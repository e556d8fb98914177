"""Average precision and recall of boxes by the protocol of a benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dr2net_d2.evaluation.counting import DENSITIES, MATCH_IOU, Counts
from dr2net_d2.evaluation.protocols import PROTOCOLS, Metric, Protocol
from dr2net_d2.evaluation.tables import GroundTruth, Table, read_results, read_truth

RESULTS_FILE = Path("inference", "coco_instances_results.json")
"""Where in its output folder a training leaves the detections, in COCO format."""

EVALUATION_FILE = "evaluation.json"
"""What ``Evaluation.save`` writes, beside the detections."""


@dataclass(frozen=True, eq=False)
class Matches:
    """Which detection found which object, at IoU 0.5 and all sizes.

    n detections are in the order of the results, g objects in that of the JSON's annotations.

    Attributes:
        truth: ``(n,)`` the object that each detection found, -1 for none.
        overlap: ``(n,)`` IoU with it, the share of the detection where that is what counts; or 0.
        counted: ``(n,)`` bool: among the best that the protocol looks at, outside ignore regions.
        ignored: ``(n,)`` bool: counted, and neither right nor wrong: on an ignored object, or
            without one and of a size that the protocol does not know.
        detection: ``(g,)`` the detection that found each object, the best where several may; or -1.
        truth_ignored: ``(g,)`` bool: not to be found: ignored, in a region, or of such a class.
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
    def missed(self) -> np.ndarray:
        """``(g,)`` bool, false negatives."""
        return (self.detection < 0) & ~self.truth_ignored


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What ``evaluate_boxes`` finds. Axes: T IoU thresholds, R = 101 recalls, K classes, A size
    bins, M numbers of detections, as in pycocotools.

    Attributes:
        protocol: by which it was counted.
        metrics: in per cent, the protocol's in its order, then "AP-<class>" where there are
            several classes; NaN where nothing of that kind is to be found.
        classes: K names.
        per_class, per_size, per_density: by name, {"AP", "AP50", "AR"} in per cent and "objects",
            "images" as numbers; a density is such as "11-100" objects an image.
        precision, scores: ``(T, R, K, A, M)``; -1 where undefined.
        recall, average_precision: ``(T, K, A, M)``, the latter by the protocol's interpolation.
        matches: of each detection and object.
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
        """The protocol's metrics, in Markdown."""
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
        """Write metrics and tables as JSON, with the protocol in front; NaN becomes null."""
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
    """Compare detections with a ground truth.

    Args:
        json_file: ground truth in COCO format; absent ``area`` and ``iscrowd`` are filled in.
            "ignore_regions" is a further table of rows {"image_id", "bbox"}.
        results: ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}``, with the
            ids of the JSON; they are not changed.
        protocol: one of ``PROTOCOLS``, or ``choose_protocol``.

    Returns:
        Its ``metrics`` are those of the protocol alone, and all NaN, without any result, as
        Detectron2 has it.

    Raises:
        DatasetError: results that cannot be of this dataset, or are not finite.
    """
    truth = read_truth(json_file)
    return evaluate_tables(truth, read_results(results, truth), protocol)


def evaluate_tables(truth: GroundTruth, results: Table, protocol: Protocol) -> Evaluation:
    """``evaluate_boxes`` of what has been read."""
    counts = Counts(truth, results, protocol)
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
        matches=_matches(counts),
    )


def without_nan(value: Any) -> Any:
    """NaN, which JSON does not have, as None, in dicts and lists, too."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _matches(counts: Counts) -> Matches:
    # Of several detections on a crowd the best stays, as the last of several assignments does.
    detection = np.full(counts.to_find.shape[1], -1)
    rows = np.flatnonzero(counts.found >= 0)
    rows = rows[np.argsort(counts.score[rows], kind="stable")]
    detection[counts.found[rows]] = rows
    return Matches(
        truth=counts.found,
        overlap=counts.overlap,
        counted=counts.counted,
        ignored=counts.ignored,
        detection=detection,
        truth_ignored=~counts.to_find[0],
    )


class _Summary:
    """Means of the counts, in per cent."""

    def __init__(self, counts: Counts, truth: GroundTruth, protocol: Protocol) -> None:
        self._counts, self._truth, self._protocol = counts, truth, protocol

    def metrics(self, any_results: bool) -> dict[str, float]:
        listed = self._protocol.metrics
        if not any_results:
            return {metric.name: math.nan for metric in listed}
        metrics = {metric.name: self._mean(self._select(metric)) for metric in listed}
        if len(self._truth.classes) > 1:
            main = self._select(listed[0])
            for k in self._counts.classes:
                metrics[f"AP-{self._truth.classes[k]}"] = self._mean(main, [k])
        return metrics

    def per_class(self) -> dict[str, dict[str, float]]:
        category = self._truth.objects.category
        return {
            self._truth.classes[k]: self._row(0, self._counts.to_find[0] & (category == k), [k])
            for k in self._counts.classes
        }

    def per_size(self) -> dict[str, dict[str, float]]:
        bins = enumerate(self._protocol.size_bins)
        return {size.name: self._row(a, self._counts.to_find[a]) for a, size in bins}

    def per_density(self) -> dict[str, dict[str, float]]:
        counts = self._counts
        rows = {}
        for index, (low, high) in enumerate(zip((-1, *DENSITIES), (*DENSITIES, None), strict=True)):
            precision = counts.density_precision[:, :, index]
            half = precision[self._protocol.iou_thresholds.index(MATCH_IOU)]
            inside = counts.density[self._truth.objects.image] == index
            rows[f"{low + 1}-{high}" if high else f"{low + 1}+"] = {
                "AP": self._mean(precision),
                "AP50": self._mean(half),
                "AR": self._mean(counts.density_recall[:, :, index]),
                "objects": int(np.count_nonzero(counts.to_find[0] & inside)),
                "images": int(np.count_nonzero(counts.density == index)),
            }
        return rows

    def _row(
        self, size: int, objects: np.ndarray, classes: Sequence[int] | None = None
    ) -> dict[str, float]:
        precision = self._counts.average_precision[:, :, size, -1]
        half = precision[self._protocol.iou_thresholds.index(MATCH_IOU)]
        return {
            "AP": self._mean(precision, classes),
            "AP50": self._mean(half, classes),
            "AR": self._mean(self._counts.recall[:, :, size, -1], classes),
            "objects": int(np.count_nonzero(objects)),
            "images": len(np.unique(self._truth.objects.image[objects])),
        }

    def _select(self, metric: Metric) -> np.ndarray:
        """``(T or 1, K)`` of what the metric is the mean of."""
        protocol, counts = self._protocol, self._counts
        values = counts.average_precision if metric.kind == "AP" else counts.recall
        a = [size.name for size in protocol.size_bins].index(metric.size)
        most = metric.max_detections or protocol.max_detections[-1]
        values = values[:, :, a, protocol.max_detections.index(most)]
        if metric.iou is None:
            return values
        t = protocol.iou_thresholds.index(metric.iou)
        return values[t : t + 1]

    def _mean(self, values: np.ndarray, classes: Sequence[int] | None = None) -> float:
        """In per cent, over the last axis by the weights of the classes."""
        columns = self._counts.classes if classes is None else classes
        chosen = values[..., columns]
        weights = np.where(chosen > -1, self._counts.weights[columns], 0)
        total = weights.sum()
        return 100 * float((chosen * weights).sum() / total) if total else math.nan
