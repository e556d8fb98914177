"""Which objects the detector should find, and which detections count, by the protocol.

Axes: K classes, A size bins, n detections and g objects of the dataset.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dr2net_d2.evaluation.ignore_regions import in_ignore_regions
from dr2net_d2.evaluation.protocols import Protocol, SizeBin
from dr2net_d2.evaluation.tables import GroundTruth, Table

DENSITIES = (10, 100, 1000)
"""Upper bounds of the density groups, in objects per image; the last group has no bound."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What the detector should find.

    Attributes:
        classes: positions of the evaluated classes.
        class_weights: ``(K,)`` weight of each class in means.
        kept: ``(g,)`` bool, objects outside ignore regions.
        to_find: ``(A, g)`` bool, objects that a size bin does not ignore.
        in_recall: ``(A, g)`` bool, objects that recall is relative to.
        density: ``(images,)`` int, density group of each image.
    """

    classes: list[int]
    class_weights: np.ndarray
    kept: np.ndarray
    to_find: np.ndarray
    in_recall: np.ndarray
    density: np.ndarray


def find_targets(truth: GroundTruth, protocol: Protocol) -> Targets:
    """Find out which objects the protocol evaluates, and how classes and images are grouped."""
    objects, images, classes = truth.objects, len(truth.image_ids), len(truth.classes)
    evaluated = [k for k, name in enumerate(truth.classes) if name not in protocol.left_out]
    kept = _outside_regions(objects, truth, protocol)
    candidates = kept & np.isin(objects.category, evaluated)
    in_bin = ~np.array([outside(objects.area, size) for size in protocol.size_bins])
    to_find = candidates & ~objects.crowd & in_bin
    per_image = np.bincount(objects.image[to_find[0]], minlength=images)
    weights = np.ones(classes)
    if protocol.class_weights == "images":
        groups = np.unique((objects.category * images + objects.image)[candidates])
        weights = np.bincount(groups // images, minlength=classes).astype(float)
    return Targets(
        classes=evaluated,
        class_weights=weights,
        kept=kept,
        to_find=to_find,
        in_recall=candidates & in_bin if protocol.recall_of_ignored else to_find,
        density=np.searchsorted(DENSITIES, per_image, side="left"),
    )


def rank_detections(
    truth: GroundTruth, results: Table, protocol: Protocol
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the detections that compete for a limit: of an image, or of a class in an image.

    Returns:
        Rows of the detections within the largest limit, by class, image and descending score; and
        their ranks by score, from 0.
    """
    rows = np.flatnonzero(_outside_regions(results, truth, protocol))
    score, image = -results.score[rows], results.image[rows]
    group = results.category[rows] * len(truth.image_ids) + image
    order = np.lexsort((score, group))
    competition, ranking = group, order
    if protocol.per_image:
        competition, ranking = image, np.lexsort((score, image))
    starts = np.flatnonzero(np.diff(competition[ranking], prepend=-1))
    sizes = np.diff(starts, append=len(rows))
    rank = np.empty(len(rows), np.int64)
    rank[ranking] = np.arange(len(rows)) - np.repeat(starts, sizes)
    counted = order[rank[order] < protocol.max_detections[-1]]
    return rows[counted], rank[counted]


def outside(area: np.ndarray, size: SizeBin) -> np.ndarray:
    """``(n,)`` bool, boxes whose area lies outside a size bin."""
    return (area < size.low) | (area > size.high)


def _outside_regions(table: Table, truth: GroundTruth, protocol: Protocol) -> np.ndarray:
    """``(n,)`` bool, boxes that the protocol does not drop for lying in an ignore region."""
    if not protocol.ignore_regions or not len(truth.regions):
        return np.ones(len(table.image), bool)
    regions = (truth.region_image, truth.regions, truth.sizes)
    return ~in_ignore_regions(table.image, table.xywh, *regions)
