"""Random crowded scenes with equal overlaps and scores, sides on the bounds of bins, and crowds."""

import json

import numpy as np

SIDES = [4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 96, 100]


def random_document(rng, images=40, classes=3, regions=False):
    """A ground truth of independent, crowded images, with few distinct values."""
    annotations, ignored = [], []
    for image in range(1, images + 1):
        for category in range(1, classes + 1):
            for x, y, w, h in _boxes(rng, rng.integers(0, 8)):
                row = {"image_id": 3 * image, "category_id": 2 * category, "bbox": [x, y, w, h]}
                row |= {"area": w * h, "iscrowd": int(rng.random() < 0.15)}
                annotations.append({"id": len(annotations) + 1, **row})
        for x, y, w, h in _boxes(rng, rng.integers(0, 4)) if regions else ():
            ignored.append({"id": len(ignored), "image_id": 3 * image, "bbox": [x, y, 2 * w, h]})
    return {
        "images": [
            {"id": 3 * i, "file_name": f"{i}.png", "width": 90, "height": 70}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": 2 * k, "name": f"class{k}"} for k in range(1, classes + 1)],
        "annotations": [annotations[i] for i in rng.permutation(len(annotations))],
        **({"ignore_regions": ignored} if regions else {}),
    }


def random_results(rng, document, most=12):
    """Detections on, near and beside the objects; whole and half pixels make ties frequent."""
    results = []
    for image in document["images"]:
        for category in document["categories"]:
            keys = {"image_id": image["id"], "category_id": category["id"]}
            near = [
                row["bbox"] for row in document["annotations"] if row["image_id"] == image["id"]
            ]
            for box in _boxes(rng, rng.integers(0, most)):
                if near and rng.random() < 0.8:
                    chosen = np.array(near[rng.integers(len(near))], float)
                    box = np.maximum(chosen + rng.choice([0, 0, 0.5, -1, 2], 4), [-9, -9, 1, 1])
                score = float(rng.choice([0.1, 0.3, 0.5, rng.random()]))
                results.append({**keys, "bbox": [float(x) for x in box], "score": score})
    return [results[i] for i in rng.permutation(len(results))]


def _boxes(rng, count):
    corners, sides = (
        rng.integers(0, 60, (count, 2)),
        rng.choice(SIDES[: rng.integers(3, 14)], (count, 2)),
    )
    return np.concatenate([corners // 5 * 5, sides], axis=1).tolist()


def write(path, document):
    path.write_text(json.dumps(document))
    return path
