"""Which detection finds which object: greedy by score, for whole datasets at once.

Detections and objects of one class are numbered through all images, detections of an image by
descending score. A pair is a detection and an object of its image that overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_CHUNK = 1 << 21
_SPAN = 1 << 22


@dataclass(frozen=True, eq=False)
class Boxes:
    """n boxes of one class.

    Attributes:
        image: ``(n,)`` int64, ascending.
        xywh: ``(n, 4)`` float64 in px.
    """

    image: np.ndarray
    xywh: np.ndarray

    @property
    def area(self) -> np.ndarray:
        """``(n,)``, in px²."""
        return self.xywh[:, 2] * self.xywh[:, 3]


@dataclass(frozen=True, eq=False)
class Pairs:
    """m overlapping pairs, by ascending detection.

    Attributes:
        detection, truth: ``(m,)`` int64.
        iou: ``(m,)`` intersection over union.
        cover: ``(m,)`` intersection over the detection's area.
    """

    detection: np.ndarray
    truth: np.ndarray
    iou: np.ndarray
    cover: np.ndarray


def overlapping(detections: Boxes, truth: Boxes, coverable: np.ndarray, least: float) -> Pairs:
    """All pairs with an IoU, or where ``coverable`` a cover, of at least ``least``.

    In the arithmetic of pycocotools, so that its decisions at a threshold are the same.

    Args:
        coverable: ``(n,)`` bool per object.
    """
    d_area, g_area = detections.area, truth.area
    d_low, g_low = detections.xywh[:, :2], truth.xywh[:, :2]
    d_high, g_high = d_low + detections.xywh[:, 2:], g_low + truth.xywh[:, 2:]
    parts = []
    for d, g in _neighbours(detections, truth):
        width = np.minimum(d_high[d, 0], g_high[g, 0]) - np.maximum(d_low[d, 0], g_low[g, 0])
        height = np.minimum(d_high[d, 1], g_high[g, 1]) - np.maximum(d_low[d, 1], g_low[g, 1])
        near = np.flatnonzero((width > 0) & (height > 0))
        d, g = d[near], g[near]
        shared = width[near] * height[near]
        cover = shared / d_area[d]
        iou = shared / (d_area[d] + g_area[g] - shared)
        enough = np.flatnonzero((iou >= least) | (coverable[g] & (cover >= least)))
        parts.append((d[enough], g[enough], iou[enough], cover[enough]))
    if not parts:
        none = np.zeros(0, np.int64)
        return Pairs(none, none, np.zeros(0), np.zeros(0))
    return Pairs(*map(np.concatenate, zip(*parts, strict=True)))


def _neighbours(detections: Boxes, truth: Boxes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of pairs that may overlap in x, by ascending detection.

    Objects are sorted by image and left edge, in whole px, and each detection takes the run that
    its own edges and the widest object of the image leave.
    """
    if not len(truth.image) or not len(detections.image):
        return

    def key(image: np.ndarray, x: np.ndarray) -> np.ndarray:
        return image * _SPAN + np.clip(np.floor(x), -_SPAN // 2, _SPAN // 2 - 1).astype(np.int64)

    left, width = truth.xywh[:, 0], truth.xywh[:, 2]
    keys = key(truth.image, left)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    widest = np.zeros(max(truth.image[-1], detections.image[-1]) + 1)
    np.maximum.at(widest, truth.image, width)
    x = detections.xywh[:, 0]
    start = np.searchsorted(keys, key(detections.image, x - widest[detections.image]), "left")
    stop = np.searchsorted(keys, key(detections.image, x + detections.xywh[:, 2]), "right")
    counts = np.maximum(stop - start, 0)
    total = np.cumsum(counts)
    chunks = (total - counts) // _CHUNK
    bounds = [*np.flatnonzero(np.diff(chunks, prepend=-1)), len(counts)]
    for first, last in pairwise(bounds):
        count = counts[first:last]
        d = np.repeat(np.arange(first, last), count)
        offset = np.repeat(start[first:last] - (np.cumsum(count) - count), count)
        yield d, order[np.arange(len(d)) + offset]


def by_preference(
    pairs: Pairs, which: np.ndarray, value: np.ndarray, ignored: np.ndarray
) -> np.ndarray:
    """``which`` pairs by ascending detection, the one that it likes best first.

    That is an object before an ignored one, then the larger ``value``, then the later object, as
    pycocotools has it. ``value`` and ``ignored`` are per pair and per object.
    """
    d = pairs.detection[which]
    same = d[1:] == d[:-1]
    several = np.zeros(len(d), bool)
    several[1:] |= same
    several[:-1] |= same
    spots = np.flatnonzero(several)
    rows = which[spots]
    g = pairs.truth[rows]
    ordered = which.copy()
    ordered[spots] = rows[np.lexsort((-g, -value[rows], ignored[g], d[spots]))]
    return ordered


def greedy(pairs: Pairs, ordered: np.ndarray, reusable: np.ndarray, count: int) -> np.ndarray:
    """The pair that each detection takes when they choose one after the other.

    Instead of one by one, all choose at once that cannot be forestalled: whose best free object is
    sought by nobody before them. An object can be taken once, so few rounds are needed.

    Args:
        ordered: pairs that may be taken, by preference.
        reusable: ``(n,)`` bool, objects that several detections may take.
        count: of detections.

    Returns:
        ``(count,)`` int64, -1 for none.
    """
    result = np.full(count, -1)
    taken = np.zeros(len(reusable), bool)
    foremost = np.empty(len(reusable), np.int64)
    d, g = pairs.detection[ordered], pairs.truth[ordered]
    while len(ordered):
        # The last of several assignments stays, which is that of the first detection.
        foremost[g[::-1]] = d[::-1]
        best = np.ones(len(d), bool)
        best[1:] = d[1:] != d[:-1]
        won = np.flatnonzero(best & (reusable[g] | (foremost[g] == d)))
        result[d[won]] = ordered[won]
        taken[g[won]] = ~reusable[g[won]]
        left = np.flatnonzero((result[d] < 0) & ~taken[g])
        ordered, d, g = ordered[left], d[left], g[left]
    return result


def contested(pairs: Pairs, kinds: np.ndarray, count: int) -> np.ndarray:
    """``(count,)`` bool: detections whose match depends on which objects are ignored.

    Those that reach, through objects and detections that share them, objects of several kinds.

    Args:
        kinds: ``(n,)`` an integer per object; objects of a kind are ignored in the same size bins.
    """
    d, g = pairs.detection, pairs.truth
    differs = (d[1:] == d[:-1]) & (kinds[g[1:]] != kinds[g[:-1]])
    found = np.zeros(count, bool)
    found[d[1:][differs]] = True
    objects = np.zeros(len(kinds), bool)
    while True:
        before = np.count_nonzero(found)
        objects[g[found[d]]] = True
        found[d[objects[g]]] = True
        if np.count_nonzero(found) == before:
            return found
