"""What is written is what pycocotools and OpenCV read."""

import cv2
import numpy as np
from pycocotools.coco import COCO

from dr2net_d2.data import SmallDigitsConfig, draw_canvas, make_small_digits, write_coco


def test_pycocotools_reads_what_was_written(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    boxes = np.array([[1.5, 2, 11.5, 10], [0, 0, 30, 20]])
    images = [
        ("one.png", pixels[0], np.zeros((0, 4)), np.zeros(0, int)),
        ("two.bmp", pixels[1], boxes, np.array([1, 0])),
    ]
    files = tmp_path / "set.json", tmp_path / "deep" / "images"
    write_coco(*files, iter(images), ["van", "car"], {"description": "two"})

    coco = COCO(str(files[0]))
    assert coco.dataset["info"] == {"description": "two"}
    assert coco.loadCats(coco.getCatIds()) == [{"id": 1, "name": "van"}, {"id": 2, "name": "car"}]
    for image, (name, written, *_) in zip(coco.loadImgs([1, 2]), images, strict=True):
        assert (image["file_name"], image["height"], image["width"]) == (name, 20, 30)
        assert (cv2.imread(str(files[1] / name)) == written).all()
    assert coco.getAnnIds(imgIds=[1]) == []
    first, second = coco.loadAnns(coco.getAnnIds(imgIds=[2]))
    assert first["bbox"] == [1.5, 2, 10, 8] and first["area"] == 80
    assert first["category_id"] == 2 and second["category_id"] == 1
    assert second["bbox"] == [0, 0, 30, 20] and first["iscrowd"] == 0


def filled(mask: np.ndarray) -> np.ndarray:
    """A mask with its holes closed, which a COCO polygon cannot have."""
    outside = np.pad(mask, 1).astype(np.uint8)
    cv2.floodFill(outside, None, (0, 0), 2)
    return outside[1:-1, 1:-1] != 2


def test_pycocotools_reads_the_masks_that_were_drawn(tmp_path):
    config = SmallDigitsConfig("train", num_images=3, size=128)
    json_file, _ = make_small_digits(config, tmp_path)
    truth = COCO(json_file)
    for index in range(3):
        image, boxes, _, masks = draw_canvas(config, index)
        assert len(masks) == len(boxes) > 0
        annotations = truth.loadAnns(truth.getAnnIds(imgIds=[index + 1]))
        for annotation, mask, box in zip(annotations, masks, boxes.astype(int), strict=True):
            whole = np.zeros(image.shape[:2], bool)
            whole[box[1] : box[3], box[0] : box[2]] = mask
            np.testing.assert_array_equal(truth.annToMask(annotation), filled(whole))
