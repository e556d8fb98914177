"""COCO's box metrics through pycocotools, under the names that Detectron2 gives them."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def evaluate_boxes(
    json_file: str | Path, results: Sequence[dict[str, Any]], max_detections: int
) -> dict[str, float]:
    """Average precision of boxes, in per cent.

    Args:
        json_file: ground truth in COCO format; absent ``area`` and ``iscrowd`` are filled in.
        results: ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}``, with the
            ids of the JSON; they are not changed.
        max_detections: how many per image and category count, the best first. COCO's own value
            is 100; crowded scenes need more.

    Returns:
        ``METRICS``, and "AP-<name>" per category where there are several. NaN where nothing of that
        size or category is in the ground truth, and for all of ``METRICS`` without any results.
    """
    if not results:
        return dict.fromkeys(METRICS, math.nan)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _load(Path(json_file))
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    # (thresholds, recalls, categories, areas, 1), -1 where undefined
    precision = evaluation.eval["precision"]
    thresholds = evaluation.params.iouThrs
    areas = evaluation.params.areaRngLbl
    metrics = {
        "AP": _mean(precision[:, :, :, areas.index("all")]),
        "AP50": _mean(precision[np.isclose(thresholds, 0.5), :, :, areas.index("all")]),
        "AP75": _mean(precision[np.isclose(thresholds, 0.75), :, :, areas.index("all")]),
        "APs": _mean(precision[:, :, :, areas.index("small")]),
        "APm": _mean(precision[:, :, :, areas.index("medium")]),
        "APl": _mean(precision[:, :, :, areas.index("large")]),
    }
    if len(truth.cats) > 1:
        for index, category_id in enumerate(evaluation.params.catIds):
            name = truth.cats[category_id]["name"]
            metrics[f"AP-{name}"] = _mean(precision[:, :, index, areas.index("all")])
    return metrics


def _load(json_file: Path) -> COCO:
    coco = COCO()
    coco.dataset = json.loads(json_file.read_bytes())
    for annotation in coco.dataset["annotations"]:
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        annotation.setdefault("iscrowd", 0)
    coco.createIndex()
    return coco


def _mean(precision: np.ndarray) -> float:
    defined = precision[precision > -1]
    return 100 * float(defined.mean()) if defined.size else math.nan
