"""Greedy matching of detections and objects by score, over all images of a dataset at once.

The detections and the objects of a class are numbered across images, the detections of each image
by descending score. A pair is a detection and an overlapping object of the same image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_CHUNK = 1 << 21
"""Number of possible pairs that are examined at a time."""

_SPAN = 1 << 22
"""Range of the x coordinates in a sort key, in pixels; those beyond it are clipped."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """n boxes.

    Attributes:
        image: ``(n,)`` int64, position of each box's image, ascending.
        xywh: ``(n, 4)`` float64, in pixels.
    """

    image: np.ndarray
    xywh: np.ndarray

    @property
    def area(self) -> np.ndarray:
        """``(n,)`` area of each box, in px²."""
        return self.xywh[:, 2] * self.xywh[:, 3]


@dataclass(frozen=True, eq=False)
class Pairs:
    """m overlapping pairs, sorted by detection.

    Attributes:
        detection, truth: ``(m,)`` int64, positions of the detection and of the object.
        iou: ``(m,)`` intersection over union.
        cover: ``(m,)`` intersection over the area of the detection.
    """

    detection: np.ndarray
    truth: np.ndarray
    iou: np.ndarray
    cover: np.ndarray


def find_pairs(detections: Boxes, truth: Boxes, *, by_cover: np.ndarray, minimum: float) -> Pairs:
    """Find all pairs with an overlap of at least ``minimum``.

    The arithmetic is that of pycocotools, so that decisions at a threshold are the same.

    Args:
        detections, truth: n detections and g objects.
        by_cover: ``(g,)`` bool, objects for which a cover of at least ``minimum`` is enough; the
            others need that IoU.
        minimum: smallest overlap.
    """
    d_area, g_area = detections.area, truth.area
    d_low, g_low = detections.xywh[:, :2], truth.xywh[:, :2]
    d_high, g_high = d_low + detections.xywh[:, 2:], g_low + truth.xywh[:, 2:]
    chunks = []
    for d, g in _neighbours(detections, truth):
        width = np.minimum(d_high[d, 0], g_high[g, 0]) - np.maximum(d_low[d, 0], g_low[g, 0])
        height = np.minimum(d_high[d, 1], g_high[g, 1]) - np.maximum(d_low[d, 1], g_low[g, 1])
        near = np.flatnonzero((width > 0) & (height > 0))
        d, g = d[near], g[near]
        shared = width[near] * height[near]
        cover = shared / d_area[d]
        iou = shared / (d_area[d] + g_area[g] - shared)
        rows = np.flatnonzero((iou >= minimum) | (by_cover[g] & (cover >= minimum)))
        chunks.append((d[rows], g[rows], iou[rows], cover[rows]))
    if not chunks:
        empty = np.zeros(0, np.int64)
        return Pairs(empty, empty, np.zeros(0), np.zeros(0))
    return Pairs(*map(np.concatenate, zip(*chunks, strict=True)))


def _neighbours(detections: Boxes, truth: Boxes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of pairs that may overlap in x, sorted by detection.

    With the objects sorted by image and left edge, in whole pixels, the possible neighbours of a
    detection are a contiguous run, bounded by its edges and the widest object of the image.
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


def sort_by_preference(
    pairs: Pairs, rows: np.ndarray, overlap: np.ndarray, ignored: np.ndarray
) -> np.ndarray:
    """Sort pairs by detection, and those of a detection from its first choice to its last.

    A detection prefers objects that are not ignored, then the larger overlap, then the later
    object, as in pycocotools.

    Args:
        pairs: m pairs of g objects.
        rows: positions of the pairs to sort, ascending.
        overlap: ``(m,)`` overlap of each pair.
        ignored: ``(g,)`` bool, objects that are not to be found.

    Returns:
        ``rows`` in the new order.
    """
    d = pairs.detection[rows]
    same = d[1:] == d[:-1]
    has_choice = np.zeros(len(d), bool)
    has_choice[1:] |= same
    has_choice[:-1] |= same
    spots = np.flatnonzero(has_choice)
    choices = rows[spots]
    g = pairs.truth[choices]
    ordered = rows.copy()
    ordered[spots] = choices[np.lexsort((-g, -overlap[choices], ignored[g], d[spots]))]
    return ordered


def match_greedily(
    pairs: Pairs, ordered: np.ndarray, reusable: np.ndarray, detections: int
) -> np.ndarray:
    """Let the detections of each image choose an object, one after the other.

    Every round settles, at once, all detections whose best free object is wanted by no detection
    before them. An object is matched only once, so a few rounds suffice.

    Args:
        pairs: pairs of g objects.
        ordered: positions of the pairs that may match, from ``sort_by_preference``.
        reusable: ``(g,)`` bool, objects that may be matched with several detections.
        detections: number of detections.

    Returns:
        ``(detections,)`` int64, the pair of each detection, -1 for none.
    """
    result = np.full(detections, -1)
    taken = np.zeros(len(reusable), bool)
    first_in_line = np.empty(len(reusable), np.int64)
    d, g = pairs.detection[ordered], pairs.truth[ordered]
    while len(ordered):
        # Of several assignments to one element the last one stays: that of the first detection.
        first_in_line[g[::-1]] = d[::-1]
        best = np.ones(len(d), bool)
        best[1:] = d[1:] != d[:-1]
        won = np.flatnonzero(best & (reusable[g] | (first_in_line[g] == d)))
        result[d[won]] = ordered[won]
        taken[g[won]] = ~reusable[g[won]]
        remaining = np.flatnonzero((result[d] < 0) & ~taken[g])
        ordered, d, g = ordered[remaining], d[remaining], g[remaining]
    return result


@dataclass(frozen=True, eq=False)
class Candidates:
    """The possible matches of a class in each of A size bins: m pairs, n detections, g objects.

    Attributes:
        pairs: all of them.
        ignored: ``(A, g)`` bool, objects that are not to be found in a size bin.
        reusable: A arrays ``(g,)`` bool, objects that may be matched with several detections.
        overlap: A arrays ``(m,)``, the cover for reusable objects and the IoU for the others.
        ordered: A arrays of pairs by preference. From the second on they have only pairs of
            ``contested`` detections; the others have the same match in every size bin.
        contested: ``(n,)`` bool, detections whose match depends on the size bin.
    """

    pairs: Pairs
    ignored: np.ndarray
    reusable: list[np.ndarray]
    overlap: list[np.ndarray]
    ordered: list[np.ndarray]
    contested: np.ndarray


def find_candidates(
    detections: Boxes,
    truth: Boxes,
    *,
    crowd: np.ndarray,
    ignored: np.ndarray,
    minimum: float,
    reuse_ignored: bool,
) -> Candidates:
    """Find and order the possible matches of a class.

    Args:
        detections, truth: n detections and g objects.
        crowd: ``(g,)`` bool, crowds, which are reusable.
        ignored: ``(A, g)`` bool, objects that are not to be found in a size bin.
        minimum: smallest overlap of a match.
        reuse_ignored: whether all ignored objects are reusable in their size bins.
    """
    by_cover: np.ndarray = np.any(ignored, axis=0) if reuse_ignored else crowd
    pairs = find_pairs(detections, truth, by_cover=by_cover, minimum=minimum)
    reusable = [in_bin if reuse_ignored else crowd for in_bin in ignored]
    overlap = [np.where(mask[pairs.truth], pairs.cover, pairs.iou) for mask in reusable]
    if reuse_ignored:
        contested = np.ones(len(detections.image), bool)
    else:
        # Objects of a kind are ignored in the same size bins.
        kind = np.unique(np.concatenate([ignored, crowd[None]]), axis=1, return_inverse=True)[1]
        contested = _find_contested(pairs, kind.ravel(), len(detections.image))
    rows = np.flatnonzero(contested[pairs.detection])
    rows_of_bins = [np.arange(len(pairs.truth)), *[rows] * (len(ignored) - 1)]
    ordered = [
        sort_by_preference(pairs, *arguments)
        for arguments in zip(rows_of_bins, overlap, ignored, strict=True)
    ]
    return Candidates(pairs, ignored, reusable, overlap, ordered, contested)


def match(candidates: Candidates, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Match detections and objects at an IoU threshold, in one size bin after the other.

    Yields:
        For each size bin ``(n,)`` int64, the pair of each detection, -1 for none; and ``(n,)``
        bool, whether its object is ignored.
    """
    # As in pycocotools.
    threshold = min(threshold, 1 - 1e-10)
    everywhere: np.ndarray | None = None
    for ordered, overlap, ignored, reusable in zip(
        candidates.ordered,
        candidates.overlap,
        candidates.ignored,
        candidates.reusable,
        strict=True,
    ):
        allowed = ordered[overlap[ordered] >= threshold]
        matched = match_greedily(candidates.pairs, allowed, reusable, len(candidates.contested))
        if everywhere is None:
            everywhere = matched
        else:
            matched = np.where(candidates.contested, matched, everywhere)
        is_ignored = matched >= 0
        is_ignored[is_ignored] = ignored[candidates.pairs.truth[matched[is_ignored]]]
        yield matched, is_ignored


def _find_contested(pairs: Pairs, kind: np.ndarray, detections: int) -> np.ndarray:
    """Find the detections whose match depends on which objects are ignored.

    These reach objects of several kinds, directly or through a chain of detections and objects
    that share pairs.

    Args:
        pairs: pairs of g objects.
        kind: ``(g,)`` int, kind of each object.
        detections: number of detections.

    Returns:
        ``(detections,)`` bool.
    """
    d, g = pairs.detection, pairs.truth
    differs = (d[1:] == d[:-1]) & (kind[g[1:]] != kind[g[:-1]])
    contested = np.zeros(detections, bool)
    contested[d[1:][differs]] = True
    objects = np.zeros(len(kind), bool)
    while True:
        before = np.count_nonzero(contested)
        objects[g[contested[d]]] = True
        contested[d[objects[g]]] = True
        if np.count_nonzero(contested) == before:
            return contested
