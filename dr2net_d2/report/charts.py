"""The charts of a report, each a Matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from dr2net_d2.evaluation.breakdowns import CURVE_RECALLS, KindsGroup, RecallGroup
from dr2net_d2.report.content import Content
from dr2net_d2.report.theme import LIGHT, Theme, dress_legend, make_panel

_LINES = ("-", "--", "-.", ":")


def draw_limits(content: Content, theme: Theme) -> Figure:
    """Gain in AP50 from fixing each kind of errors."""
    figure, axes = make_panel(theme, 5.2, 3.6)
    names = [row.kind for row in content.kinds]
    gains = [0 if math.isnan(row.gain) else row.gain for row in content.kinds]
    axes.barh(names, gains, 0.62, color=theme.colours[1])
    for place, row in enumerate(content.kinds):
        text = " –" if math.isnan(row.gain) else f" +{row.gain:.1f}"
        axes.text(gains[place], place, text, va="center", color=theme.ink, fontweight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max([*gains, 1]))
    axes.set_xlabel("AP50 gained if all errors of the kind were fixed")
    axes.tick_params(axis="y", length=0, labelsize=11)
    axes.grid(axis="y", visible=False)
    return figure


def draw_kinds_by_size(content: Content, theme: Theme) -> Figure:
    """Numbers of errors of each kind, by size."""
    figure, axes = make_panel(theme, 5.2, 3.6)
    groups = content.kinds_by_size
    bottom = np.zeros(len(groups))
    hatches = ("", "///", "", "...", "", "\\\\\\")
    names = groups[0].numbers if groups else ()
    for name, colour, hatch in zip(names, theme.colours, hatches, strict=False):
        numbers = np.array([group.numbers[name] for group in groups], float)
        style: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": theme.paper, "lw": 0}
        axes.bar(range(len(groups)), numbers, 0.82, bottom=bottom, **style, label=name)
        bottom += numbers
    _size_axis(axes, groups, "side of the detection, or of the missed object / px")
    axes.set_ylabel(f"errors, score ≥ {content.threshold.score:.2f}")
    _whole_numbers(axes)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return dress_legend(figure)


def draw_missed(content: Content, theme: Theme) -> Figure:
    """Found and missed objects by size."""
    figure, axes = make_panel(theme)
    groups, threshold = content.sizes, content.threshold.score
    objects = np.array([group.objects for group in groups], float)
    matched = np.array([group.matched for group in groups], float)
    kept = np.array([group.matched_at_threshold for group in groups], float)
    places, blue, vermilion = range(len(groups)), theme.colours[0], theme.colours[1]
    axes.bar(places, kept, 0.82, color=blue, label=f"found, score ≥ {threshold:.2f}")
    axes.bar(
        places, matched - kept, 0.82, bottom=kept, color=blue, alpha=0.4,
        label="found with a lower score",
    )  # fmt: skip
    axes.bar(
        places, objects - matched, 0.82, bottom=matched, color=vermilion, hatch="///",
        edgecolor=theme.paper, lw=0, label="not found at all",
    )  # fmt: skip
    for place, (number, hit) in enumerate(zip(objects, kept, strict=True)):
        text = f"{(number - hit) / number:.0%}" if number else ""
        axes.text(place, number, text, ha="center", va="bottom", fontsize=9, color=theme.ink)
    _size_axis(axes, groups)
    axes.set_ylabel("objects (above: missed at that score)")
    axes.set_ylim(0, 1.25 * max([*objects, 1]))
    _whole_numbers(axes)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return dress_legend(figure)


def draw_recall_by_size(content: Content, theme: Theme) -> Figure:
    """Recall by size, at several minimum scores."""
    figure, axes = make_panel(theme)
    _draw_recalls(axes, theme, content.sizes)
    _size_axis(axes, content.sizes)
    return dress_legend(figure)


def draw_recall_by_density(content: Content, theme: Theme) -> Figure:
    """Recall by the number of objects in the image."""
    figure, axes = make_panel(theme)
    groups = content.densities
    _draw_recalls(axes, theme, groups)
    labels = [f"{_range(group, whole=True)}\n({group.images:,})" for group in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.set_xlabel("objects in the image (number of such images)")
    axes.set_xlim(-0.5, len(groups) - 0.5)
    return dress_legend(figure)


def draw_curves(content: Content, theme: Theme, iou: float) -> Figure:
    """Precision over recall by size, at an IoU threshold."""
    curves = content.curves[iou]
    figure, axes = make_panel(theme, height=3.8 + 0.22 * (len(curves) // 2))
    colours = (theme.colours[-1], *theme.colours[:-1])
    for place, curve in enumerate(curves):
        axes.plot(
            CURVE_RECALLS,
            curve.precision,
            color=colours[place % len(colours)],
            ls=_LINES[place % len(_LINES)],
            lw=2.6 if place == 0 else 2,
            label=f"{curve.size}: AP {curve.average_precision:.1f} ({curve.objects:,})",
        )
    _unit(axes)
    axes.set_xlabel(f"recall at IoU {iou:g}")
    axes.set_ylabel("precision")
    if curves:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, title="size (objects)")
    return dress_legend(figure)


def draw_confusion(content: Content, theme: Theme) -> Figure:
    """The confusion matrix, each row in shares of the objects of the class."""
    matrix = content.confusion.astype(float)
    names = [_short(name) for name in content.class_names]
    count = len(names)
    # The background has no objects: its row is relative to its sum.
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(5.8, 2.2 + 0.42 * (count + 1)), 15)
    figure, axes = make_panel(theme, side + 0.6, side)
    ramp = LinearSegmentedColormap.from_list("", [theme.paper, theme.colours[0]])
    # The square root makes confusions visible beside the diagonal.
    shade = np.sqrt(share)
    axes.imshow(shade, cmap=ramp, vmin=0, vmax=1, aspect="equal")
    size = 10 if count <= 12 else 9
    if count <= 24:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            value = share[row, column]
            # The blue of the dark theme is light.
            dark_cell = (shade[row, column] > 0.6) == (theme is LIGHT)
            colour = "#ffffff" if dark_cell else "#12161a"
            text = f"{100 * value:.0f}" if value >= 0.005 else "·"
            place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size - 1}
            axes.text(column, row, text, color=colour, **place)
    axes.axhline(count - 0.5, color=theme.ink, lw=1)
    axes.axvline(count - 0.5, color=theme.ink, lw=1)
    places = range(count + 1)
    plain: dict[str, Any] = {"fontsize": size, "parse_math": False}
    short = count <= 12 and max(map(len, names), default=0) <= 3
    axes.set_xticks(places, [*names, "missed"], rotation=0 if short else 90, **plain)
    axes.set_yticks(places, [*names, "background"], **plain)
    axes.set_xlabel("detected as")
    axes.set_ylabel("class of the object, per cent of the row")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labeltop=count > 24)
    return figure


def draw_scores(content: Content, theme: Theme) -> Figure:
    """Numbers of right, duplicate and otherwise wrong detections, by score."""
    figure, axes = make_panel(theme)
    scores = content.scores
    styles = {
        "right": (scores.correct, theme.colours[0], "-"),
        "duplicate": (scores.duplicate, theme.colours[4], "--"),
        "otherwise wrong": (scores.other_wrong, theme.colours[1], "-."),
    }
    for name, (numbers, colour, line) in styles.items():
        label = f"{name} ({sum(numbers):,})"
        axes.stairs(numbers, scores.edges, color=colour, ls=line, lw=2.2, label=label)
    _threshold_line(axes, theme, content.threshold.score)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlim(0, 1)
    axes.set_xlabel("score")
    axes.set_ylabel("detections (logarithmic)")
    axes.set_ylim(0, 30 * max(1, *(max(numbers) for numbers, _, _ in styles.values())))
    axes.legend(loc="upper center", ncols=2)
    return dress_legend(figure)


def draw_suppression(content: Content, theme: Theme) -> Figure:
    """Share of the duplicates that suppression at each IoU would remove."""
    figure, axes = make_panel(theme)
    overlaps = content.duplicates
    axes.plot(overlaps.iou, overlaps.removed, "o-", color=theme.colours[4], lw=2.2, ms=4)
    axes.set_ylim(0, 1.03)
    axes.set_xlim(min(overlaps.iou), 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("IoU with the better detection of the same object")
    axes.set_ylabel("duplicates with at least this IoU")
    return figure


def draw_calibration(content: Content, theme: Theme) -> Figure:
    """Precision by score."""
    figure, axes = make_panel(theme)
    axes.plot([0, 1], [0, 1], ls=":", color=theme.ink, lw=1.6, label="precision = score")
    for row in content.calibration:
        axes.bar(row.low, row.precision, row.high - row.low, align="edge", color=theme.colours[0],
                 edgecolor=theme.paper, lw=1.2)  # fmt: skip
    _threshold_line(axes, theme, content.threshold.score)
    _unit(axes)
    axes.set_xlabel("score")
    axes.set_ylabel("precision of these detections")
    axes.legend(loc="upper left")
    return dress_legend(figure)


CHARTS: dict[str, Callable[[Content, Theme], Figure]] = {
    "limits": draw_limits,
    "kinds_by_size": draw_kinds_by_size,
    "missed_by_size": draw_missed,
    "recall_by_size": draw_recall_by_size,
    "confusion": draw_confusion,
    "scores": draw_scores,
    "suppression": draw_suppression,
    "calibration": draw_calibration,
    "recall_by_density": draw_recall_by_density,
}


def charts_of(content: Content) -> dict[str, Callable[[Content, Theme], Figure]]:
    """The functions that draw the charts of a report, by file name."""
    curves = {f"curves_iou{100 * iou:.0f}": partial(draw_curves, iou=iou) for iou in content.curves}
    return CHARTS | curves


def _draw_recalls(axes: Axes, theme: Theme, groups: Sequence[RecallGroup]) -> None:
    for place, minimum in enumerate(groups[0].recall if groups else ()):
        axes.plot(
            range(len(groups)),
            [group.recall[minimum] for group in groups],
            color=(theme.colours[-1], *theme.colours)[place],
            ls=_LINES[place % len(_LINES)],
            marker="osD^v"[place],
            ms=5,
            lw=2,
            label=f"score ≥ {minimum:g}" if minimum else "any score",
        )
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("recall at IoU 0.5")
    if groups:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def _size_axis(
    axes: Axes,
    groups: Sequence[RecallGroup] | Sequence[KindsGroup],
    label: str = "side of the object / px",
) -> None:
    labels = [_range(group) for group in groups]
    axes.set_xticks(range(len(groups)), labels, rotation=40 if len(groups) > 8 else 0)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_xlabel(label)


def _range(group: RecallGroup | KindsGroup, whole: bool = False) -> str:
    """Bounds of a group as text; those of whole numbers include both ends."""
    low, high = group.low, group.high
    if math.isinf(high):
        return f"{low}+"
    if whole:
        return f"{low}–{high - 1}" if high - low > 1 else f"{low}"
    return f"{low}–{high}"


def _threshold_line(axes: Axes, theme: Theme, score: float) -> None:
    axes.axvline(score, color=theme.ink, lw=1.2, ls=(0, (1, 2)))
    near_right = score > 0.7
    axes.annotate(
        f"best F1: {score:.2f}",
        (score, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if near_right else 4, 4),
        textcoords="offset points",
        ha="right" if near_right else "left",
        fontsize=9,
        color=theme.ink,
    )


def _whole_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _unit(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
