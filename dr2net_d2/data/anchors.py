"""Anchors that fit the objects of a dataset, and how well any anchors do.

Shapes are (width, height) in px; a size is the square root of an anchor's area, an aspect ratio is
height / width, as Detectron2 and torchvision have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MAX_POINTS = 128
"""Quantiles that stand for more values than that in ``best_centres``."""

_REACHES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
_JUDGED = 20_000  # objects that tell which reach is best


@dataclass(frozen=True, eq=False)
class Objects:
    """Objects as a detector in training gets them.

    Attributes:
        boxes: ``(n, 4)`` XYXY in px.
        image_sizes: ``(n, 2)`` width and height, in px, of the padded image that each is in.
    """

    boxes: np.ndarray
    image_sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def shapes(self) -> np.ndarray:
        """``(n, 2)``."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    @property
    def sizes(self) -> np.ndarray:
        """``(n,)``, in px."""
        return np.sqrt(self.shapes.prod(axis=1))

    def __getitem__(self, chosen: np.ndarray | slice) -> Objects:
        return Objects(self.boxes[chosen], self.image_sizes[chosen])


@dataclass(frozen=True)
class Anchors:
    """The anchors of every location of every level.

    Attributes:
        strides: of the levels, in px, ascending.
        sizes, aspect_ratios: a list for each level.
        offset: of the first location from the corner of the image, in strides.
    """

    strides: Sequence[int]
    sizes: Sequence[Sequence[float]]
    aspect_ratios: Sequence[Sequence[float]]
    offset: float = 0.0

    def best_ious(self, objects: Objects) -> np.ndarray:
        """IoU of every object with the best anchor of all levels and locations: ``(n,)``."""
        shapes, centres = objects.shapes, objects.boxes.reshape(-1, 2, 2).mean(axis=1)
        areas, best = shapes.prod(axis=1), np.zeros(len(objects))
        levels = zip(self.strides, self.sizes, self.aspect_ratios, strict=True)
        for stride, sizes, aspect_ratios in levels:
            # Of anchors of one shape the nearest has the largest overlap, along each axis.
            last = np.ceil(objects.image_sizes / stride) - 1
            nearest = np.rint(centres / stride - self.offset).clip(0, last)
            distance = np.abs(centres - (nearest + self.offset) * stride)
            for size in sizes:
                for ratio in aspect_ratios:
                    anchor = size * np.array([ratio**-0.5, ratio**0.5])
                    overlap = (shapes + anchor) / 2 - distance
                    overlap = np.minimum(overlap, np.minimum(shapes, anchor)).clip(min=0)
                    shared = overlap.prod(axis=1)
                    np.maximum(best, shared / (areas + size**2 - shared), out=best)
        return best


def iou_of_sizes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of concentric boxes of one aspect ratio, from their sizes."""
    return np.asarray((np.minimum(a, b) / np.maximum(a, b)) ** 2)


def iou_of_ratios(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of concentric boxes of one area, from their aspect ratios."""
    shared = np.sqrt(np.minimum(a, b) / np.maximum(a, b))
    return np.asarray(shared / (2 - shared))


def best_centres(
    values: np.ndarray, count: int, iou: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> list[float]:
    """The k-means of YOLOv2 (arXiv 1612.08242, section 2), distance 1 - IoU, in one dimension.

    There clusters are intervals, so dynamic programming finds the optimum, which Lloyd's iterations
    may miss. A centre is one of the values: between two of them the mean distance is concave.

    Args:
        values: ``(n,)``, positive; more than ``MAX_POINTS`` different ones are taken as quantiles.
        count: of centres; fewer are found among fewer different values.
        iou: of two arrays of values, falling with their distance.

    Returns:
        Centres in ascending order, with the largest mean IoU of a value with its nearest centre.
    """
    points, weights = np.unique(values, return_counts=True)
    if len(points) > MAX_POINTS:
        middles = (np.arange(MAX_POINTS) + 0.5) / MAX_POINTS
        points, weights = np.unique(np.quantile(values, middles), return_counts=True)
    n, count = len(points), min(count, len(points))
    # cost[i, j]: of points i to j - 1 as one cluster, whose centre is centre[i, j].
    cost = np.full((n + 1, n + 1), np.inf)
    centre = np.zeros((n + 1, n + 1), dtype=np.int64)
    for middle, point in enumerate(points):
        until = np.concatenate([[0.0], np.cumsum(weights * (1 - iou(points, point)))])
        of_this = until - until[:, None]
        better = (of_this < cost) & (np.arange(n + 1)[:, None] < np.arange(n + 1))
        cost[better], centre[better] = of_this[better], middle
    # least[j]: of points 0 to j - 1 in as many clusters as there were rounds.
    least, starts = cost[0], []
    for _ in range(count - 1):
        sums = least[:, None] + cost
        starts.append(sums.argmin(axis=0))
        least = sums.min(axis=0)
    found, end = [], n
    for row in reversed(starts):
        found.append(float(points[centre[row[end], end]]))
        end = row[end]
    return [float(points[centre[0, end]]), *reversed(found)]


def propose_anchors(
    objects: Objects, strides: Sequence[int], sizes: int, ratios: int, offset: float = 0.0
) -> Anchors:
    """Anchors for the objects of a dataset.

    Each level has the objects of a range of sizes, which starts at a multiple of its stride: finer
    levels have the smaller objects, and none is looked for where locations are too far apart. The
    multiple is the one of a few with which the best IoUs are highest on average.

    Args:
        objects: at least one.
        strides: of the levels, in px, ascending.
        sizes, ratios: how many per level. Sizes of a level without as many different objects are
            spread over its range.
        offset: of the locations.
    """
    shapes, judged = objects.shapes, objects[:: len(objects) // _JUDGED + 1]
    centres = best_centres(shapes[:, 1] / shapes[:, 0], ratios, iou_of_ratios)
    aspect_ratios = [[round(ratio, 2) for ratio in centres]] * len(strides)

    def with_reach(reach: float) -> Anchors:
        edges = reach * np.array([*strides, 2 * strides[-1]])
        level_of = np.digitize(objects.sizes, edges[1:-1])
        per_level = []
        for level, (low, high) in enumerate(pairwise(edges)):
            own = objects.sizes[level_of == level]
            found = best_centres(own, sizes, iou_of_sizes) if len(own) else []
            spread = low * (high / low) ** ((np.arange(sizes) + 0.5) / sizes)
            per_level.append(sorted([*found, *spread[len(found) :].tolist()]))
        rounded = [[float(f"{size:.3g}") for size in level] for level in per_level]
        return Anchors(strides, rounded, aspect_ratios, offset)

    return max(map(with_reach, _REACHES), key=lambda anchors: anchors.best_ious(judged).mean())
