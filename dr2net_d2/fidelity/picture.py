"""The picture of fidelity measurements: gradient errors and memory of every arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dr2net_d2.fidelity.gradients import ARMS, Measurement

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def draw_fidelity(
    results: Mapping[str, Sequence[Measurement]], reference: str, output_file: str | Path
) -> Path:
    """Draw gradient errors over the coefficients, and the memory of every arm; one row per model.

    Args:
        results: title -> measurements of all arms.
        reference: what the errors are relative to, such as "float64".
        output_file: the PNG file to write.

    Returns:
        ``output_file`` as a path.
    """
    count = len(results)
    figure = Figure(figsize=(10.5, 3.7 * count), layout="constrained")
    panels = figure.subplots(count, 2, squeeze=False, width_ratios=(1.25, 1))
    for (left, right), (title, rows) in zip(panels, results.items(), strict=True):
        _draw_errors(left, rows, f"{title}: gradient error")
        left.set_ylabel(f"relative to {reference}")
        _draw_memory(right, rows, "Memory beyond weights and gradients")
    figure.savefig(output_file, dpi=150, format="png")
    return Path(output_file)


_ERROR_LABELS = {
    "plain": ("plain (everything stored), or checkpointed", -18),
    "float reversible": ("reversible in\nfloating point", -38),
    "exact": ("exact reversible (this project)", 9),
}
"""Arm -> its label, and the label's height above the left end of the line, in points."""


def _draw_errors(axes: Axes, rows: Sequence[Measurement], title: str) -> None:
    pairs = list(dict.fromkeys((row["alpha"], row["beta"]) for row in rows))
    alphas, betas = (np.array(values) for values in zip(*pairs, strict=True))
    if len(set(betas)) == len(betas):
        x_of = dict(zip(pairs, betas.tolist(), strict=True))
        axes.set_xlabel("β, with α = 1 - β" if np.allclose(alphas + betas, 1) else "β")
    else:
        x_of = {pair: float(index) for index, pair in enumerate(pairs)}
        axes.set_xticks(range(len(pairs)), [f"{a:.2g}\n{b:.2g}" for a, b in pairs])
        axes.set_xlabel("α and β")
    low, high = 1e-8, 10.0
    for arm, (name, above) in _ERROR_LABELS.items():
        own = [row for row in rows if row["arm"] == arm]
        x = [x_of[row["alpha"], row["beta"]] for row in own]
        y = np.array([row["gradient_error"] for row in own], dtype=float)  # None becomes nan
        y = np.clip(y, low, high)
        colour = _COLOURS[ARMS.index(arm)]
        if arm == "plain":
            axes.plot(x, y, color=colour, lw=6, alpha=0.45)
        else:
            axes.plot(x, y, "o-", color=colour, lw=2, ms=4.5, clip_on=False)
        for missing in np.array(x)[np.isnan(y)]:
            axes.plot(missing, 1.7, "x", color=colour, ms=7, mew=2)
        first = np.nan_to_num(y[0], nan=high)
        if arm == "float reversible" and first < 1e-4:  # close to the other two
            above = 27
        axes.annotate(
            name,
            (x[0], min(first, 0.9)),
            xytext=(2, above),
            textcoords="offset points",
            color=colour,
            fontsize=11,
            fontweight="bold",
        )
    axes.axhspan(1, high, color="0.92")
    axes.annotate(
        "useless: error as large as the gradient (×: not finite)",
        (0.985, 0.967),
        xycoords="axes fraction",
        ha="right",
        va="center",
        fontsize=10,
        color="0.35",
    )
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks([10.0**exponent for exponent in range(-8, 2)])
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_memory(axes: Axes, rows: Sequence[Measurement], title: str) -> None:
    height = 0.38
    for index, (arm, colour) in enumerate(zip(ARMS, _COLOURS, strict=True)):
        own = [row for row in rows if row["arm"] == arm]
        # A training has to fit at every pair of coefficients.
        saved, peak = (max(row[key] for row in own) for key in ("saved_bytes", "peak_bytes"))
        for name, size, y, alpha in (
            ("saved", saved, index - height / 2, 1.0),
            ("peak", peak, index + height / 2, 0.45),
        ):
            axes.barh(y, size, height, color=colour, alpha=alpha)
            number = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
            axes.text(size, y, f" {number} {name}", va="center", fontsize=10)
    names = ("exact\nreversible", "float\nreversible", "check-\npointing", "plain")
    axes.set_yticks(range(len(ARMS)), names, fontsize=11)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_xlim(0, 1.5 * max(row["peak_bytes"] for row in rows))
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
