"""Pictures of a finished training, drawn from its output files; for both engines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from dr2net_d2.data import load_coco, read_image

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_TRUTH, _DETECTION = "#00E5A0", "#FFB000"

_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "total loss", {"total_loss": "total"}),
    ("Accuracy", "average precision / %", {}),
    ("Coefficients", "value", {"dr2net/alpha": "α", "dr2net/beta": "β"}),
    ("Memory", "peak memory / MiB", {"memory/peak_mb": "peak"}),
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.json, without lines that were cut off."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def draw_curves(output_dir: str | Path) -> Path:
    """Draw loss, AP, coefficients and peak memory over iterations, from metrics.json.

    If a resumed training has repeated an iteration, its later line counts.

    Returns:
        Path of the picture, curves.png.
    """
    rows = read_metrics(Path(output_dir, "metrics.json"))
    # The names depend on the evaluation protocol.
    accuracies = [k for k in chain(*rows) if k.startswith("bbox/AP") and "-" not in k]
    accuracy = {key: key.removeprefix("bbox/") for key in list(dict.fromkeys(accuracies))[:2]}
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (title, label, series) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        series = series or accuracy
        for colour, (key, name) in zip(_COLOURS, series.items(), strict=False):
            values = {row["iteration"] + 1: row[key] for row in rows if key in row}
            iterations = sorted(values)
            axes.plot(
                iterations,
                [values[iteration] for iteration in iterations],
                "o" if len(values) < 30 else "",
                ls="-",
                color=colour,
                ms=4,
                label=name,
            )
        _dress(axes, title, label, legend=len(series) > 1)
    path = Path(output_dir, "curves.png")
    figure.savefig(path, dpi=120)
    return path


def draw_predictions(
    json_file: str | Path,
    image_root: str | Path,
    results_file: str | Path,
    output_file: str | Path,
    num_images: int = 4,
    score_threshold: float = 0.5,
) -> Path:
    """Draw ground truth and detections side by side, one row per image.

    Args:
        json_file: ground truth in COCO format.
        image_root: the folder of its images.
        results_file: COCO results, such as inference/coco_instances_results.json.
        output_file: the picture to write.
        num_images: number of images, evenly spread over the dataset.
        score_threshold: minimum score of the detections to draw.

    Returns:
        ``output_file`` as a path.
    """
    dataset = load_coco(json_file, image_root)
    names = dict(zip(dataset.category_ids, dataset.categories, strict=True))
    results = json.loads(Path(results_file).read_bytes())
    count = min(num_images, len(dataset.records))
    chosen = np.linspace(0, len(dataset.records) - 1, count).round().astype(int)
    figure = Figure(figsize=(13, 6.6 * count), layout="constrained")
    panels = figure.subplots(count, 2, squeeze=False)
    for (left, right), index in zip(panels, chosen, strict=True):
        record = dataset.records[index]
        pixels = cv2.cvtColor(read_image(record), cv2.COLOR_BGR2RGB)
        detections = [
            result
            for result in results
            if result["image_id"] == record.image_id and result["score"] >= score_threshold
        ]
        title = Path(record.file_name).name
        _draw_boxes(
            left,
            pixels,
            f"{title}: {len(record.boxes)} objects",
            record.boxes,
            [dataset.categories[label] for label in record.labels],
            _TRUTH,
        )
        x, y, width, height = np.reshape([result["bbox"] for result in detections], (-1, 4)).T
        _draw_boxes(
            right,
            pixels,
            f"{len(detections)} detections with a score of at least {score_threshold:g}",
            np.stack([x, y, x + width, y + height], axis=1),
            [f"{names[result['category_id']]} {result['score']:.2f}" for result in detections],
            _DETECTION,
        )
    figure.savefig(output_file, dpi=90)
    return Path(output_file)


def _draw_boxes(
    axes: Axes,
    pixels: np.ndarray,
    title: str,
    boxes: np.ndarray,
    captions: Sequence[str],
    colour: str,
) -> None:
    axes.imshow(pixels, interpolation="nearest")
    for (x0, y0, x1, y1), caption in zip(boxes.tolist(), captions, strict=True):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=colour, lw=1.5))
        axes.annotate(
            caption,
            (x0, y0),
            xytext=(0, 1),
            textcoords="offset points",
            fontsize=7,
            va="bottom",
            color="black",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            annotation_clip=False,
        )
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()


def _dress(axes: Axes, title: str, label: str, legend: bool) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("iteration")
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False)
