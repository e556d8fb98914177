"""Images for torchvision's detectors; a training image depends on its seed and position alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dr2net_d2.data import CocoDataset, CocoRecord, load_coco, read_image, resolve_dataset
from dr2net_d2.data.tiling import ImageBoxes, Tile, TileChoice, choose_tiles, paint_over

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """A dataset that the config names: its files and their content."""

    json_file: Path
    image_root: Path
    content: CocoDataset


def load_split(name: str) -> Split:
    """Find a dataset by its name, read it and check it.

    Raises:
        DatasetError: the name is unknown, or the files are missing or invalid.
    """
    json_file, image_root = resolve_dataset(name)
    content = load_coco(json_file, image_root)
    logger.info(
        "%s: %d images, %d empty boxes left out", name, len(content.records), content.dropped
    )
    return Split(json_file, image_root, content)


def resize_shortest_side(image: Tensor, shortest: int, longest: int) -> Tensor:
    """Resize an image with antialiasing; sizes are rounded as in Detectron2.

    Args:
        image: (C, H, W), uint8 or floating point.
        shortest: target length of the shorter side, in pixels; 0 keeps the image as it is.
        longest: maximum length of the longer side, in pixels.
    """
    height, width = image.shape[-2:]
    if shortest == 0:
        return image
    scale = min(shortest / min(height, width), longest / max(height, width))
    size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    return _resize(image, size)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if size == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def as_tensor(image: np.ndarray, channel_order: str) -> Tensor:
    """(H, W, 3) uint8 in BGR order -> (3, H, W) uint8 in "BGR" or "RGB" order."""
    if channel_order == "RGB":
        image = image[..., ::-1]
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def load_image(record: CocoRecord, channel_order: str) -> Tensor:
    """Read the image of a record, (3, H, W) uint8 in "BGR" or "RGB" order."""
    return as_tensor(read_image(record), channel_order)


@dataclass(frozen=True)
class Jitter:
    """Large-scale jittering, INPUT.LSJ.

    Attributes:
        side: of the square that a rescaled image is cropped to, in pixels.
        min_scale, max_scale: range that the scale is drawn from; 1 fits the image into the square.
    """

    side: int
    min_scale: float
    max_scale: float


class TrainingStream(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """An endless shuffled stream of augmented training images, addressed by position.

    Each pass over the images is a new permutation. The item at a position depends on the seed and
    the position alone, so a resumed training continues the stream with any number of workers.

    Args:
        records: the images; crowd boxes are left out, and boxes are clipped to the image.
        shortest_sides, longest_side: arguments of ``resize_shortest_side``; one of the shortest
            sides is drawn per image.
        flip: mirror an image with probability 1/2.
        channel_order: "BGR" or "RGB".
        seed: of permutations and augmentation.
        tiles: parts of the images to train on; None trains on whole images.
        jitter: rescale and crop instead of resizing to ``shortest_sides``.
        pixel_mean: colour, in ``channel_order``, that replaces objects cut by a tile.
        fill_ignored: paint over crowd boxes and ignored regions as well.

    Item: image (3, H, W) uint8 and {"boxes": (n, 4) float32 XYXY in pixels, "labels": (n,) int64
    from 1}; torchvision keeps label 0 for the background.
    """

    def __init__(
        self,
        records: Sequence[CocoRecord],
        *,
        shortest_sides: Sequence[int],
        longest_side: int,
        flip: bool,
        channel_order: str,
        seed: int,
        tiles: Sequence[Tile] | None = None,
        jitter: Jitter | None = None,
        pixel_mean: Sequence[float] = (0, 0, 0),
        fill_ignored: bool = False,
    ) -> None:
        self.records = records
        self.shortest_sides = shortest_sides
        self.longest_side = longest_side
        self.flip = flip
        self.channel_order = channel_order
        self.seed = seed
        self.tiles = [_whole(*pair) for pair in enumerate(records)] if tiles is None else tiles
        self.jitter = jitter
        self.colour = np.rint(pixel_mean)
        self.fill_ignored = fill_ignored
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        epoch, offset = divmod(position, len(self.tiles))
        if epoch != self._epoch:
            # The third number keeps this generator apart from those of positions.
            self._order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.tiles))
            self._epoch = epoch
        rng = np.random.default_rng((self.seed, position))
        return self._augment(self.tiles[self._order[offset]], rng)

    def _augment(self, tile: Tile, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.records[tile.image]
        original = self._pixels(record, tile)
        image = self._rescaled(original, rng)
        scale = np.divide(image.shape[:0:-1], original.shape[:0:-1])
        # (n, 2 corners, xy)
        corners = record.boxes[tile.objects].reshape(-1, 2, 2)
        corners = (corners - tile.corners[:2]) * scale
        if self.jitter:
            image, start = _random_crop(image, self.jitter.side, rng)
            corners = corners - start
        height, width = image.shape[-2:]
        corners = corners.clip(0, (width, height)).astype(np.float32)
        if self.flip and rng.random() < 0.5:
            image = image.flip(-1)
            corners[..., 0] = width - corners[:, ::-1, 0]
        kept = (corners[:, 1] > corners[:, 0]).all(axis=1)
        target = {
            "boxes": torch.from_numpy(corners.reshape(-1, 4)[kept]),
            "labels": torch.from_numpy(record.labels[tile.objects][kept]) + 1,
        }
        return image, target

    def _pixels(self, record: CocoRecord, tile: Tile) -> Tensor:
        """The tile's pixels, (3, H, W) uint8, with cut objects and ignored regions painted over."""
        x0, y0, x1, y1 = tile.corners
        image = load_image(record, self.channel_order)[:, y0:y1, x0:x1]
        regions = record.boxes[tile.cut]
        if self.fill_ignored:
            ignored = record.ignore_regions
            regions = np.concatenate([regions, record.boxes[record.iscrowd], ignored])
        objects = record.boxes[tile.objects]
        start = np.array([x0, y0, x0, y0])
        pixels = image.permute(1, 2, 0).numpy()
        painted = paint_over(pixels, regions - start, objects - start, self.colour)
        return torch.from_numpy(painted).permute(2, 0, 1).contiguous()

    def _rescaled(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if self.jitter is None:
            side = int(rng.choice(self.shortest_sides))
            return resize_shortest_side(image, side, self.longest_side)
        scale = rng.uniform(self.jitter.min_scale, self.jitter.max_scale)
        scale *= self.jitter.side / max(image.shape[1:])
        height, width = (max(1, round(length * scale)) for length in image.shape[1:])
        return _resize(image, (height, width))


def _whole(index: int, record: CocoRecord) -> Tile:
    corners = (0, 0, record.width, record.height)
    return Tile(index, corners, (~record.iscrowd).nonzero()[0], np.empty(0, dtype=np.int64))


def _random_crop(
    image: Tensor, side: int, rng: np.random.Generator
) -> tuple[Tensor, tuple[int, int]]:
    """Crop to at most ``side`` pixels along both axes; returns the crop and its (x, y) corner."""
    top, left = (int(rng.integers(max(length - side, 0) + 1)) for length in image.shape[1:])
    return image[:, top : top + side, left : left + side], (left, top)


def choose_training_tiles(
    records: Sequence[CocoRecord], choice: TileChoice, seed: int
) -> list[Tile]:
    """The tiles of all images to train on, as INPUT.TILES describes them."""
    images = (
        ImageBoxes(record.height, record.width, record.boxes, record.iscrowd) for record in records
    )
    return choose_tiles(images, choice, seed)


class TestImages(Dataset[tuple[Tensor, int]]):
    """Images as they are on disk.

    Item: image (3, H, W) uint8, and its index in ``records``.
    """

    __test__ = False  # not a test case

    def __init__(self, records: Sequence[CocoRecord], channel_order: str) -> None:
        self.records = records
        self.channel_order = channel_order

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return load_image(self.records[index], self.channel_order), index


def as_lists(batch: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """[(a, b), (a, b), ...] -> ([a, a, ...], [b, b, ...]), because images differ in size."""
    return tuple(map(list, zip(*batch, strict=True)))
