"""The charts of a report, each a Matplotlib figure drawn from the numbers of report.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours of paper, text and lines; ``colours`` are Okabe and Ito's, safe for colour-blind
    readers: blue, vermillion, green, purple, orange, yellow, then that of the text."""

    paper: str
    ink: str
    grid: str
    colours: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1c2126",
    grid="#d9dee3",
    colours=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#B8A600", "#1c2126"),
)
DARK = Theme(
    paper="#171b20",
    ink="#e3e8ed",
    grid="#363e47",
    colours=("#56B4E9", "#F0762B", "#1FC498", "#DE9BC0", "#E69F00", "#F0E442", "#e3e8ed"),
)

_LINES = ("-", "--", "-.", ":")

Data = Mapping[str, Any]


def draw_limits(data: Data, theme: Theme) -> Figure:
    """What mending each kind of error would gain."""
    figure, axes = _panel(theme, 5.2, 3.6)
    rows = data["errors"]["kinds"]
    gains = [row["gain"] or 0 for row in rows]
    names = [row["kind"] for row in rows]
    axes.barh(names, gains, 0.62, color=theme.colours[1])
    for place, row in enumerate(rows):
        text = f" +{row['gain']:.1f}" if row["gain"] is not None else " –"
        axes.text(gains[place], place, text, va="center", color=theme.ink, fontweight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max([*gains, 1]))
    axes.set_xlabel("AP50 gained if all errors of the kind were mended")
    axes.tick_params(axis="y", length=0, labelsize=11)
    axes.grid(axis="y", visible=False)
    return figure


def draw_kinds_by_size(data: Data, theme: Theme) -> Figure:
    """How many errors of each kind, by size."""
    figure, axes = _panel(theme, 5.2, 3.6)
    rows = data["errors"]["by_size"]
    bottom = np.zeros(len(rows))
    hatches = ("", "///", "", "...", "", "\\\\\\")
    names = rows[0]["kinds"] if rows else ()
    for name, colour, hatch in zip(names, theme.colours, hatches, strict=False):
        numbers = np.array([row["kinds"][name] for row in rows], float)
        style: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": theme.paper, "lw": 0}
        axes.bar(range(len(rows)), numbers, 0.82, bottom=bottom, **style, label=name)
        bottom += numbers
    _size_axis(axes, rows, "side of the detection, or of the missed object / px")
    axes.set_ylabel(f"errors, score ≥ {data['threshold']['score']:.2f}")
    _whole_numbers(axes)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return _dressed(figure)


def draw_missed(data: Data, theme: Theme) -> Figure:
    """Found and missed objects by size."""
    figure, axes = _panel(theme)
    rows, threshold = data["sizes"]["groups"], data["threshold"]["score"]
    objects = np.array([row["objects"] for row in rows], float)
    found = np.array([row["found"] for row in rows], float)
    kept = np.array([row["found_at_threshold"] for row in rows], float)
    places = range(len(rows))
    axes.bar(places, kept, 0.82, color=theme.colours[0], label=f"found, score ≥ {threshold:.2f}")
    weak: dict[str, Any] = {
        "color": theme.colours[0],
        "alpha": 0.4,
        "label": "found with a lower score",
    }
    axes.bar(places, found - kept, 0.82, bottom=kept, **weak)
    never: dict[str, Any] = {
        "color": theme.colours[1],
        "hatch": "///",
        "edgecolor": theme.paper,
        "lw": 0,
    }
    axes.bar(places, objects - found, 0.82, bottom=found, **never, label="not found at all")
    for place, (number, hit) in enumerate(zip(objects, kept, strict=True)):
        text = f"{(number - hit) / number:.0%}" if number else ""
        axes.text(place, number, text, ha="center", va="bottom", fontsize=9, color=theme.ink)
    _size_axis(axes, rows)
    axes.set_ylabel("objects (above: missed at that score)")
    axes.set_ylim(0, 1.25 * max([*objects, 1]))
    _whole_numbers(axes)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _dressed(figure)


def draw_recall_by_size(data: Data, theme: Theme) -> Figure:
    """Recall by size, for the detections from several scores on."""
    figure, axes = _panel(theme)
    _draw_recalls(axes, theme, data["sizes"]["groups"])
    _size_axis(axes, data["sizes"]["groups"])
    return _dressed(figure)


def draw_recall_by_density(data: Data, theme: Theme) -> Figure:
    """Recall by the number of objects of an image."""
    figure, axes = _panel(theme)
    rows = data["density"]
    _draw_recalls(axes, theme, rows)
    labels = [f"{_range(row, whole=True)}\n({row['images']:,})" for row in rows]
    axes.set_xticks(range(len(rows)), labels)
    axes.set_xlabel("objects in the image (number of such images)")
    axes.set_xlim(-0.5, len(rows) - 0.5)
    return _dressed(figure)


