"""Boxes inside ignore regions, by the rules of the VisDrone-DET toolkit."""

from __future__ import annotations

import numpy as np


def in_ignore_regions(
    image: np.ndarray,
    xywh: np.ndarray,
    region_image: np.ndarray,
    regions: np.ndarray,
    sizes: np.ndarray,
) -> np.ndarray:
    """Find the boxes that lie at least half inside the ignore regions of their image.

    The toolkit counts pixels, starting from 1. A region covers the pixels from its corner to its
    corner plus side, both included. A box covers as many pixels as its rounded sides say, starting
    after its rounded corner. Parts of a box beyond the edge of the image belong to its area, but
    are never inside a region.

    Args:
        image: ``(n,)`` position of each box's image.
        xywh: ``(n, 4)`` boxes, in pixels.
        region_image: ``(r,)`` position of each region's image.
        regions: ``(r, 4)`` XYWH in pixels; they may overlap.
        sizes: ``(images, 2)``, width and height of all images, in pixels.

    Returns:
        ``(n,)`` bool.
    """
    inside = np.zeros(len(xywh), bool)
    order = np.argsort(image, kind="stable")
    for index in np.unique(region_image):
        first, last = np.searchsorted(image[order], [index, index + 1])
        rows = order[first:last]
        low, sides = _pixels(xywh[rows])
        low = np.minimum(low, sizes[index])
        high = np.minimum(sizes[index], low + sides)
        region_low, region_sides = _pixels(regions[region_image == index])
        region_high = np.minimum(sizes[index], region_low + region_sides) + 1
        # The edges of the regions cut the image into cells that are either inside or outside.
        x, y = (np.unique([region_low[:, axis], region_high[:, axis]]) for axis in (0, 1))
        cells = np.zeros((len(y) - 1, len(x) - 1))
        for (x0, y0), (x1, y1) in zip(region_low, region_high, strict=True):
            cells[(y[:-1] >= y0) & (y[1:] <= y1)] += (x[:-1] >= x0) & (x[1:] <= x1)
        columns, lines = (_shared(low[:, i] + 1, high[:, i] + 1, e) for i, e in ((0, x), (1, y)))
        covered = ((lines @ (cells > 0)) * columns).sum(axis=1)
        inside[rows] = covered / (sides[:, 0] * sides[:, 1]) >= 0.5
    return inside


def _pixels(xywh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round corners and sides to whole pixels, at least 1, halves upwards."""
    whole = np.maximum(1, np.floor(xywh + 0.5)).astype(np.int64)
    return whole[:, :2], whole[:, 2:]


def _shared(low: np.ndarray, high: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """``(n, cells)`` number of pixels that n ranges [low, high) share with the cells."""
    starts, stops = edges[:-1], edges[1:]
    return np.clip(np.minimum(high[:, None], stops) - np.maximum(low[:, None], starts), 0, None)
