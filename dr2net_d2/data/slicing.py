"""Sliced inference: a detector goes over the tiles of an image, for either engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from dr2net_d2.data.tiling import Grid, seen_whole, touches_inner_border, within_better_whole


class Found(NamedTuple):
    """What is found in an image: boxes (n, 4) XYXY in its px, scores (n,), labels (n,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Slicing:
    """Detection in overlapping tiles, merged.

    A box at a border between tiles is dropped where another tile holds it whole. What is left is
    merged by non-maximum suppression within each class; at last, a part of an object whose whole
    was found with a better score is dropped.

    Attributes:
        grid: the tiles.
        whole_image: detect in the whole image as well.
        merge_thresh: IoU from which two boxes are one object, and fraction of a part that must lie
            in the whole.
        batch_size: tiles at once.
        most: objects of an image, the best ones.

    Raises:
        ValueError: a threshold outside (0, 1], no batch.
    """

    grid: Grid
    whole_image: bool = True
    merge_thresh: float = 0.5
    batch_size: int = 4
    most: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.merge_thresh <= 1 or self.batch_size < 1:
            raise ValueError(
                f"MERGE_THRESH is {self.merge_thresh:g} and BATCH_SIZE {self.batch_size}; they "
                "need 0 < MERGE_THRESH <= 1 and BATCH_SIZE >= 1"
            )

    def detect(self, image: Tensor, detect: Callable[[list[Tensor]], Sequence[Found]]) -> Found:
        """Find objects in an image (C, H, W).

        Args:
            detect: finds them in some parts of it; in px of these parts.

        Returns:
            on the CPU, best first.
        """
        height, width = image.shape[1:]
        tiles = self.grid.tiles(height, width)
        found, cut = [], []
        for some, parts in self._parts(image, tiles):
            for tile, (boxes, scores, labels) in zip(some, detect(parts), strict=True):
                moved = boxes.cpu() + torch.as_tensor(tile[[0, 1, 0, 1]])
                corners = moved.numpy()
                at_border = touches_inner_border(corners, tile, height, width)
                kept = ~(at_border & seen_whole(corners, tiles, height, width))
                found.append(Found(moved[kept], scores.cpu()[kept], labels.cpu()[kept]))
                cut.append(at_border[kept])
        return self._merge(Found(*map(torch.cat, zip(*found, strict=True))), np.concatenate(cut))

    def _parts(self, image: Tensor, tiles: np.ndarray) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        height, width = image.shape[1:]
        for start in range(0, len(tiles), self.batch_size):
            some = tiles[start : start + self.batch_size]
            yield some, [image[:, y0:y1, x0:x1] for x0, y0, x1, y1 in some.tolist()]
        if self.whole_image and len(tiles) > 1:
            yield np.array([[0, 0, width, height]]), [image]

    def _merge(self, found: Found, cut: np.ndarray) -> Found:
        best = batched_nms(*found, self.merge_thresh)
        boxes, labels = (tensor[best].numpy() for tensor in (found.boxes, found.labels))
        cut = cut[best.numpy()]
        part = within_better_whole(boxes, labels, cut, self.merge_thresh, self.most)
        kept = best[torch.from_numpy(~part)][: self.most]
        return Found(*(tensor[kept] for tensor in found))
