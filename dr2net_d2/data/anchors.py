"""Anchors that fit the objects of a dataset, and a measure of how well anchors fit.

Shapes are (width, height) in pixels. As in Detectron2 and torchvision, the size of an anchor is the
square root of its area, and its aspect ratio is height / width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MAX_POINTS = 128
"""Maximum number of points in ``best_centres``; more values are replaced by their quantiles."""

_REACHES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Multiples of a level's stride at which its range of sizes may start."""
_SAMPLE = 20_000  # number of objects on which the reaches are compared


@dataclass(frozen=True, eq=False)
class Objects:
    """Objects as a detector sees them in training.

    Attributes:
        boxes: ``(n, 4)``, XYXY in pixels.
        image_sizes: ``(n, 2)``, width and height in pixels of each object's padded image.
    """

    boxes: np.ndarray
    image_sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def shapes(self) -> np.ndarray:
        """Width and height of each object, ``(n, 2)``."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    @property
    def sizes(self) -> np.ndarray:
        """Square root of each object's area, ``(n,)``, in pixels."""
        return np.sqrt(self.shapes.prod(axis=1))

    def __getitem__(self, chosen: np.ndarray | slice) -> Objects:
        return Objects(self.boxes[chosen], self.image_sizes[chosen])


@dataclass(frozen=True)
class Anchors:
    """The anchors at each location of each level of a feature pyramid.

    Attributes:
        strides: strides of the levels, in pixels, ascending.
        sizes: sizes of each level's anchors, in pixels.
        aspect_ratios: aspect ratios of each level's anchors; each size comes with each ratio.
        offset: distance of the first location from the corner of the image, in strides.
    """

    strides: Sequence[int]
    sizes: Sequence[Sequence[float]]
    aspect_ratios: Sequence[Sequence[float]]
    offset: float = 0.0

    def best_ious(self, objects: Objects) -> np.ndarray:
        """IoU of each object with the best anchor of all levels and locations, ``(n,)``."""
        shapes, centres = objects.shapes, objects.boxes.reshape(-1, 2, 2).mean(axis=1)
        areas, best = shapes.prod(axis=1), np.zeros(len(objects))
        levels = zip(self.strides, self.sizes, self.aspect_ratios, strict=True)
        for stride, sizes, aspect_ratios in levels:
            # Among anchors of one shape the nearest has the largest overlap, along each axis.
            last = np.ceil(objects.image_sizes / stride) - 1
            nearest = np.rint(centres / stride - self.offset).clip(0, last)
            distance = np.abs(centres - (nearest + self.offset) * stride)
            for size in sizes:
                for ratio in aspect_ratios:
                    anchor = size * np.array([ratio**-0.5, ratio**0.5])
                    overlap = (shapes + anchor) / 2 - distance
                    overlap = np.minimum(overlap, np.minimum(shapes, anchor)).clip(min=0)
                    intersection = overlap.prod(axis=1)
                    union = areas + size**2 - intersection
                    np.maximum(best, intersection / union, out=best)
        return best


def iou_of_sizes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of concentric boxes with equal aspect ratios, from their sizes."""
    return np.asarray((np.minimum(a, b) / np.maximum(a, b)) ** 2)


def iou_of_ratios(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of concentric boxes with equal areas, from their aspect ratios."""
    intersection = np.sqrt(np.minimum(a, b) / np.maximum(a, b))  # for boxes of area 1
    return np.asarray(intersection / (2 - intersection))


def best_centres(
    values: np.ndarray, count: int, iou: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> list[float]:
    """The k-means of YOLOv2 (arXiv 1612.08242, section 2), distance 1 - IoU, in one dimension.

    In one dimension clusters are intervals, so dynamic programming finds the optimum, which Lloyd's
    iterations may miss. Each centre is one of the values, because the mean distance is concave
    between two of them.

    Args:
        values: ``(n,)``, positive; if more than ``MAX_POINTS`` differ, quantiles are used instead.
        count: number of centres; there are fewer if fewer values differ.
        iou: IoU of two arrays of values, which decreases with their distance.

    Returns:
        The centres, ascending, with the largest mean IoU of a value with its nearest centre.
    """
    points, weights = np.unique(values, return_counts=True)
    if len(points) > MAX_POINTS:
        middles = (np.arange(MAX_POINTS) + 0.5) / MAX_POINTS
        points, weights = np.unique(np.quantile(values, middles), return_counts=True)
    n, count = len(points), min(count, len(points))
    # As one cluster, points i to j - 1 have the centre centre[i, j] and the distance cost[i, j].
    cost = np.full((n + 1, n + 1), np.inf)
    centre = np.zeros((n + 1, n + 1), dtype=np.int64)
    for middle, point in enumerate(points):
        cumulative = np.concatenate([[0.0], np.cumsum(weights * (1 - iou(points, point)))])
        with_point = cumulative - cumulative[:, None]
        better = (with_point < cost) & (np.arange(n + 1)[:, None] < np.arange(n + 1))
        cost[better], centre[better] = with_point[better], middle
    # In k + 1 clusters, points 0 to j - 1 cost least[j] after round k, and the last cluster starts
    # at point starts[k - 1][j].
    least, starts = cost[0], []
    for _ in range(count - 1):
        sums = least[:, None] + cost
        starts.append(sums.argmin(axis=0))
        least = sums.min(axis=0)
    # From the last cluster to the first.
    centres, end = [], n
    for start_of in reversed(starts):
        start = start_of[end]
        centres.append(float(points[centre[start, end]]))
        end = start
    centres.append(float(points[centre[0, end]]))
    return [*reversed(centres)]


def propose_anchors(
    objects: Objects, strides: Sequence[int], sizes: int, ratios: int, offset: float = 0.0
) -> Anchors:
    """Propose anchors for the objects of a dataset.

    Each level is responsible for a range of sizes that starts at a multiple of its stride, so finer
    levels get smaller objects, and no level gets objects that are small compared with its stride.
    Among a few multiples, the one with the highest mean IoU with the best anchor is chosen.

    Args:
        objects: at least one object.
        strides: strides of the levels, in pixels, ascending.
        sizes: number of sizes per level. If a level has fewer different objects, the other sizes
            are spread over its range.
        ratios: number of aspect ratios per level.
        offset: distance of the first location from the corner of the image, in strides.
    """
    shapes, sample = objects.shapes, objects[:: len(objects) // _SAMPLE + 1]
    centres = best_centres(shapes[:, 1] / shapes[:, 0], ratios, iou_of_ratios)
    aspect_ratios = [[round(ratio, 2) for ratio in centres]] * len(strides)

    def with_reach(reach: float) -> Anchors:
        edges = reach * np.array([*strides, 2 * strides[-1]])
        level_of = np.digitize(objects.sizes, edges[1:-1])
        per_level = []
        for level, (low, high) in enumerate(pairwise(edges)):
            own = objects.sizes[level_of == level]
            fitted = best_centres(own, sizes, iou_of_sizes) if len(own) else []
            spread = low * (high / low) ** ((np.arange(sizes) + 0.5) / sizes)
            per_level.append(sorted([*fitted, *spread[len(fitted) :].tolist()]))
        rounded = [[float(f"{size:.3g}") for size in level] for level in per_level]
        return Anchors(strides, rounded, aspect_ratios, offset)

    return max(map(with_reach, _REACHES), key=lambda anchors: anchors.best_ious(sample).mean())
