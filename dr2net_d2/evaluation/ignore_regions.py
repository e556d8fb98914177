"""Boxes that lie in ignore regions, as the VisDrone-DET toolkit finds them."""

from __future__ import annotations

import numpy as np


def in_ignore_regions(
    image: np.ndarray,
    xywh: np.ndarray,
    region_image: np.ndarray,
    regions: np.ndarray,
    sizes: np.ndarray,
) -> np.ndarray:
    """Boxes of which at least half lies inside the regions of their image.

    The toolkit counts pixels, from 1 on. A region has those from its corner to corner plus side,
    both included; a box those behind its rounded corner, as many as its rounded sides say. What
    reaches over the image's edge counts in a box's area and is never inside.

    Args:
        image: ``(n,)`` of each box.
        xywh: ``(n, 4)`` in px.
        region_image: ``(r,)`` of each region.
        regions: ``(r, 4)`` XYWH in px; they may overlap.
        sizes: ``(images, 2)``, width and height of all images in px.

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
        # The regions' edges cut the image into cells that are either inside or outside.
        x, y = (np.unique([region_low[:, axis], region_high[:, axis]]) for axis in (0, 1))
        cells = np.zeros((len(y) - 1, len(x) - 1))
        for (x0, y0), (x1, y1) in zip(region_low, region_high, strict=True):
            cells[(y[:-1] >= y0) & (y[1:] <= y1)] += (x[:-1] >= x0) & (x[1:] <= x1)
        columns, lines = (_shared(low[:, i] + 1, high[:, i] + 1, e) for i, e in ((0, x), (1, y)))
        covered = ((lines @ (cells > 0)) * columns).sum(axis=1)
        inside[rows] = covered / (sides[:, 0] * sides[:, 1]) >= 0.5
    return inside


def _pixels(xywh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First pixels and sides, at least 1, with halves rounded up."""
    whole = np.maximum(1, np.floor(xywh + 0.5)).astype(np.int64)
    return whole[:, :2], whole[:, 2:]


def _shared(low: np.ndarray, high: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """``(n, cells)``: pixels that n ranges [low, high) share with the cells between edges."""
    starts, stops = edges[:-1], edges[1:]
    return np.clip(np.minimum(high[:, None], stops) - np.maximum(low[:, None], starts), 0, None)
