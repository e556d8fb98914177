"""Sliced inference with a detector that sees exactly what a tile shows."""

import numpy as np
import pytest
import torch

from dr2net_d2.data.slicing import DetectedBoxes, Slicing
from dr2net_d2.data.tiling import Grid

HEIGHT, WIDTH = 90, 150


def picture(boxes):
    """(1, H, W), each box filled with a number of its own from 1, which is its identity."""
    image = torch.zeros(1, HEIGHT, WIDTH)
    for number, (x0, y0, x1, y1) in enumerate(boxes, 1):
        image[:, y0:y1, x0:x1] = number
    return image


def boxes_apart(rng, count, longest):
    boxes: list[list[int]] = []
    for _ in range(4000):
        w, h = rng.integers(3, longest + 1, 2)
        x, y = rng.integers(0, (WIDTH - w, HEIGHT - h), endpoint=True)
        box = [x, y, x + w, y + h]
        if all(x >= b[2] or b[0] >= x + w or y >= b[3] or b[1] >= y + h for b in boxes):
            boxes.append([int(value) for value in box])
        if len(boxes) == count:
            break
    return boxes


class Oracle:
    """Finds every visible part; its score is lower the less is seen, its class the identity."""

    def __init__(self, image, score_of_whole=0.9):
        self.areas = torch.bincount(image.flatten().long())
        self.seen = []
        self.score_of_whole = score_of_whole

    def __call__(self, parts):
        self.seen.append([tuple(part.shape[1:]) for part in parts])
        return [self.find(part[0]) for part in parts]

    def find(self, part):
        boxes, scores, labels = [], [], []
        for number in part.unique().long().tolist():
            if number:
                y, x = (part == number).nonzero().unbind(1)
                boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
                scores.append(len(y) / self.areas[number] * self.score_of_whole)
                labels.append(number)
        return DetectedBoxes(
            torch.tensor(boxes).float().reshape(-1, 4), torch.tensor(scores), torch.tensor(labels)
        )


def found_boxes(found):
    order = found.labels.argsort()
    return found.labels[order].tolist(), found.boxes[order].int().tolist()


@pytest.mark.parametrize("whole_image", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_objects_as_long_as_the_overlap_are_found_once_and_whole(whole_image, batch_size):
    boxes = boxes_apart(np.random.default_rng(0), 40, longest=10)
    assert len(boxes) == 40
    image = picture(boxes)
    grid = Grid(40, 0.35)  # 14 px overlap, and 2 px to each border
    oracle = Oracle(image)
    found = Slicing(grid, whole_image, batch_size=batch_size).detect(image, oracle)
    assert found_boxes(found) == ([*range(1, 41)], boxes)
    tiles = len(grid.tiles(HEIGHT, WIDTH))
    assert sum(map(len, oracle.seen)) == tiles + whole_image
    assert max(map(len, oracle.seen)) == batch_size
    assert oracle.seen[0][0] == (40, 40) and ((HEIGHT, WIDTH) in oracle.seen[-1]) == whole_image


def test_larger_objects_need_the_whole_image():
    image = picture([[5, 5, 120, 80], [125, 3, 133, 9]])
    parts = Slicing(Grid(40, 0.35), whole_image=False).detect(image, Oracle(image))
    assert len(parts.boxes) > 5
    whole = Slicing(Grid(40, 0.35)).detect(image, Oracle(image))
    assert found_boxes(whole) == ([1, 2], [[5, 5, 120, 80], [125, 3, 133, 9]])


def test_classes_are_merged_apart_and_the_best_are_kept():
    image = torch.zeros(1, 20, 20)
    boxes = torch.tensor([[2.0, 2, 8, 8], [2, 2, 8, 9], [2, 2, 8, 8], [12, 12, 18, 18]])
    answer = DetectedBoxes(boxes, torch.tensor([0.5, 0.6, 0.4, 0.3]), torch.tensor([0, 0, 1, 0]))
    found = Slicing(Grid(40, 0.0), max_detections=2).detect(
        image, lambda parts: [answer] * len(parts)
    )
    assert found.scores.tolist() == pytest.approx([0.6, 0.4])
    assert found.labels.tolist() == [0, 1]
    assert found.boxes.tolist() == [[2, 2, 8, 9], [2, 2, 8, 8]]


def test_nothing_is_found_in_nothing():
    found = Slicing(Grid(40, 0.25)).detect(picture([]), Oracle(picture([])))
    assert [tuple(t.shape) for t in found] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize(("thresh", "batch"), [(0.0, 1), (1.1, 1), (0.5, 0)])
def test_slicing_that_cannot_be(thresh, batch):
    with pytest.raises(ValueError, match=rf"MERGE_THRESH is {thresh:g} and BATCH_SIZE {batch}"):
        Slicing(Grid(40, 0.25), merge_thresh=thresh, batch_size=batch)
