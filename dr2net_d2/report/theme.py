"""The looks of the charts, for light and for dark screens."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 160
"""Resolution of the charts."""


@dataclass(frozen=True)
class Theme:
    """Colours of a chart.

    Attributes:
        paper, ink, grid: background, text and grid lines.
        colours: those of Okabe and Ito, which colour-blind readers can tell apart: blue, vermilion,
            green, purple, orange, yellow; then that of the text.
    """

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


def make_panel(theme: Theme, width: float = 5.2, height: float = 3.8) -> tuple[Figure, Axes]:
    """Make a figure with empty axes; width and height are in inches."""
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


def dress_legend(figure: Figure) -> Figure:
    """Give the legend the colours of the theme."""
    (axes,) = figure.axes
    legend = axes.get_legend()
    if legend is not None:
        legend.get_frame().set(facecolor=axes.get_facecolor(), edgecolor="none", alpha=0.85)
        legend.get_title().set_fontsize(9)
        for text in (*legend.get_texts(), legend.get_title()):
            text.set(color=axes.xaxis.label.get_color(), fontsize=9)
    return figure
