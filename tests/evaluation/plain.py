"""Independent evaluations in plain loops, box by box.

They follow the VisDrone-DET toolkit (MATLAB) and TinyPerson's copy of cocoeval.py.
"""

import numpy as np


def overlap(detection, truth, over_detection):
    x0, y0, w, h = detection
    x1, y1, v, u = truth
    width, height = min(x0 + w, x1 + v) - max(x0, x1), min(y0 + h, y1 + u) - max(y0, y1)
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (w * h if over_detection else w * h + v * u - shared)


def by_score(rows):
    return sorted(rows, key=lambda row: -row["score"])


def of_class(rows, category):
    return [row for row in rows if row["category_id"] == category]


def per_image(document, rows):
    images = sorted(row["id"] for row in document["images"])
    return {image: [row for row in rows if row["image_id"] == image] for image in images}


# VisDrone


def outside_regions(rows, image, regions):
    """Pixel by pixel, counted from 1: row 0 and column 0 of the map are outside the image."""
    width, height = image["width"], image["height"]
    ignored = np.zeros((height + 1, width + 1), bool)
    for region in regions:
        x, y, w, h = (max(1, int(value)) for value in region["bbox"])
        ignored[y : y + h + 1, x : x + w + 1] = True
    kept = []
    for row in rows:
        x, y, w, h = (max(1, int(np.floor(value + 0.5))) for value in row["bbox"])
        x, y = min(x, width), min(y, height)
        if ignored[y + 1 : y + h + 1, x + 1 : x + w + 1].sum() / (w * h) < 0.5:
            kept.append(row)
    return kept if regions else rows


def visdrone_match(truth, detections, threshold):
    """1 for correct, 0 for wrong, -1 for ignored; for each detection, by descending score."""
    truth = sorted(truth, key=lambda row: row["iscrowd"])
    taken, kinds = set(), []
    for detection in by_score(detections):
        best, chosen = threshold, None
        for index, row in enumerate(truth):
            if index in taken:
                continue
            if chosen is not None and row["iscrowd"]:
                break
            value = overlap(detection["bbox"], row["bbox"], row["iscrowd"])
            if value >= best:
                best, chosen = value, index
        if chosen is None:
            kinds.append(0)
        elif truth[chosen]["iscrowd"]:
            kinds.append(-1)
        else:
            taken.add(chosen)
            kinds.append(1)
    return kinds


def voc_average(recall, precision):
    recall, precision = [0, *recall, 1], [0, *precision, 0]
    for i in reversed(range(len(precision) - 1)):
        precision[i] = max(precision[i], precision[i + 1])
    pairs = zip(recall, recall[1:], precision[1:], strict=False)
    return sum((high - low) * value for low, high, value in pairs)


def visdrone(document, results):
    images = {row["id"]: row for row in document["images"]}
    regions = per_image(document, document["ignore_regions"])
    truth = per_image(document, document["annotations"])
    found = per_image(document, results)
    for image in images:
        truth[image] = outside_regions(truth[image], images[image], regions[image])
        found[image] = by_score(outside_regions(found[image], images[image], regions[image]))
    names = {row["id"]: row["name"] for row in document["categories"]}
    evaluated = [category for category in sorted(names) if names[category] != "others"]
    thresholds, limits = np.linspace(0.5, 0.95, 10), (1, 10, 100, 500)
    precisions, recalls, weights = {}, {}, {}
    for category in evaluated:
        weights[category] = sum(bool(of_class(truth[image], category)) for image in images)
        for t, threshold in enumerate(thresholds):
            for limit in limits:
                kinds, scores, objects = [], [], 0
                for image in sorted(images):
                    objects += len(of_class(truth[image], category))
                    best = by_score(of_class(found[image][:limit], category))
                    kinds += visdrone_match(of_class(truth[image], category), best, threshold)
                    scores += [row["score"] for row in best]
                kinds = np.array(kinds)[np.argsort(-np.array(scores), kind="stable")]
                right, wrong = np.cumsum(kinds == 1), np.cumsum(kinds == 0)
                recall = right / max(1, objects)
                recalls[category, t, limit] = max(recall, default=0)
            precision = right / np.maximum(1, right + wrong)
            precisions[category, t] = voc_average(recall, precision)

    def mean(values):
        return 100 * np.average(values, weights=[weights[category] for category in evaluated])

    def ap(*steps):
        return mean([np.mean([precisions[category, t] for t in steps]) for category in evaluated])

    metrics = {"AP": ap(*range(10)), "AP50": ap(0), "AP75": ap(5)}
    for limit in limits:
        rows = [[recalls[category, t, limit] for t in range(10)] for category in evaluated]
        metrics[f"AR{limit}"] = mean(np.mean(rows, axis=1))
    return metrics


# TinyPerson


def tinyperson_match(truth, detections, threshold, low, high):
    """The same as ``visdrone_match``, and the number of objects to find."""

    def outside(row):
        area = row["bbox"][2] * row["bbox"][3]
        return area < low or area > high

    ignored = [bool(row["iscrowd"] or outside(row)) for row in truth]
    order = sorted(range(len(truth)), key=lambda index: ignored[index])
    taken, kinds = set(), []
    for detection in by_score(detections)[:200]:
        best, chosen = threshold, None
        for index in order:
            if index in taken:
                continue
            if chosen is not None and not ignored[chosen] and ignored[index]:
                break
            value = overlap(detection["bbox"], truth[index]["bbox"], False)
            if value >= best:
                best, chosen = value, index
        if chosen is None:
            inside = [
                overlap(detection["bbox"], row["bbox"], True)
                for row, aside in zip(truth, ignored, strict=True)
                if aside
            ]
            if max(inside, default=0) >= threshold:
                kinds.append(-1)
            else:
                kinds.append(-1 if outside(detection) else 0)
        else:
            taken.add(chosen)
            kinds.append(-1 if ignored[chosen] else 1)
    return kinds, ignored.count(False)


def tinyperson(document, results):
    truth = per_image(document, document["annotations"])
    found = per_image(document, results)
    sides = {
        "tiny": (1, 20), "tiny1": (1, 8), "tiny2": (8, 12), "tiny3": (12, 20), "small": (20, 32),
        "reasonable": (32, 1e5), "all": (1, 1e5),
    }  # fmt: skip
    metrics = {}
    for threshold in (0.25, 0.5, 0.75):
        for size, (low, high) in sides.items():
            averages = []
            for category in (row["id"] for row in document["categories"]):
                kinds, scores, objects = [], [], 0
                for image in sorted(truth):
                    best = by_score(of_class(found[image], category))
                    match, count = tinyperson_match(
                        of_class(truth[image], category), best, threshold, low**2, high**2
                    )
                    kinds, objects = kinds + match, objects + count
                    scores += [row["score"] for row in best[:200]]
                if objects:
                    averages.append(coco_average(np.array(kinds), np.array(scores), objects))
            metrics[f"AP{100 * threshold:.0f}_{size}"] = 100 * np.mean(averages)
    return metrics


def coco_average(kinds, scores, objects):
    kinds = kinds[np.argsort(-scores, kind="stable")]
    right, wrong = np.cumsum(kinds == 1), np.cumsum(kinds == 0)
    precision = [r / (r + w) if r else 0.0 for r, w in zip(right, wrong, strict=True)]
    points = [
        max((p for p, r in zip(precision, right, strict=True) if r / objects >= recall), default=0)
        for recall in np.linspace(0, 1, 101)
    ]
    return np.mean(points)
