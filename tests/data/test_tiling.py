"""Tiles of large images against one pixel at a time, SAHI's grids, and pictures by hand."""

import numpy as np
import pytest

from dr2net_d2.data.tiling import (
    Grid,
    ImageBoxes,
    TileChoice,
    choose_tiles,
    complete_in_some_tile,
    cut_within_complete,
    paint_over,
    touches_inner_border,
    visible_fractions,
)
from dr2net_d2.errors import DatasetError


@pytest.mark.parametrize(
    ("height", "width", "size", "overlap"),
    [
        (100, 100, 40, 0.25),
        (97, 160, 40, 0.2),
        (100, 70, 40, 0.0),
        (30, 20, 40, 0.5),
        (40, 80, 40, 0.0),
        (41, 40, 40, 0.9),
        (30, 500, 64, 0.33),
    ],
)
def test_grids_cover_every_pixel_and_are_sahis(height, width, size, overlap):
    tiles = Grid(size, overlap).tiles(height, width)
    seen = np.zeros((height, width), dtype=int)
    for x0, y0, x1, y1 in tiles:
        assert (y1 - y0, x1 - x0) == (min(size, height), min(size, width))
        assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
        seen[y0:y1, x0:x1] += 1
    assert seen.min() == 1
    assert len({*map(tuple, tiles.tolist())}) == len(tiles)
    slicing = pytest.importorskip("sahi.slicing")
    theirs = slicing.get_slice_bboxes(height, width, size, size, False, overlap, overlap)
    assert tiles.tolist() == theirs


@pytest.mark.parametrize(("size", "overlap"), [(0, 0.2), (10, 1.0), (10, -0.1)])
def test_a_grid_that_cannot_be(size, overlap):
    with pytest.raises(ValueError, match=rf"SIZE is {size} and OVERLAP {overlap:g}"):
        Grid(size, overlap)


@pytest.mark.parametrize(("visible", "ratio"), [(-0.1, 0), (1.1, 0), (0.5, -1)])
def test_a_choice_that_cannot_be(visible, ratio):
    with pytest.raises(ValueError, match=rf"MIN_VISIBLE is {visible:g} and EMPTY_RATIO {ratio:g}"):
        TileChoice(Grid(10, 0), visible, ratio)


def scene(rng, count, height=60, width=90):
    """Whole-pixel boxes, some of them over the image's edge, every fifth one a crowd."""
    corners = rng.integers(-5, (width, height), (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(6, 25, (count, 2))], axis=1)
    return ImageBoxes(height, width, boxes.astype(np.float32), np.arange(count) % 5 == 4)


def drawn(box, height, width):
    canvas = np.zeros((height, width), dtype=bool)
    x0, y0, x1, y1 = box.astype(int).clip(0)
    canvas[y0:y1, x0:x1] = True
    return canvas


@pytest.mark.parametrize("min_visible", [0.0, 0.5, 1.0])
def test_what_tiles_show_counted_pixel_by_pixel(min_visible):
    images = [scene(np.random.default_rng(seed), 12) for seed in range(3)]
    choice = TileChoice(Grid(32, 0.25), min_visible, empty_ratio=1000)
    tiles = choose_tiles(images, choice, seed=0)
    per_image = len(choice.grid.tiles(60, 90))
    assert [tile.image for tile in tiles] == sorted([0, 1, 2] * per_image)
    some_cut = 0
    for tile in tiles:
        _, _, boxes, iscrowd = images[tile.image]
        x0, y0, x1, y1 = tile.corners
        for index, box in enumerate(boxes):
            canvas = drawn(box, 60, 90)
            inside = canvas[y0:y1, x0:x1].sum()
            shown = inside > 0 and inside >= min_visible * canvas.sum() and not iscrowd[index]
            assert (index in tile.objects) == shown
            assert (index in tile.cut) == (inside > 0 and not shown and not iscrowd[index])
        some_cut += len(tile.cut)
    assert (some_cut > 0) == (min_visible > 0)


def test_fractions_of_empty_boxes_are_nothing():
    boxes = np.array([[2, 2, 2, 9], [0, 0, 4, 4]], np.float32)
    assert visible_fractions(boxes, np.array([[0, 0, 2, 4]])).tolist() == [[0, 0.5]]


