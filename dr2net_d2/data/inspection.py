"""Statistics of a dataset, as JSON and as text."""

from __future__ import annotations

from typing import Any

import numpy as np

from dr2net_d2.data.coco import CocoDataset
from dr2net_d2.data.formats import BadEntries

BINS = {
    "AI-TOD": {"very tiny": (0, 8), "tiny": (8, 16), "small": (16, 32), "medium": (32, np.inf)},
    "COCO": {"small": (0, 32), "medium": (32, 96), "large": (96, np.inf)},
}
"""Benchmark -> bin -> its range of sides; a side is the square root of a box's area, in pixels."""

HISTOGRAM = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, np.inf)
_BAR = 40  # length of the longest bar in characters


def describe(dataset: CocoDataset, bad: BadEntries) -> dict[str, Any]:
    """Statistics of a dataset, ready for JSON; boxes to be ignored are counted separately."""
    records = dataset.records
    sides = [np.zeros(0)]
    labels, ignored_labels = [np.zeros(0, int)], [np.zeros(0, int)]
    counts = []
    for record in records:
        kept = ~record.iscrowd
        extent = (record.boxes[:, 2:] - record.boxes[:, :2])[kept].astype(np.float64)
        sides.append(np.sqrt(extent.prod(axis=1)))
        labels.append(record.labels[kept])
        ignored_labels.append(record.labels[record.iscrowd])
        counts.append(int(kept.sum()))
    side = np.concatenate(sides)
    classes = len(dataset.categories)
    per_class = np.bincount(np.concatenate(labels), minlength=classes).tolist()
    per_class_ignored = np.bincount(np.concatenate(ignored_labels), minlength=classes).tolist()
    sizes = {(record.width, record.height) for record in records}
    histogram = np.histogram(side, HISTOGRAM)[0].tolist()
    return {
        "images": len(records),
        "images_without_objects": counts.count(0),
        "boxes": len(side),
        "ignored_boxes": sum(per_class_ignored),
        "ignore_regions": sum(len(record.ignore_regions) for record in records),
        "empty_boxes_left_out": dataset.dropped,
        "classes": {
            name: {"boxes": boxes, "ignored": ignored}
            for name, boxes, ignored in zip(
                dataset.categories, per_class, per_class_ignored, strict=True
            )
        },
        "objects_per_image": _spread(np.array(counts)),
        "side": {**_spread(side), "mean": round(float(side.mean()), 2) if len(side) else None},
        "bins": {
            benchmark: {
                name: int(((side >= low) & (side < high)).sum())
                for name, (low, high) in bins.items()
            }
            for benchmark, bins in BINS.items()
        },
        "histogram": [
            {"from": low, "below": None if np.isinf(high) else high, "boxes": boxes}
            for low, high, boxes in zip(HISTOGRAM[:-1], HISTOGRAM[1:], histogram, strict=True)
        ],
        "image_width": _spread(np.array([record.width for record in records])),
        "image_height": _spread(np.array([record.height for record in records])),
        "distinct_image_sizes": len(sizes),
        "bad_entries": {"count": bad.count, "first": bad.listed},
    }


def report(facts: dict[str, Any]) -> str:
    """The statistics of ``describe`` as text."""
    per_image, side = facts["objects_per_image"], facts["side"]
    width, height = facts["image_width"], facts["image_height"]
    lines = [
        f"images          {facts['images']:,},"
        f" {facts['images_without_objects']:,} of them without objects",
        f"image size      width {_words(width)}, height {_words(height)} px,"
        f" {facts['distinct_image_sizes']:,} different",
        f"boxes           {facts['boxes']:,}, {_words(per_image)} per image",
        f"to be ignored   {facts['ignored_boxes']:,} boxes, {facts['ignore_regions']:,} regions",
        f"empty boxes     {facts['empty_boxes_left_out']:,}, left out",
        "",
        f"side (root of the area): {_words(side)} px, mean {side['mean']}",
    ]
    fullest = max(*(entry["boxes"] for entry in facts["histogram"]), 1)
    for entry in facts["histogram"]:
        end = "+" if entry["below"] is None else f"-{entry['below']}"
        name = f"{entry['from']}{end}"
        bar = "#" * round(_BAR * entry["boxes"] / fullest)
        lines.append(f"  {name:>8} px {entry['boxes']:>9,} {bar}".rstrip())
    for benchmark, bins in facts["bins"].items():
        lines.append(f"{benchmark}: " + ", ".join(f"{n} {count:,}" for n, count in bins.items()))
    lines += ["", "boxes by class (to be ignored)"]
    longest = max(map(len, facts["classes"]))
    for name, count in facts["classes"].items():
        ignored = f" ({count['ignored']:,})" if count["ignored"] else ""
        lines.append(f"  {name:<{longest}} {count['boxes']:>9,}{ignored}")
    bad = facts["bad_entries"]
    lines += ["", f"bad entries     {bad['count']:,}", *(f"  {entry}" for entry in bad["first"])]
    if bad["count"] > len(bad["first"]):
        lines.append(f"  ... and {bad['count'] - len(bad['first']):,} more")
    return "\n".join(lines)


def _spread(values: np.ndarray) -> dict[str, float | None]:
    if not len(values):
        return {"min": None, "median": None, "max": None}
    spread = {"min": values.min(), "median": np.median(values), "max": values.max()}
    return {name: round(float(value), 2) for name, value in spread.items()}


def _words(spread: dict[str, Any]) -> str:
    if spread["min"] is None:
        return "none"
    low, middle, high = (f"{spread[name]:,g}" for name in ("min", "median", "max"))
    return f"{low} to {high} (median {middle})"
