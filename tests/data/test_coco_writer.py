"""What is written is what pycocotools and OpenCV read."""

import cv2
import numpy as np
from pycocotools.coco import COCO

from dr2net_d2.data import write_coco


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