def test_the_ratio_of_empty_tiles_and_its_draw(caplog):
    rng = np.random.default_rng(0)
    images = [scene(rng, 2, 200, 300) for _ in range(4)]

    def chosen(ratio, seed=0):
        tiles = choose_tiles(images, TileChoice(Grid(40, 0.25), 0.4, ratio), seed)
        return [(tile.image, tile.corners) for tile in tiles if not len(tile.objects)], tiles

    none, full = chosen(0)
    assert none == [] and 4 < len(full) < 40
    for ratio in (0.1, 0.5, 2):
        empty, tiles = chosen(ratio)
        assert len(empty) == int(ratio * len(full))
        assert len(tiles) - len(empty) == len(full)
        assert chosen(ratio)[0] == empty
        assert chosen(ratio, seed=1)[0] != empty
        order = [(tile.image, *tile.corners[1::-1]) for tile in tiles]
        assert order == sorted(order)
    everything = sum(len(Grid(40, 0.25).tiles(200, 300)) for _ in images)
    assert len(chosen(1e9)[1]) == everything


def test_objects_that_no_tile_shows_are_counted(caplog):
    boxes = np.array([[0, 0, 50, 50], [1, 1, 6, 6]], np.float32)
    with caplog.at_level("INFO", "dr2net_d2.data.tiling"):
        choose_tiles(
            [ImageBoxes(50, 50, boxes, np.zeros(2, bool))], TileChoice(Grid(20, 0), 0.4, 0), 0
        )
    assert "1 of 2 objects are in no tile" in caplog.text


def test_a_choice_without_any_object_is_a_dataset_error():
    image = ImageBoxes(50, 50, np.array([[0, 0, 50, 50]], np.float32), np.zeros(1, bool))
    with pytest.raises(DatasetError, match=r"no tile of 20 px shows 0.4 of an object's area"):
        choose_tiles([image], TileChoice(Grid(20, 0), 0.4, 1.0), 0)


def test_paint_covers_regions_and_no_object():
    image = np.random.default_rng(0).integers(0, 200, (20, 30, 3), dtype=np.uint8)
    before = image.copy()
    regions = np.array([[-4, 2.5, 8.2, 9], [20, 15, 99, 99]], np.float32)
    objects = np.array([[5.5, 4, 12, 6.5]], np.float32)
    painted = paint_over(image, regions, objects, np.array([250, 251, 252]))
    expected = before.copy()
    for y in range(20):
        for x in range(30):
            in_region = (y in range(2, 9) and x < 9) or (y >= 15 and x >= 20)
            if in_region and not (x in range(5, 12) and y in range(4, 7)):
                expected[y, x] = (250, 251, 252)
    np.testing.assert_array_equal(painted, expected)
    np.testing.assert_array_equal(image, before)
    assert painted.dtype == np.uint8
    assert paint_over(image, regions[:0], objects, np.zeros(3)) is image


TILES = Grid(40, 0.25).tiles(40, 100)  # x from 0, 30, 60


def test_borders_count_where_the_image_goes_on():
    assert TILES[:, 0].tolist() == [0, 30, 60]
    boxes = np.array(
        [[31, 5, 39, 10], [40, 0, 50, 40], [62.5, 5, 69, 10], [45, 5, 52, 10]], np.float32
    )
    # The second touches the image's edges alone.
    assert touches_inner_border(boxes, TILES[1], 40, 100).tolist() == [True, False, True, False]
    assert touches_inner_border(boxes, np.array([0, 0, 100, 40]), 40, 100).tolist() == [False] * 4


def test_a_box_is_complete_in_some_tile_where_a_neighbour_reaches_around_it():
    boxes = np.array(
        [
            [34, 5, 40, 10],  # at the end of the first tile, well within the second
            [25, 5, 40, 10],  # longer than the overlap
            [0, 5, 40, 10],  # as long as the tile
            [31, 5, 40, 10],  # at the start of the second tile as well
        ],
        np.float32,
    )
    assert complete_in_some_tile(boxes, TILES, 40, 100).tolist() == [True, False, False, False]


def test_cut_boxes_within_a_better_complete_one():
    boxes = np.array(
        [[30, 0, 45, 50], [0, 0, 50, 50], [30, 0, 45, 50], [30, 0, 45, 50], [40, 0, 90, 50]],
        np.float32,
    )
    labels = np.array([1, 1, 1, 2, 1])
    cut = np.array([True, False, True, True, True])
    # The first is better than the whole, the fourth of another class, the last mostly outside.
    within = cut_within_complete(boxes, labels, cut, 0.5, max_detections=9)
    assert within.tolist() == [False, False, True, False, False]
    assert not cut_within_complete(boxes, labels, ~cut, 0.6, max_detections=9)[[0, 2, 3, 4]].any()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_the_best_stay_the_same_where_fewer_are_wanted(count):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60, (80, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 60, (80, 2))], axis=1)
    labels, cut = rng.integers(0, 2, 80), rng.random(80) < 0.7
    every, some = (cut_within_complete(boxes, labels, cut, 0.5, n) for n in (80, count))
    assert every.sum() > 5
    assert (~some).nonzero()[0][:count].tolist() == (~every).nonzero()[0][:count].tolist()
