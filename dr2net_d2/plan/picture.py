"""The picture of a memory plan: what fills the GPU, by arm, and the peak over the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dr2net_d2.plan.comparison import GB, ArmPlan, Plan, SchedulePeak

# The colours of Okabe and Ito; greys for what every arm has.
_COLOURS = {
    "parameters": "0.35",
    "gradients": "0.55",
    "optimizer state": "0.75",
    "streams": "#0072B2",
    "remainder bits": "#56B4E9",
    "activations": "#D55E00",
    "pyramid": "#009E73",
    "heads": "#CC79A7",
    "other": "#F0E442",
}


def draw_plan(plan: Plan, output_file: str | Path) -> Path:
    """Draw stacked bars of the parts of each arm's peak, and the peak over the schedule.

    Args:
        plan: what to draw.
        output_file: the PNG file to write.

    Returns:
        ``output_file`` as a path.
    """
    setting = plan.setting
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    _draw_parts(left, plan.arms, setting.budget_gb)
    _draw_schedule(right, plan.schedule, setting.budget_gb)
    figure.suptitle(
        f"{Path(setting.config_file).stem}: predicted peak of a training iteration, "
        f"{setting.image_size} px, batch {setting.batch_size}",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    figure.savefig(output_file, dpi=130, format="png")
    return Path(output_file)


def _draw_parts(axes: Axes, arms: Sequence[ArmPlan], budget: float) -> None:
    predictions = [arm.prediction for arm in arms]
    names = [prediction.arm for prediction in predictions]
    starts = [0.0] * len(arms)
    for part, colour in _COLOURS.items():
        sizes = [prediction.parts[part] / GB for prediction in predictions]
        axes.barh(names, sizes, 0.6, left=starts, color=colour, label=part)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    for row, end in enumerate(starts):
        axes.text(end, row, f" {end:.3g} GB", va="center", fontsize=10)
    axes.axvline(budget, color="black", ls="--", lw=1.2)
    axes.text(budget, -0.62, f"{budget:g} GB ", ha="right", va="center", fontsize=9)
    axes.set_xlim(0, 1.15 * max(budget, *starts))
    axes.invert_yaxis()
    axes.set_xlabel("GB of 2^30 bytes")
    axes.legend(frameon=False, fontsize=8.5, ncols=5, loc="upper center", bbox_to_anchor=(0.4, 1.2))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_schedule(axes: Axes, points: Sequence[SchedulePeak], budget: float) -> None:
    peaks = [point.peak / GB for point in points]
    axes.plot(range(len(points)), peaks, "o-", color=_COLOURS["streams"], lw=2)
    axes.axhline(budget, color="black", ls="--", lw=1.2)
    axes.text(0, budget, f"{budget:g} GB", va="bottom", fontsize=9)
    axes.set_xticks(range(len(points)), [f"{p.alpha:.2g}\n{p.beta:.2g}" for p in points])
    axes.set_xlabel("α and β of the schedule")
    axes.set_ylabel("peak / GB")
    axes.set_ylim(0, 1.15 * max(budget, *peaks))
    axes.set_title("dr2net over the schedule", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