def draw_curves(data: Data, theme: Theme, iou: str) -> Figure:
    """Precision over recall by size, at an IoU."""
    rows = data["curves"]["by_iou"][iou]
    figure, axes = _panel(theme, height=3.8 + 0.22 * (len(rows) // 2))
    colours = (theme.colours[-1], *theme.colours[:-1])
    for place, row in enumerate(rows):
        axes.plot(
            data["curves"]["recall"],
            row["precision"],
            color=colours[place % len(colours)],
            ls=_LINES[place % len(_LINES)],
            lw=2.6 if place == 0 else 2,
            label=f"{row['size']}: AP {row['AP']:.1f} ({row['objects']:,})",
        )
    _unit(axes)
    axes.set_xlabel(f"recall at IoU {float(iou):g}")
    axes.set_ylabel("precision")
    if rows:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, title="size (objects)")
    return _dressed(figure)


def draw_confusion(data: Data, theme: Theme) -> Figure:
    """The confusion matrix, each row as shares of the class's objects."""
    matrix = np.array(data["confusion"]["matrix"], float)
    names = [_short(name) for name in data["confusion"]["classes"]]
    count = len(names)
    # The background has no number of objects: its row is relative to all that is in it.
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(5.8, 2.2 + 0.42 * (count + 1)), 15)
    figure, axes = _panel(theme, side + 0.6, side)
    ramp = LinearSegmentedColormap.from_list("", [theme.paper, theme.colours[0]])
    # The root makes confusions visible beside the diagonal.
    shade = np.sqrt(share)
    axes.imshow(shade, cmap=ramp, vmin=0, vmax=1, aspect="equal")
    size = 10 if count <= 12 else 9
    if count <= 24:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            value = share[row, column]
            # A dark theme's blue is light.
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
    axes.set_ylabel("object of class, per cent of a row")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labeltop=count > 24)
    return figure


def draw_scores(data: Data, theme: Theme) -> Figure:
    """How many detections of each score are right, duplicates, or otherwise wrong."""
    figure, axes = _panel(theme)
    scores = data["scores"]
    edges = np.array(scores["edges"])
    styles = {
        "right": (theme.colours[0], "-"),
        "duplicate": (theme.colours[4], "--"),
        "otherwise wrong": (theme.colours[1], "-."),
    }
    for name, (colour, line) in styles.items():
        numbers = np.array(scores[name], float)
        label = f"{name} ({int(numbers.sum()):,})"
        axes.stairs(numbers, edges, color=colour, ls=line, lw=2.2, label=label)
    _threshold_line(axes, theme, data)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlim(0, 1)
    axes.set_xlabel("score")
    axes.set_ylabel("detections (logarithmic)")
    axes.set_ylim(0, 30 * max(1, *(max(scores[name]) for name in styles)))
    axes.legend(loc="upper center", ncols=2)
    return _dressed(figure)


def draw_suppression(data: Data, theme: Theme) -> Figure:
    """What share of the duplicates a stricter suppression would remove."""
    figure, axes = _panel(theme)
    rows = data["duplicates"]
    removed = [np.nan if value is None else value for value in rows["removed"]]
    axes.plot(rows["iou"], removed, "o-", color=theme.colours[4], lw=2.2, ms=4)
    axes.set_ylim(0, 1.03)
    axes.set_xlim(min(rows["iou"]), 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("IoU with the better detection of the same object")
    axes.set_ylabel("duplicates at least that close")
    return figure


def draw_calibration(data: Data, theme: Theme) -> Figure:
    """The share of right detections by score."""
    figure, axes = _panel(theme)
    rows = data["calibration"]
    axes.plot([0, 1], [0, 1], ls=":", color=theme.ink, lw=1.6, label="precision = score")
    for row in rows:
        width = row["high"] - row["low"]
        axes.bar(row["low"], row["precision"], width, align="edge", color=theme.colours[0],
                 edgecolor=theme.paper, lw=1.2)  # fmt: skip
    _threshold_line(axes, theme, data)
    _unit(axes)
    axes.set_xlabel("score")
    axes.set_ylabel("precision of the detections there")
    axes.legend(loc="upper left")
    return _dressed(figure)


PICTURES: dict[str, Callable[[Data, Theme], Figure]] = {
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
"""By name of the file; besides "curves_iou50" and the like, of ``draw_curves``."""


def _panel(theme: Theme, width: float = 5.2, height: float = 3.8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor=theme.paper)
    axes = figure.subplots()
    axes.set_facecolor(theme.paper)
    axes.set_axisbelow(True)
    axes.grid(color=theme.grid, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.grid)
    axes.tick_params(colors=theme.ink, labelsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=theme.ink, fontsize=10.5)
    return figure, axes


def _draw_recalls(axes: Axes, theme: Theme, rows: Sequence[Data]) -> None:
    for place, least in enumerate(rows[0]["recall"] if rows else ()):
        values = [row["recall"][least] for row in rows]
        label = "any score" if least == "0" else f"score ≥ {least}"
        axes.plot(
            range(len(rows)),
            [np.nan if value is None else value for value in values],
            color=(theme.colours[-1], *theme.colours)[place],
            ls=_LINES[place % len(_LINES)],
            marker="osD^v"[place],
            ms=5,
            lw=2,
            label=label,
        )
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("recall at IoU 0.5")
    if rows:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def _size_axis(axes: Axes, rows: Sequence[Data], label: str = "side of the object / px") -> None:
    crowded = len(rows) > 8
    labels = [_range(row) for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=40 if crowded else 0)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(label)


def _range(row: Data, whole: bool = False) -> str:
    low, high = row["low"], row["high"]
    if high is None:
        return f"{low}+"
    if whole:
        return f"{low}–{high - 1}" if high - low > 1 else f"{low}"
    return f"{low}–{high}"


def _threshold_line(axes: Axes, theme: Theme, data: Data) -> None:
    score = data["threshold"]["score"]
    axes.axvline(score, color=theme.ink, lw=1.2, ls=(0, (1, 2)))
    right = score > 0.7
    axes.annotate(
        f"best F1: {score:.2f}",
        (score, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if right else 4, 4),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=9,
        color=theme.ink,
    )


def _whole_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _unit(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)


def _dressed(figure: Figure) -> Figure:
    """Legends in the colours of the theme."""
    (axes,) = figure.axes
    legend = axes.get_legend()
    if legend is not None:
        legend.get_frame().set(facecolor=axes.get_facecolor(), edgecolor="none", alpha=0.85)
        legend.get_title().set_fontsize(9)
        for text in (*legend.get_texts(), legend.get_title()):
            text.set(color=axes.xaxis.label.get_color(), fontsize=9)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
