"""Large images as overlapping tiles: the grid, what of the objects a tile shows, borders.

Boxes are XYXY in px; a tile is (x0, y0, x1, y1) in whole px of its image.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dr2net_d2.errors import DatasetError

logger = logging.getLogger(__name__)

BORDER = 2.0
"""px within which a box touches a border: a detector's error at an edge that it does not see."""


@dataclass(frozen=True)
class Grid:
    """How an image is divided.

    Attributes:
        size: side of a tile.
        overlap: of neighbouring tiles, as a fraction of the side.

    Raises:
        ValueError: no side, an overlap outside [0, 1).
    """

    size: int
    overlap: float

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap < 1:
            raise ValueError(
                f"SIZE is {self.size} and OVERLAP {self.overlap:g}; tiles need a side of 1 px or "
                "more and 0 <= OVERLAP < 1"
            )

    def tiles(self, height: int, width: int) -> np.ndarray:
        """The tiles of an image, ``(n, 4)`` int64, row by row.

        The last row and column are moved inwards, so that each tile is of full size; along a side
        that is not longer than a tile there is one, which ends with the image.
        """
        step = max(self.size - int(self.overlap * self.size), 1)
        starts = [
            [*range(0, max(length - self.size, 0), step), max(length - self.size, 0)]
            for length in (height, width)
        ]
        tops, lefts = (axis.ravel() for axis in np.meshgrid(*starts, indexing="ij"))
        corners = (lefts, tops, (lefts + self.size).clip(max=width))
        return np.stack([*corners, (tops + self.size).clip(max=height)], axis=1)


@dataclass(frozen=True)
class TileChoice:
    """Which tiles are trained on.

    Attributes:
        grid: of every image.
        min_visible: the fraction of an object's area from which a tile shows it.
        empty_ratio: at most so many tiles that show no object are kept for one that does.

    Raises:
        ValueError: a fraction outside [0, 1], a ratio below 0.
    """

    grid: Grid
    min_visible: float
    empty_ratio: float

    def __post_init__(self) -> None:
        if not 0 <= self.min_visible <= 1 or not self.empty_ratio >= 0:
            raise ValueError(
                f"MIN_VISIBLE is {self.min_visible:g} and EMPTY_RATIO {self.empty_ratio:g}; they "
                "need 0 <= MIN_VISIBLE <= 1 and EMPTY_RATIO >= 0"
            )


class ImageBoxes(NamedTuple):
    """What ``choose_tiles`` needs of an image.

    Attributes:
        height, width: px.
        boxes: ``(n, 4)``.
        iscrowd: ``(n,)`` bool; these are no objects.
    """

    height: int
    width: int
    boxes: np.ndarray
    iscrowd: np.ndarray


@dataclass(frozen=True, eq=False)
class Tile:
    """A tile to train on.

    Attributes:
        image: position of its image.
        corners: XYXY.
        objects: ``(n,)``, positions of the boxes in the image that it shows.
        cut: ``(m,)``, of those that it shows too little of to learn them, or to learn that nothing
            is there.
    """

    image: int
    corners: tuple[int, int, int, int]
    objects: np.ndarray
    cut: np.ndarray


def visible_fractions(boxes: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """The fraction of each box's area, 0 for an empty one, in each tile: ``(tiles, boxes)``."""
    boxes = boxes.astype(np.float64)
    near = np.maximum(boxes[None, :, :2], tiles[:, None, :2])
    far = np.minimum(boxes[None, :, 2:], tiles[:, None, 2:])
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)
    inside = (far - near).clip(min=0).prod(axis=2)
    return np.divide(inside, areas, out=np.zeros_like(inside), where=areas > 0)


