"""Best centres against all partitions, IoUs against the anchors that the engines generate."""

import itertools

import numpy as np
import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from dr2net_d2.data.anchors import (
    Anchors,
    Objects,
    best_centres,
    iou_of_ratios,
    iou_of_sizes,
    propose_anchors,
)
from dr2net_d2.tv.model import ExactAnchors


def concentric(a, b):
    """IoU of two concentric boxes (width, height)."""
    shared = min(a[0], b[0]) * min(a[1], b[1])
    return shared / (a[0] * a[1] + b[0] * b[1] - shared)


def test_ious_of_sizes_and_of_ratios():
    for a, b in ((3.0, 7.0), (9.0, 2.0), (4.0, 4.0)):
        assert iou_of_sizes(np.array(a), np.array(b)) == pytest.approx(concentric((a, a), (b, b)))
        expected = concentric((a**-0.5, a**0.5), (b**-0.5, b**0.5))
        assert iou_of_ratios(np.array(a), np.array(b)) == pytest.approx(expected)


@pytest.mark.parametrize("iou", [iou_of_sizes, iou_of_ratios])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_best_centres_are_the_best_of_all(seed, count, iou):
    """Centres from a fine grid as well as the values: no choice of them has a larger mean IoU."""
    rng = np.random.default_rng(seed)
    values = np.repeat(rng.uniform(4, 30, 7), rng.integers(1, 4, 7))
    centres = best_centres(values, count, iou)
    assert centres == sorted(centres) and len(centres) == count

    candidates = np.unique([*values, *np.geomspace(3, 40, 13)])
    ious = iou(values[:, None], candidates)
    chosen = itertools.combinations(range(len(candidates)), count)
    best = max(ious[:, list(columns)].max(axis=1).mean() for columns in chosen)
    assert iou(values[:, None], np.array(centres)).max(axis=1).mean() == pytest.approx(best)


def test_centres_of_few_and_of_many_values():
    assert best_centres(np.array([5.0, 5.0, 9.0]), 3, iou_of_sizes) == [5, 9]
    # Log-uniform, so that quantiles matter: two halves, each around its own middle or so.
    many = np.geomspace(1, 16, 5001)
    low, high = best_centres(many, 2, iou_of_sizes)
    assert 1.5 < low < 2.7 and 5.9 < high < 10.7


def objects(count=60, seed=0, image=(100, 75)):
    rng = np.random.default_rng(seed)
    shapes = rng.uniform(3, 40, (count, 2))
    corners = rng.uniform(0, np.array(image) - shapes)
    return Objects(np.concatenate([corners, corners + shapes], axis=1), np.tile(image, (count, 1)))


ANCHORS = Anchors([2, 8, 16], [[5.0, 7], [12, 20.5], [30, 40]], [[0.6, 1.7]] * 3)


def test_best_ious_are_those_of_torchvisions_generator():
    found, image = objects(image=(96, 80)), torch.zeros(1, 3, 80, 96)
    maps = [torch.zeros(1, 1, 80 // stride, 96 // stride) for stride in ANCHORS.strides]
    generator = ExactAnchors(ANCHORS.sizes, ANCHORS.aspect_ratios)
    (grid,) = generator(ImageList(image, [(80, 96)]), maps)
    expected = box_iou(torch.from_numpy(found.boxes).float(), grid).amax(dim=1)
    np.testing.assert_allclose(ANCHORS.best_ious(found), expected, atol=1e-5)
    assert expected.min() < 0.5 < expected.max()


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_best_ious_are_those_of_detectron2s_generator(offset):
    pytest.importorskip("detectron2")
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.structures import Boxes, pairwise_iou

    anchors = Anchors(ANCHORS.strides, ANCHORS.sizes, ANCHORS.aspect_ratios, offset)
    # No multiple of the strides: the last location of an axis lies near the edge or beyond it.
    found = objects(image=(100, 75))
    maps = [torch.zeros(1, 1, -(-75 // stride), -(-100 // stride)) for stride in (2, 8, 16)]
    generator = DefaultAnchorGenerator(
        sizes=ANCHORS.sizes, aspect_ratios=[[0.6, 1.7]], strides=[2, 8, 16], offset=offset
    )
    grid = Boxes.cat(generator(maps))
    expected = pairwise_iou(Boxes(torch.from_numpy(found.boxes).float()), grid).amax(dim=1)
    np.testing.assert_allclose(anchors.best_ious(found), expected, atol=1e-5)


def test_an_object_between_locations_is_worse_off():
    """8 px on stride 8: half-way between four locations each anchor covers a quarter of it."""
    anchors = Anchors([8], [[8.0]], [[1.0]])
    boxes = np.array([[12.0, 12, 20, 20], [8, 8, 16, 16], [-3, 12, 5, 20]])
    ious = anchors.best_ious(Objects(boxes, np.full((3, 2), 32)))
    np.testing.assert_allclose(ious, [1, 16 / 112, 56 / 72])


def test_proposed_sizes_ascend_and_keep_to_what_a_stride_can_find():
    found = objects(3000, image=(640, 640))
    for sizes, ratios in ((1, 3), (3, 1), (2, 2)):
        anchors = propose_anchors(found, [4, 8, 16, 32], sizes, ratios)
        flat = [size for level in anchors.sizes for size in level]
        assert flat == sorted(flat) and len(flat) == 4 * sizes
        for stride, level in zip(anchors.strides[1:], anchors.sizes[1:], strict=True):
            assert level[0] >= 1.5 * stride
        assert [len(level) for level in anchors.aspect_ratios] == [ratios] * 4


def test_proposed_anchors_are_those_of_a_world_with_two_kinds_of_objects():
    """Objects of 9 x 9 and 20 x 45 px, all at locations of their level: nothing is left to gain."""
    small = [[8 * i - 4.5, 8 * i - 4.5, 8 * i + 4.5, 8 * i + 4.5] for i in range(1, 9)]
    large = [[16 * i - 10, 16 * i - 22.5, 16 * i + 10, 16 * i + 22.5] for i in range(2, 6)]
    found = Objects(np.array([*small, *large]), np.full((12, 2), 128))
    anchors = propose_anchors(found, [4, 16], 1, 2)
    assert anchors.sizes == [[9.0], [30.0]]
    assert anchors.aspect_ratios == [[1.0, 2.25]] * 2
    np.testing.assert_allclose(anchors.best_ious(found), 1)
