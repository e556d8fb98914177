"""Pictures of the measurements: peak memory over image side and depth, step time of the arms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from projects.memory_benchmark.measurements import Measurements, ratio
from projects.memory_benchmark.store import ARMS, DEPTHS, Results, Work, turns

# Okabe and Ito's colours, which colour-blind readers tell apart too.
COLOURS = dict(
    zip(ARMS, ("#000000", "#0072B2", "#56B4E9", "#CC79A7", "#E69F00", "#D55E00"), strict=True)
)


def draw_memory(found: Measurements, file: Path) -> None:
    """Peak memory over the side of the image and over depth, a panel where two points are known."""
    lines = []
    for device, work in (
        ("GPU", Work("detector", "b", None, 1024, 1, "bf16", 20, 0)),
        ("CPU", Work("detector", "ti", None, 512, 1, "fp32", 20, 0)),
    ):
        # A planner's GPU is no CPU.
        sources = (found.devices[device], found.predicted if device == "GPU" else None)
        for axis in ("size", "depth"):
            if any(len(_points(s, work, arm, axis)) > 1 for s in sources for arm in ARMS):
                lines.append((device, work, axis, sources))
    figure, panels = _panels(len(lines), 4.6)
    for axes, (device, work, axis, sources) in zip(panels, lines, strict=False):
        hardware = found.hardware(device).partition(", torch")[0]
        title = f"ViT-{work.model.capitalize()}, {work.precision}, {device} ({hardware})"
        if axis == "size":
            _draw(axes, *sources, work, axis, f"{title}\nimage side / px")
        else:
            _draw(axes, *sources, work, axis, f"{title}, {work.size} px\nblocks")
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [name for name in ARMS.values() if name in handles]
    if names:
        figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=3)
    figure.suptitle("Peak memory of a step beyond weights and gradients; dashed: predicted")
    figure.savefig(file, dpi=110)


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of at most two columns, rows of ``height`` inches; without panels it says so."""
    columns = min(max(count, 1), 2)
    rows = max(-(-count // columns), 1)
    figure = Figure(figsize=(6.2 * columns, height * rows + 0.8), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    if not count:
        grid[0].text(0.5, 0.5, "not measured", ha="center")
    return figure, grid


def _draw(
    axes: Axes, results: Results, predicted: Results | None, work: Work, axis: str, title: str
) -> None:
    title, _, label = title.partition("\n")
    drawn: list[int] = []
    for source, style in ((results, "o-"), (predicted, "--")):
        for arm, name in ARMS.items() if source else ():
            points = _points(source, work, arm, axis)
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(
                    x,
                    y,
                    style,
                    color=COLOURS[arm],
                    ms=5,
                    lw=2.6 if arm == "dr2net-exact" else 1.6,
                    label=name,
                )
                drawn += x
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(label)
    axes.set_ylabel("peak / GB")
    if drawn:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sorted(set(drawn)), [str(x) for x in sorted(set(drawn))])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if _few(value) else "")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)


def _few(value: float) -> bool:
    return f"{value:.0e}"[0] in "25"


def _points(results: Results | None, work: Work, arm: str, axis: str) -> list[tuple[int, float]]:
    """(side or depth, GB) of an arm; depth None is the model's own."""
    points = {}
    for row in results.rows if results else ():
        there = Work(*(row[name] for name in Work._fields))
        if there._replace(**{axis: getattr(work, axis)}) == work and "peak_bytes" in row:
            place = row[axis] if row[axis] is not None else DEPTHS[work.model]
            if row["arm"] == arm:
                points[place] = row["peak_bytes"] / 1e9
    return sorted(points.items())


def draw_time(found: Measurements, file: Path) -> None:
    """Step time over stock's, a panel per configuration that was timed at the side of 1024 px."""
    panels = [
        (name, results, work)
        for name, results in found.devices.items()
        for work in results.works()
        if work.size == 1024 and work.batch == 1 and work.depth is None
        if (stock := results.find(work, "stock")) and turns(stock)
    ]
    figure, grid = _panels(len(panels), 2.8)
    for axes, (name, results, work) in zip(grid, panels, strict=False):
        ratios = {arm: ratio(results, work, arm, "stock") for arm in ARMS}
        shown = {arm: value for arm, value in ratios.items() if value is not None}
        _bars(axes, shown)
        title = f"{name}: {work}".removesuffix(", batch 1")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    figure.suptitle("Time of a training step, relative to stock (one image)")
    figure.savefig(file, dpi=110)


def _bars(axes: Axes, ratios: dict[str, float]) -> None:
    names: Sequence[str] = [ARMS[arm] for arm in ratios]
    values = list(ratios.values())
    axes.barh(names, values, color=[COLOURS[arm] for arm in ratios], height=0.65)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.2f}", va="center")
    axes.axvline(1, color="0.4", lw=1)
    axes.set_xlim(0, 1.18 * max(values))
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
