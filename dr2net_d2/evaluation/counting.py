"""The counting behind ``evaluate_boxes``, class by class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dr2net_d2.evaluation.curves import RECALLS, curve
from dr2net_d2.evaluation.ignore_regions import in_ignore_regions
from dr2net_d2.evaluation.matching import Boxes, by_preference, contested, greedy, overlapping
from dr2net_d2.evaluation.protocols import Protocol, SizeBin
from dr2net_d2.evaluation.tables import GroundTruth, Table

DENSITIES = (10, 100, 1000)
"""Images are grouped by how many objects they have: up to each of these, and more."""

MATCH_IOU = 0.5


class Counts:
    """All numbers of an evaluation. Axes: T IoU thresholds, R recalls, K classes, A size bins,
    M numbers of detections, D densities, n detections, g objects; -1 where undefined.

    Attributes:
        precision, scores: ``(T, R, K, A, M)``.
        recall, average_precision: ``(T, K, A, M)``.
        density_recall, density_precision: ``(T, K, D)``, of all sizes, of the images of a density.
        to_find: ``(A, g)`` bool, objects that a size bin does not ignore.
        density: ``(images,)`` of each image, from 0.
        weights: ``(K,)`` of the classes in means.
        found: ``(n,)`` the object that each detection takes at ``MATCH_IOU`` and all sizes, or -1.
        overlap: ``(n,)`` what it was taken by.
        counted, ignored: ``(n,)`` bool.
        score: ``(n,)``.
        classes: positions of those that are evaluated.
    """

    def __init__(self, truth: GroundTruth, results: Table, protocol: Protocol) -> None:
        self._truth, self._results, self._protocol = truth, results, protocol
        self.score = results.score
        objects = truth.objects
        shape = (
            len(protocol.iou_thresholds),
            len(truth.classes),
            len(protocol.size_bins),
            len(protocol.max_detections),
        )
        self.recall, self.average_precision = np.full(shape, -1.0), np.full(shape, -1.0)
        sampled = (shape[0], len(RECALLS), *shape[1:])
        self.precision, self.scores = np.full(sampled, -1.0), np.full(sampled, -1.0)
        by_density = (*shape[:2], len(DENSITIES) + 1)
        self.density_recall, self.density_precision = (np.full(by_density, -1.0) for _ in range(2))

        self.classes = [k for k, name in enumerate(truth.classes) if name not in protocol.left_out]
        kept_objects = self._outside_regions(objects)
        evaluated = kept_objects & np.isin(objects.category, self.classes)
        outside = np.array([_outside(objects.area, size) for size in protocol.size_bins])
        self.to_find = evaluated & ~objects.crowd & ~outside
        self.in_recall = evaluated & ~outside if protocol.recall_of_ignored else self.to_find
        per_image = np.bincount(objects.image[self.to_find[0]], minlength=len(truth.image_ids))
        self.density = np.searchsorted(DENSITIES, per_image, side="left")
        self.weights = np.ones(len(truth.classes))
        if protocol.class_weights == "images":
            images = len(truth.image_ids)
            groups = np.unique((objects.category * images + objects.image)[evaluated])
            self.weights = np.bincount(groups // images, minlength=len(truth.classes)).astype(float)

        count = len(results.score)
        self.found, self.overlap = np.full(count, -1), np.zeros(count)
        self.counted, self.ignored = np.zeros(count, bool), np.zeros(count, bool)
        rows = np.flatnonzero(kept_objects)
        rows = rows[np.lexsort((objects.image[rows], objects.category[rows]))]
        self._objects = self._by_class(rows, objects.category)
        self._rank_detections()
        for k in self.classes:
            self._count_class(k)

    def _outside_regions(self, table: Table) -> np.ndarray:
        if not self._protocol.ignore_regions or not len(self._truth.regions):
            return np.ones(len(table.image), bool)
        truth = self._truth
        regions = (truth.region_image, truth.regions, truth.sizes)
        return ~in_ignore_regions(table.image, table.xywh, *regions)

    def _rank_detections(self) -> None:
        """Those that count, by class, image and descending score, and their ranks by score."""
        results = self._results
        rows = np.flatnonzero(self._outside_regions(results))
        score, image = -results.score[rows], results.image[rows]
        group = results.category[rows] * len(self._truth.image_ids) + image
        order = np.lexsort((score, group))
        # Those that compete for the places of a limit stand together in these.
        rivals, ranked = group, order
        if self._protocol.per_image:
            rivals, ranked = image, np.lexsort((score, image))
        starts = np.flatnonzero(np.diff(rivals[ranked], prepend=-1))
        sizes = np.diff(starts, append=len(rows))
        self._rank = np.zeros(len(results.score), np.int64)
        self._rank[rows[ranked]] = np.arange(len(rows)) - np.repeat(starts, sizes)
        counted = rows[order]
        counted = counted[self._rank[counted] < self._protocol.max_detections[-1]]
        self._detections = self._by_class(counted, results.category)

    def _by_class(self, rows: np.ndarray, category: np.ndarray) -> list[np.ndarray]:
        """Rows that are sorted by class, per class."""
        return np.split(rows, np.searchsorted(category[rows], range(1, len(self.weights))))

    def _count_class(self, k: int) -> None:
        protocol, objects, results = self._protocol, self._truth.objects, self._results
        d, g = self._detections[k], self._objects[k]
        detections = Boxes(results.image[d], results.xywh[d])
        outside = [_outside(detections.area, size) for size in protocol.size_bins]
        matching = _Matching(
            detections,
            Boxes(objects.image[g], objects.xywh[g]),
            objects.crowd[g],
            ~self.to_find[:, g],
            protocol,
        )
        by_score = np.argsort(-results.score[d], kind="stable")
        score, rank = results.score[d[by_score]], self._rank[d[by_score]]
        limits = [np.flatnonzero(rank < most) for most in protocol.max_detections]
        group = self.density[detections.image[by_score]]
        densities = [np.flatnonzero(group == index) for index in range(len(DENSITIES) + 1)]
        to_find = np.count_nonzero(self.in_recall[:, g], axis=1)
        group = self.density[objects.image[g[self.in_recall[0, g]]]]
        to_find_by_density = np.bincount(group, minlength=len(densities))
        for t, threshold in enumerate(protocol.iou_thresholds):
            for a, (pairs, ignored) in enumerate(matching.at(threshold)):
                taken = pairs >= 0
                aside = np.where(taken, ignored, outside[a])
                if a == 0 and threshold == MATCH_IOU:
                    self.counted[d], self.ignored[d] = True, aside
                    self.found[d[taken]] = g[matching.pairs.truth[pairs[taken]]]
                    self.overlap[d[taken]] = matching.values[0][pairs[taken]]
                right, wrong = (taken & ~aside)[by_score], (~taken & ~aside)[by_score]
                for m, rows in enumerate(limits if to_find[a] else ()):
                    found = curve(score[rows], right[rows], wrong[rows], to_find[a])
                    self.precision[t, :, k, a, m], self.scores[t, :, k, a, m] = found[:2]
                    self.recall[t, k, a, m] = found.recall
                    self.average_precision[t, k, a, m] = found.average(self._protocol)
                for index, rows in enumerate(densities if a == 0 else ()):
                    if number := to_find_by_density[index]:
                        found = curve(score[rows], right[rows], wrong[rows], number)
                        self.density_recall[t, k, index] = found.recall
                        self.density_precision[t, k, index] = found.average(self._protocol)


class _Matching:
    """Which detection of a class takes which object, at every threshold and in every size bin.

    Attributes:
        pairs: that may be taken.
        values: A arrays, the overlap of each pair.
    """

    def __init__(
        self,
        detections: Boxes,
        truth: Boxes,
        crowd: np.ndarray,
        ignored: np.ndarray,
        protocol: Protocol,
    ) -> None:
        self._ignored, self._count = ignored, len(detections.image)
        parts = protocol.ignores_parts
        coverable: np.ndarray = np.any(ignored, axis=0) if parts else crowd
        least = min(protocol.iou_thresholds)
        self.pairs = pairs = overlapping(detections, truth, coverable, least)
        self._reusable = [bin_ignored if parts else crowd for bin_ignored in ignored]
        self.values = [np.where(r[pairs.truth], pairs.cover, pairs.iou) for r in self._reusable]
        # Elsewhere all size bins have the same matches.
        kinds = np.unique(np.concatenate([ignored, crowd[None]]), axis=1, return_inverse=True)[1]
        self._contested = (
            np.ones(self._count, bool) if parts else contested(pairs, kinds.ravel(), self._count)
        )
        rows = np.flatnonzero(self._contested[pairs.detection])
        which = [np.arange(len(pairs.truth)), *[rows] * (len(ignored) - 1)]
        self._ordered = [
            by_preference(pairs, *arguments)
            for arguments in zip(which, self.values, ignored, strict=True)
        ]

    def at(self, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Per size bin: the pair that each detection takes, -1 for none; whether it is ignored."""
        threshold = min(threshold, 1 - 1e-10)
        first: np.ndarray | None = None
        for ordered, values, ignored, reusable in zip(
            self._ordered, self.values, self._ignored, self._reusable, strict=True
        ):
            enough = ordered[values[ordered] >= threshold]
            taken = greedy(self.pairs, enough, reusable, self._count)
            if first is None:
                first = taken
            else:
                taken = np.where(self._contested, taken, first)
            aside = taken >= 0
            aside[aside] = ignored[self.pairs.truth[taken[aside]]]
            yield taken, aside


def _outside(area: np.ndarray, size: SizeBin) -> np.ndarray:
    return (area < size.low) | (area > size.high)
