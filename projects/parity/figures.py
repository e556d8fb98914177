"""Pictures of results.jsonl and costs.json: accuracy against memory, learning curves, ablations."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.isotonic import IsotonicRegression

from projects.parity import arms
from projects.parity.finetune import FINISHED
from projects.parity.results import CONVENTIONAL, OURS, Row, differences, final_rows

# Okabe and Ito's colours, which colour-blind readers tell apart too.
COLOURS = {
    CONVENTIONAL: "#000000",
    "frozen": "#999999",
    "lora": "#CC79A7",
    "hard-1": "#E69F00",
    "static-float": "#D55E00",
    "alternating-float": "#F0C000",
    "alternating": "#56B4E9",
    OURS: "#0072B2",
    "static-1/2": "#009E73",
}
"""The arms whose curves are drawn."""

FAR_BELOW = ("scratch", "scratch-reversible")
"""Arms that are left out where they would press the others together."""

TASKS = (
    (-0.2, "#0072B2", "SmallDigits", ""),
    (0.0, "#009E73", f"SmallDigits, {arms.LONG_KEYS['SOLVER.MAX_ITER']} iterations", "long/"),
    (0.2, "#D55E00", "PhotoShapes", "shapes/"),
)
"""Of one picture: shift on the page, colour, label, what names of arms begin with."""

OTHERS = "#777777"
LABEL_HEIGHT = 0.55
"""Of a line of text, in AP."""


def accuracies(rows: Sequence[Row], name: str) -> list[float]:
    return [row["AP"] for row in final_rows(rows, name) if row["status"] == FINISHED]


def draw_arms(rows: Sequence[Row], costs: dict[str, Any], file: Path) -> None:
    """AP over peak memory, a point per arm with the standard deviation over seeds."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    reached = [(accuracies(rows, arm.name), arm) for arm in arms.ARMS if arm.name not in FAR_BELOW]
    shown = sorted(
        (statistics.mean(found), _deviation(found), arm.label, arm.name)
        for found, arm in reached
        if found and arm.name in costs["arms"]
    )
    heights = spread_labels([mean for mean, *_ in shown], LABEL_HEIGHT)
    for (y, deviation, label, name), height in zip(shown, heights, strict=True):
        x = costs["arms"][name]["peak_bytes"] / 1e6
        colour = COLOURS.get(name, OTHERS)
        axes.errorbar(x, y, deviation, fmt="o", color=colour, capsize=3, ms=6)
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6}
        axes.annotate(
            label, (x, y), (x + 5, height), fontsize=8, color=colour, va="center",
            arrowprops=line,
        )  # fmt: skip
    axes.margins(x=0.25)
    _dress(axes, "peak memory of an iteration / MB", "AP / %")
    axes.set_title("Accuracy and memory; mean and standard deviation over seeds")
    figure.savefig(file, dpi=110)


def spread_labels(heights: Sequence[float], distance: float) -> list[float]:
    """Ascending heights moved as little as keeps neighbours ``distance`` apart.

    Isotonic regression of what remains of them when every label is put at its rank's distance.
    """
    ranks = distance * np.arange(len(heights))
    return list(IsotonicRegression().fit_transform(ranks, np.array(heights) - ranks) + ranks)


def draw_curves(rows: Sequence[Row], file: Path) -> None:
    """Loss and AP over iterations, gradient error over training; means over seeds."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, colour in COLOURS.items():
        found = [row for row in final_rows(rows, name) if row["status"] == FINISHED]
        if not found:
            continue
        style = {"color": colour, "label": arms.EVERYTHING[name].label}
        for axes, key in zip(panels, ("loss", "curve"), strict=False):
            points = _means(row[key] for row in found)
            axes.plot(points.keys(), points.values(), "o-" if key == "curve" else "-", **style)
        errors = _means(
            [[progress, error] for progress, *_, error in row["gradient_error"] if error]
            for row in found
        )
        panels[2].plot(errors.keys(), errors.values(), "o-", ms=3, **style)
    _dress(panels[0], "iteration", "total loss")
    _dress(panels[1], "iteration", "AP / %")
    _dress(panels[2], "fraction of training", "relative gradient error of the ViT")
    panels[2].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(file, dpi=110)


def draw_ablations(rows: Sequence[Row], file: Path) -> None:
    """AP of every variant, on the band of the default; a panel per question."""
    default = accuracies(rows, OURS)
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = list(figure.subplots(2, 3, sharex=True).flat)
    for axes, (heading, variants) in zip(panels, arms.ABLATIONS.items(), strict=False):
        if default:
            middle, half = statistics.mean(default), _deviation(default)
            axes.axvspan(middle - half, middle + half, color=COLOURS[OURS], alpha=0.15)
            axes.axvline(middle, color=COLOURS[OURS], lw=1)
        for height, variant in enumerate(variants):
            found = accuracies(rows, variant.name)
            if found:
                axes.errorbar(
                    statistics.mean(found), height, xerr=_deviation(found), fmt="ko", capsize=3
                )
        axes.set_yticks(range(len(variants)), [variant.label for variant in variants])
        axes.invert_yaxis()
        axes.tick_params(labelbottom=True)
        axes.set_title(heading)
        _dress(axes, "AP / %", "")
    for axes in panels[len(arms.ABLATIONS) :]:
        axes.set_axis_off()
    figure.suptitle("Variants of the default; blue: the default, mean ± standard deviation")
    figure.savefig(file, dpi=110)


def draw_tasks(rows: Sequence[Row], file: Path) -> None:
    """AP beyond conventional finetuning with the same seed, on each task; a line per arm."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    shown = [n for n in arms.SHAPES_ARMS if n != CONVENTIONAL and n not in FAR_BELOW]
    for shift, colour, task, prefix in TASKS:
        reference = final_rows(rows, prefix + CONVENTIONAL)
        found = [differences(final_rows(rows, prefix + name), reference) for name in shown]
        points = [(height + shift, delta) for height, delta in enumerate(found) if delta]
        axes.errorbar(
            [statistics.mean(delta) for _, delta in points],
            [height for height, _ in points],
            xerr=[_deviation(delta) for _, delta in points],
            fmt="o",
            color=colour,
            capsize=3,
            label=task,
        )
    axes.axvline(0, color=COLOURS[CONVENTIONAL], lw=1)
    axes.set_yticks(range(len(shown)), [arms.EVERYTHING[name].label for name in shown])
    axes.invert_yaxis()
    axes.legend()
    _dress(axes, "AP beyond conventional finetuning with the same seed", "")
    figure.savefig(file, dpi=110)


def _means(series: Any) -> Mapping[float, float]:
    """[[x, y], ...] of several runs -> the mean y of each x, in order."""
    gathered: dict[float, list[float]] = {}
    for points in series:
        for x, y in points:
            gathered.setdefault(x, []).append(y)
    return {x: statistics.mean(values) for x, values in sorted(gathered.items())}


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