def choose_tiles(images: Iterable[ImageBoxes], choice: TileChoice, seed: int) -> list[Tile]:
    """The tiles of all images to train on, in order; logs how many were found.

    Args:
        images: boxes are cut at the image's edge before their visible fraction is taken.
        seed: of the draw among all empty tiles.

    Raises:
        DatasetError: no tile shows enough of any object.
    """
    tiles: list[Tile] = []
    objects = unseen = 0
    for index, (height, width, boxes, iscrowd) in enumerate(images):
        grid = choice.grid.tiles(height, width)
        fractions = visible_fractions(boxes.clip(0, np.array([width, height] * 2)), grid)
        inside = (fractions > 0) & ~iscrowd
        shown = inside & (fractions >= choice.min_visible)
        cut = inside & ~shown
        objects += int((~iscrowd).sum())
        unseen += int((~iscrowd & ~shown.any(axis=0)).sum())
        for corners, row, cut_row in zip(grid.tolist(), shown, cut, strict=True):
            tiles.append(Tile(index, tuple(corners), row.nonzero()[0], cut_row.nonzero()[0]))
    empty = np.array([not len(tile.objects) for tile in tiles], dtype=bool)
    if empty.all():
        raise DatasetError(
            f"no tile of {choice.grid.size} px shows {choice.min_visible:g} of an object's area; "
            "use larger tiles, a smaller MIN_VISIBLE, or images with objects"
        )
    wanted = min(int(choice.empty_ratio * (~empty).sum()), int(empty.sum()))
    drawn = np.random.default_rng(seed).permutation(empty.nonzero()[0])[:wanted]
    kept = np.sort(np.concatenate([(~empty).nonzero()[0], drawn]))
    logger.info(
        "%d tiles to train on, %d of them without an object; %d such left out; "
        "%d of %d objects are in no tile by MIN_VISIBLE",
        len(kept),
        wanted,
        int(empty.sum()) - wanted,
        unseen,
        objects,
    )
    return [tiles[position] for position in kept]


def paint_over(
    image: np.ndarray, regions: np.ndarray, objects: np.ndarray, colour: np.ndarray
) -> np.ndarray:
    """An image whose pixels in some regions have one colour.

    Args:
        image: ``(height, width, channels)``; it is not changed.
        regions: ``(n, 4)`` boxes, maybe beyond the image.
        objects: ``(m, 4)`` boxes whose pixels stay.
        colour: ``(channels,)``.
    """
    if not len(regions):
        return image
    painted = np.zeros(image.shape[:2], dtype=bool)
    for boxes, value in ((regions, True), (objects, False)):
        corners = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1)
        for x0, y0, x1, y1 in corners.clip(min=0).astype(int).tolist():
            painted[y0:y1, x0:x1] = value
    return np.where(painted[..., None], np.asarray(colour, image.dtype), image)


def touches_inner_border(
    boxes: np.ndarray, tile: np.ndarray, height: int, width: int
) -> np.ndarray:
    """``(n,)`` bool: whether a box ends where its tile ends and the image goes on.

    Args:
        boxes: ``(n, 4)``, found in the tile.
        tile: ``(4,)``.
        height, width: of the image.
    """
    inner = np.concatenate([tile[:2] > 0, tile[2:] < (width, height)])
    near = np.concatenate(
        [boxes[:, :2] <= tile[:2] + BORDER, boxes[:, 2:] >= tile[2:] - BORDER], axis=1
    )
    return np.asarray((near & inner).any(axis=1))


def seen_whole(boxes: np.ndarray, tiles: np.ndarray, height: int, width: int) -> np.ndarray:
    """``(n,)`` bool: whether some tile holds a box without its touching an inner border."""
    whole = np.zeros(len(boxes), dtype=bool)
    for tile in tiles:
        inside = (boxes[:, :2] >= tile[:2]).all(axis=1) & (boxes[:, 2:] <= tile[2:]).all(axis=1)
        whole |= inside & ~touches_inner_border(boxes, tile, height, width)
    return whole


def within_better_whole(
    boxes: np.ndarray, labels: np.ndarray, cut: np.ndarray, fraction: float, most: int
) -> np.ndarray:
    """``(n,)`` bool: which cut boxes lie in a better whole one of their class.

    Args:
        boxes, labels: ``(n, 4)``, ``(n,)``, best first.
        cut: ``(n,)`` bool, those that a border has cut.
        fraction: of a box's area from which it lies in another.
        most: boxes that are wanted; behind so many, none is looked at.
    """
    within = np.zeros(len(boxes), dtype=bool)
    for part in cut.nonzero()[0]:
        if part - within.sum() >= most:
            break
        better = ~cut[:part] & (labels[:part] == labels[part])
        held = visible_fractions(boxes[part : part + 1], boxes[:part][better])
        within[part] = (held >= fraction).any()
    return within
