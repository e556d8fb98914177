"""Images for torchvision's detectors; a training image depends on (seed, position) alone."""

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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """A dataset of the config: its files and what they hold."""

    json_file: Path
    image_root: Path
    content: CocoDataset


def load_split(name: str) -> Split:
    """Find and check a dataset by its name.

    Raises:
        DatasetError: the name is not known, or the files are missing or not valid.
    """
    json_file, image_root = resolve_dataset(name)
    content = load_coco(json_file, image_root)
    logger.info(
        "%s: %d images, %d empty boxes left out", name, len(content.records), content.dropped
    )
    return Split(json_file, image_root, content)


def resize_shortest_side(image: Tensor, shortest: int, longest: int) -> Tensor:
    """Resize an image, antialiased, to Detectron2's rounding.

    Args:
        image: (C, H, W), uint8 or floating point.
        shortest: target of the shorter side in px; 0 keeps the image as it is.
        longest: limit of the longer side in px.
    """
    height, width = image.shape[-2:]
    if shortest == 0:
        return image
    scale = min(shortest / min(height, width), longest / max(height, width))
    size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    if size == (height, width):
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def as_tensor(image: np.ndarray, channel_order: str) -> Tensor:
    """(H, W, 3) uint8, BGR -> (3, H, W) uint8, channels in "BGR" or "RGB" order."""
    if channel_order == "RGB":
        image = image[..., ::-1]
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def load_image(record: CocoRecord, channel_order: str) -> Tensor:
    """The pixels of a record, as ``as_tensor`` gives them."""
    return as_tensor(read_image(record), channel_order)


class TrainingStream(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """An endless shuffled stream of augmented training images, addressed by position.

    Each pass over the records is a new permutation. What stands at a position depends on the seed
    and the position alone, so a resumed training continues the stream, with any number of workers.

    Args:
        records: the images; crowd boxes are left out, boxes are cut at the image's edge.
        shortest_sides, longest_side: of ``resize_shortest_side``; one of the first is drawn.
        flip: mirror every other image, at random.
        channel_order: "BGR" or "RGB".

    Item: image (3, H, W) uint8; {"boxes": (n, 4) float32 XYXY in px, "labels": (n,) int64 from 1,
    as torchvision wants them, 0 being background}.
    """

    def __init__(
        self,
        records: Sequence[CocoRecord],
        shortest_sides: Sequence[int],
        longest_side: int,
        flip: bool,
        channel_order: str,
        seed: int,
    ) -> None:
        self.records = records
        self.shortest_sides = shortest_sides
        self.longest_side = longest_side
        self.flip = flip
        self.channel_order = channel_order
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        epoch, offset = divmod(position, len(self.records))
        if epoch != self._epoch:
            # The 1 keeps it apart from the generators of positions.
            self._order = np.random.default_rng((self.seed, epoch, 1)).permutation(
                len(self.records)
            )
            self._epoch = epoch
        rng = np.random.default_rng((self.seed, position))
        return self._augment(self.records[self._order[offset]], rng)

    def _augment(
        self, record: CocoRecord, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        image = load_image(record, self.channel_order)
        image = resize_shortest_side(image, int(rng.choice(self.shortest_sides)), self.longest_side)
        height, width = image.shape[-2:]
        scale = np.array([width / record.width, height / record.height], dtype=np.float32)
        # (n, 2 corners, xy)
        corners = (record.boxes.reshape(-1, 2, 2) * scale).clip(0, (width, height))
        if self.flip and rng.random() < 0.5:
            image = image.flip(-1)
            corners[..., 0] = width - corners[:, ::-1, 0]
        kept = (corners[:, 1] > corners[:, 0]).all(axis=1) & ~record.iscrowd
        target = {
            "boxes": torch.from_numpy(corners.reshape(-1, 4)[kept].astype(np.float32)),
            "labels": torch.from_numpy(record.labels[kept]) + 1,
        }
        return image, target


class TestImages(Dataset[tuple[Tensor, int]]):
    """Images as they are on disk. Item: image (3, H, W) uint8, and its index in ``records``."""

    __test__ = False  # not a test case

    def __init__(self, records: Sequence[CocoRecord], channel_order: str) -> None:
        self.records = records
        self.channel_order = channel_order

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return load_image(self.records[index], self.channel_order), index


def as_lists(batch: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """[(a, b), (a, b), ...] -> ([a, a, ...], [b, b, ...]): images of any size stay apart."""
    return tuple(map(list, zip(*batch, strict=True)))
