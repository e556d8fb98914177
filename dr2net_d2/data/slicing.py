"""Sliced inference: run a detector on the tiles of an image; for both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from dr2net_d2.data.tiling import (
    Grid,
    complete_in_some_tile,
    cut_within_complete,
    touches_inner_border,
)


class DetectedBoxes(NamedTuple):
    """Objects detected in one image.

    Attributes:
        boxes: ``(n, 4)``, XYXY in pixels.
        scores: ``(n,)``.
        labels: ``(n,)``, contiguous class indices.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Slicing:
    """Detection in overlapping tiles, whose results are merged.

    A box at a border between tiles is dropped if another tile contains it completely. The others
    are merged by non-maximum suppression within each class. Finally, a box that a border has cut
    is dropped if it lies in a complete box of its class with a higher score.

    Attributes:
        grid: the tiles.
        whole_image: detect in the whole image as well.
        merge_thresh: IoU above which two boxes are the same object, and the fraction of a cut
            box's area that must lie in a complete box.
        batch_size: number of tiles per call of the detector.
        max_detections: maximum number of detections per image; those with the highest scores stay.

    Raises:
        ValueError: the threshold is outside (0, 1], or the batch is empty.
    """

    grid: Grid
    whole_image: bool = True
    merge_thresh: float = 0.5
    batch_size: int = 4
    max_detections: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.merge_thresh <= 1 or self.batch_size < 1:
            raise ValueError(
                f"MERGE_THRESH is {self.merge_thresh:g} and BATCH_SIZE {self.batch_size}; they "
                "need 0 < MERGE_THRESH <= 1 and BATCH_SIZE >= 1"
            )

    def detect(
        self, image: Tensor, detect: Callable[[list[Tensor]], Sequence[DetectedBoxes]]
    ) -> DetectedBoxes:
        """Detect objects in an image.

        Args:
            image: ``(C, H, W)``.
            detect: the detector; it gets crops of the image, and returns boxes in pixels of them.

        Returns:
            DetectedBoxes on the CPU, by descending score.
        """
        height, width = image.shape[1:]
        tiles = self.grid.tiles(height, width)
        detections, cut = [], []
        for batch, crops in self._batches(image, tiles):
            for tile, (boxes, scores, labels) in zip(batch, detect(crops), strict=True):
                moved = boxes.cpu() + torch.as_tensor(tile[[0, 1, 0, 1]])
                corners = moved.numpy()
                at_border = touches_inner_border(corners, tile, height, width)
                kept = ~(at_border & complete_in_some_tile(corners, tiles, height, width))
                detections.append(
                    DetectedBoxes(moved[kept], scores.cpu()[kept], labels.cpu()[kept])
                )
                cut.append(at_border[kept])
        together = DetectedBoxes(*map(torch.cat, zip(*detections, strict=True)))
        return self._merge(together, np.concatenate(cut))

    def _batches(
        self, image: Tensor, tiles: np.ndarray
    ) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """Corners of the crops, ``(n, 4)`` XYXY, and the crops."""
        height, width = image.shape[1:]
        for start in range(0, len(tiles), self.batch_size):
            batch = tiles[start : start + self.batch_size]
            yield batch, [image[:, y0:y1, x0:x1] for x0, y0, x1, y1 in batch.tolist()]
        if self.whole_image and len(tiles) > 1:
            yield np.array([[0, 0, width, height]]), [image]

    def _merge(self, detections: DetectedBoxes, cut: np.ndarray) -> DetectedBoxes:
        best = batched_nms(*detections, self.merge_thresh)
        redundant = cut_within_complete(
            detections.boxes[best].numpy(),
            detections.labels[best].numpy(),
            cut[best.numpy()],
            self.merge_thresh,
            self.max_detections,
        )
        kept = best[torch.from_numpy(~redundant)][: self.max_detections]
        return DetectedBoxes(*(tensor[kept] for tensor in detections))
