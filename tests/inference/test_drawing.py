"""Detections in a picture: what is drawn, where, and what is left to be seen."""

import cv2
import numpy as np
import pytest

from dr2net_d2.inference import Detections
from dr2net_d2.inference.drawing import draw_detections, place_labels

NAMES = ("car", "bicycle", "pedestrian")


def detections(boxes, labels=None, masks=None):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    labels = np.array([0] * len(boxes) if labels is None else labels, dtype=np.int64)
    return Detections(boxes, np.full(len(boxes), 0.875, dtype=np.float32), labels, masks)


def changed(image, picture):
    """(H, W) bool, where a picture differs from the image that it was drawn into, enlarged."""
    scale = len(picture) // len(image)
    return (picture != image.repeat(scale, 0).repeat(scale, 1)).any(axis=2)


@pytest.mark.parametrize(("side", "scale"), [(64, 16), (256, 4), (640, 2), (1000, 1), (3000, 1)])
def test_small_images_are_enlarged_by_a_whole_number(side, scale):
    image = np.random.default_rng(0).integers(0, 256, (side // 2, side, 3), dtype=np.uint8)
    picture = draw_detections(image, detections([]), NAMES)
    assert np.array_equal(picture, image.repeat(scale, 0).repeat(scale, 1))


def test_boxes_and_labels_are_beside_the_objects_and_never_on_them():
    # 20 objects of 8 px, also in the corners and in close neighbourhood
    image = np.full((256, 256, 3), 90, dtype=np.uint8)
    starts = [(0, 0), (248, 0), (0, 248), (248, 248), (100, 100), (112, 100), (100, 112)]
    starts += [(x, 180) for x in range(20, 240, 17)]
    boxes = [(x, y, x + 8, y + 8) for x, y in starts]
    before = image.copy()
    drawn = changed(image, draw_detections(image, detections(boxes), NAMES))
    assert np.array_equal(image, before)
    for x0, y0, x1, y1 in np.array(boxes) * 4:
        assert not drawn[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].any()
        edges = (drawn[max(y0 - 1, 0), x0:x1], drawn[y1 - 1 : y1 + 1, x0:x1].any(axis=0))
        assert all(edge.all() for edge in edges)
    # Beyond the outlines there are labels: 20 of at least 70 x 10 px.
    assert drawn.sum() > 20 * 700


def test_labels_lie_above_and_where_that_is_taken_elsewhere():
    size = (200, 100)
    assert place_labels(np.array([[50, 50, 60, 60]]), [(30, 10)], size) == [(49, 39)]
    boxes = np.array([[50, 50, 60, 60], [40, 30, 90, 49]])  # the second is above the first
    assert place_labels(boxes, [(30, 10)] * 2, size)[0] == (49, 62)
    at_the_edge = np.array([[0, 0, 200, 12], [190, 90, 200, 100]])
    for (x, y), (width, height) in zip(
        place_labels(at_the_edge, [(60, 15)] * 2, size), [(60, 15)] * 2, strict=True
    ):
        assert 0 <= x <= size[0] - width and 0 <= y <= size[1] - height


def test_classes_have_colours_of_their_own_and_masks_are_tinted():
    image = np.full((1000, 1000, 3), 100, dtype=np.uint8)
    masks = np.zeros((2, 1000, 1000), dtype=bool)
    masks[0, 210:290, 210:290] = masks[1, 610:690, 610:690] = True
    boxes = [(200, 200, 300, 300), (600, 600, 700, 700)]
    picture = draw_detections(image, detections(boxes, [0, 1], masks), NAMES)
    first, second = picture[250, 250], picture[650, 650]
    assert not np.array_equal(first, second)
    assert np.array_equal(picture[205, 250], image[205, 250])
    for tint, (x0, y0, _, _) in zip((first, second), boxes, strict=True):
        outline = picture[y0 - 1, x0 + 50]
        np.testing.assert_allclose(tint, 0.6 * 100 + 0.4 * outline.astype(float), atol=1)


def test_the_text_is_the_name_and_the_score():
    """The same detection with another name or another score gives another picture."""
    image = np.full((900, 900, 3), 100, dtype=np.uint8)
    found = detections([(300, 300, 400, 400)])
    picture = draw_detections(image, found, NAMES)
    x, y, width, height = cv2.boundingRect(changed(image, picture)[:298].astype(np.uint8))
    label = picture[y : y + height, x : x + width]
    assert (label.max(axis=2) < 40).any()  # black ink
    assert not np.array_equal(picture, draw_detections(image, found, ("cat", "", "")))
    other = Detections(found.boxes, found.scores - 0.5, found.labels)
    assert not np.array_equal(picture, draw_detections(image, other, NAMES))
