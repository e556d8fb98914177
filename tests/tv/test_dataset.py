import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dr2net_d2.data import CocoRecord
from dr2net_d2.tv.dataset import (
    TrainingStream,
    as_lists,
    load_image,
    load_split,
    resize_shortest_side,
)


@pytest.fixture
def records(dataset_cache):
    return load_split("small_digits_train_n8_s64_d3").content.records


def stream(records, shortest_sides=(56, 64), flip=True, seed=1):
    return TrainingStream(
        records,
        shortest_sides=shortest_sides,
        longest_side=64,
        flip=flip,
        channel_order="BGR",
        seed=seed,
    )


def batches(data, start, workers):
    loader = DataLoader(data, 2, sampler=range(start, 24), num_workers=workers, collate_fn=as_lists)
    return [item for images, targets in loader for item in zip(images, targets, strict=True)]


def equal(items, others):
    return len(items) == len(others) and all(
        torch.equal(image, image2)
        and torch.equal(target["boxes"], target2["boxes"])
        and torch.equal(target["labels"], target2["labels"])
        for (image, target), (image2, target2) in zip(items, others, strict=True)
    )


def test_the_stream_depends_on_seed_and_position_alone(records):
    whole = batches(stream(records), 0, workers=0)
    assert equal(whole, batches(stream(records), 0, workers=2))
    assert equal(whole[10:], batches(stream(records), 10, workers=0))
    assert not equal(whole, batches(stream(records, seed=2), 0, workers=0))


def test_each_pass_is_a_new_permutation(records):
    data = stream(records, shortest_sides=(64,), flip=False)
    passes = [[data[8 * epoch + i][0].sum().item() for i in range(8)] for epoch in range(3)]
    assert len({tuple(sorted(sums)) for sums in passes}) == 1
    assert len({tuple(sums) for sums in passes}) == 3


def test_boxes_follow_the_pixels_through_flip_and_resize(tmp_path):
    image = np.zeros((20, 40, 3), dtype=np.uint8)
    image[4:12, 6:16] = 255
    cv2.imwrite(str(tmp_path / "image.png"), image)
    boxes = np.array([[6, 4, 16, 12], [-9, 4, -1, 8], [30, 10, 50, 14], [0, 0, 9, 9]], np.float32)
    record = CocoRecord(
        file_name=str(tmp_path / "image.png"),
        image_id=1,
        height=20,
        width=40,
        boxes=boxes,
        labels=np.array([3, 1, 0, 2]),
        iscrowd=np.array([False, False, False, True]),
    )
    data = TrainingStream(
        [record], shortest_sides=(40,), longest_side=1000, flip=True, channel_order="BGR", seed=0
    )
    seen = set()
    for position in range(8):
        image, target = data[position]
        assert image.shape == (3, 40, 80)
        assert image.dtype == torch.uint8
        # The second lies outside, the fourth is a crowd; the third is cut. 0 is background.
        assert target["labels"].tolist() == [4, 1]
        x0, y0, x1, y1 = target["boxes"][0].int().tolist()
        assert image[:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].min() == 255
        assert image.sum() == pytest.approx(255 * 3 * (x1 - x0) * (y1 - y0), rel=0.02)
        seen.add((tuple(target["boxes"][0].tolist()), tuple(target["boxes"][1].tolist())))
    assert seen == {((12, 8, 32, 24), (60, 20, 80, 28)), ((48, 8, 68, 24), (0, 20, 20, 28))}


def test_channel_order(records):
    assert torch.equal(load_image(records[0], "RGB"), load_image(records[0], "BGR").flip(0))


@pytest.mark.parametrize(
    ("height", "width", "shortest", "longest", "expected"),
    [
        (480, 640, 800, 1333, (800, 1067)),
        (480, 1200, 800, 1333, (533, 1333)),
        (640, 480, 0, 100, (640, 480)),
        (33, 50, 16, 100, (16, 24)),
        (1, 500, 100, 100, (1, 100)),
    ],
)
def test_resize_has_detectron2s_rounding(height, width, shortest, longest, expected):
    image = torch.zeros(1, height, width)
    assert resize_shortest_side(image, shortest, longest).shape[-2:] == expected


def test_an_image_that_fits_is_left_alone():
    image = torch.rand(3, 256, 200)
    assert resize_shortest_side(image, 200, 256) is image
