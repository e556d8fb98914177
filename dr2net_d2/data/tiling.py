"""Large images as overlapping tiles: the grid, the objects in each tile, cuts at borders.

Boxes are XYXY in pixels. A tile is XYXY in whole pixels of its image.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dr2net_d2.errors import DatasetError

logger = logging.getLogger(__name__)

BORDER = 2.0
"""Distance in pixels within which a box touches a border; detectors are inexact at an edge."""


@dataclass(frozen=True)
class Grid:
    """A division of images into square tiles.

    Attributes:
        size: side of a tile, in pixels.
        overlap: overlap of neighbouring tiles, as a fraction of the side.

    Raises:
        ValueError: the side is less than 1, or the overlap is outside [0, 1).
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

        The last row and column are moved inwards, so that every tile has its full size. Along a
        side that is shorter than a tile there is one tile, which ends with the image.
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
    """Rules for the choice of training tiles.

    Attributes:
        grid: the tiles of each image.
        min_visible: minimum fraction of an object's area inside a tile for the tile to show it.
        empty_ratio: maximum number of tiles without objects per tile with objects.

    Raises:
        ValueError: the fraction is outside [0, 1], or the ratio is negative.
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
    """The size of an image and its boxes, for ``choose_tiles``.

    Attributes:
        height: in pixels.
        width: in pixels.
        boxes: ``(n, 4)``.
        iscrowd: ``(n,)`` bool, true for boxes that are not objects.
    """

    height: int
    width: int
    boxes: np.ndarray
    iscrowd: np.ndarray


@dataclass(frozen=True, eq=False)
class Tile:
    """A training tile.

    Attributes:
        image: index of its image.
        corners: XYXY.
        objects: ``(n,)``, indices of the image's boxes that the tile shows.
        cut: ``(m,)``, indices of boxes of which the tile has too little to count them as objects,
            but too much to count them as background.
    """

    image: int
    corners: tuple[int, int, int, int]
    objects: np.ndarray
    cut: np.ndarray


def visible_fractions(boxes: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """The fraction of each box's area inside each tile: ``(tiles, boxes)``; 0 for an empty box."""
    boxes = boxes.astype(np.float64)
    near = np.maximum(boxes[None, :, :2], tiles[:, None, :2])
    far = np.minimum(boxes[None, :, 2:], tiles[:, None, 2:])
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)
    inside = (far - near).clip(min=0).prod(axis=2)
    return np.divide(inside, areas, out=np.zeros_like(inside), where=areas > 0)


def choose_tiles(images: Iterable[ImageBoxes], choice: TileChoice, seed: int) -> list[Tile]:
    """Choose the training tiles of all images, and log their number.

    Args:
        images: size and boxes of each image; boxes are clipped to their image first.
        choice: the rules.
        seed: seed of the random choice among tiles without objects.

    Returns:
        The tiles in the order of images and rows.

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
        "%d training tiles, %d of them without objects; %d more without objects were left out; "
        "%d of %d objects are in no tile because of MIN_VISIBLE",
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
    """A copy of an image in which some regions have a uniform colour.

    Args:
        image: ``(height, width, channels)``; returned as it is if there are no regions.
        regions: ``(n, 4)`` boxes, which may reach beyond the image.
        objects: ``(m, 4)`` boxes whose pixels are kept.
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
    """Whether each box touches an edge of its tile beyond which the image continues, ``(n,)`` bool.

    Args:
        boxes: ``(n, 4)``, detected in the tile.
        tile: ``(4,)``.
        height: height of the image.
        width: width of the image.
    """
    inner = np.concatenate([tile[:2] > 0, tile[2:] < (width, height)])
    near = np.concatenate(
        [boxes[:, :2] <= tile[:2] + BORDER, boxes[:, 2:] >= tile[2:] - BORDER], axis=1
    )
    return np.asarray((near & inner).any(axis=1))


def complete_in_some_tile(
    boxes: np.ndarray, tiles: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Whether some tile contains each box away from its inner borders, ``(n,)`` bool.

    Args:
        boxes: ``(n, 4)``.
        tiles: ``(m, 4)``, the tiles of the image.
        height: height of the image.
        width: width of the image.
    """
    complete = np.zeros(len(boxes), dtype=bool)
    for tile in tiles:
        inside = (boxes[:, :2] >= tile[:2]).all(axis=1) & (boxes[:, 2:] <= tile[2:]).all(axis=1)
        complete |= inside & ~touches_inner_border(boxes, tile, height, width)
    return complete


def cut_within_complete(
    boxes: np.ndarray, labels: np.ndarray, cut: np.ndarray, fraction: float, max_detections: int
) -> np.ndarray:
    """Whether each box is cut and lies in a complete box of its class with a higher score.

    Args:
        boxes: ``(n, 4)``, by descending score.
        labels: ``(n,)``.
        cut: ``(n,)`` bool, true for boxes that a border between tiles has cut.
        fraction: minimum fraction of a box's area for it to lie in another.
        max_detections: number of boxes to keep; the boxes after these are not examined.

    Returns:
        ``(n,)`` bool.
    """
    redundant = np.zeros(len(boxes), dtype=bool)
    for index in cut.nonzero()[0]:
        if index - redundant.sum() >= max_detections:
            break
        candidates = ~cut[:index] & (labels[:index] == labels[index])
        inside = visible_fractions(boxes[index : index + 1], boxes[:index][candidates])
        redundant[index] = (inside >= fraction).any()
    return redundant
