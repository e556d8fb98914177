"""Tables and pictures of results.jsonl and costs.json, into README.md here and that of the project.

python -m projects.parity.report
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from dr2net_d2.commands import fill_page, markdown_table
from projects.parity import arms
from projects.parity.costs import COSTS
from projects.parity.figures import draw_ablations, draw_arms, draw_curves, draw_tasks
from projects.parity.finetune import DIVERGED, FINISHED, HERE
from projects.parity.results import (
    CONVENTIONAL,
    OURS,
    Row,
    differences,
    final_rows,
    read_results,
    tuned,
)

HEADER = ("", "learning rate", "AP", "vs. conventional", "AP50", "APs", "seeds")
COST_HEADER = ("peak, MB", "step time", "gradient error, worst")

TOP_LEVEL = (CONVENTIONAL, "checkpointing", OURS, "hard-1")
TOP_LEVEL_HEADER = ("AP", "vs. conventional", "AP50", "peak, MB", "step time")
"""The arms and the columns of the top-level page's table."""


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and, of several, standard deviation of a sample; ``sign`` "+" shows a plus."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def accuracy(rows: Sequence[Row], reference: Sequence[Row]) -> list[str]:
    """The cells below HEADER, but for the arm's label."""
    if not rows:
        return ["-", "not measured", *["-"] * 4]
    finished = [row for row in rows if row["status"] == FINISHED]
    ap, ap50, aps = (spread([row[key] for row in finished]) for key in ("AP", "AP50", "APs"))
    if diverged := len(rows) - len(finished):
        ap += f" ({diverged} of {len(rows)} diverged)"
    delta = differences(rows, reference)
    relative = spread(delta, sign="+")
    rates = sorted({row["rate"] for row in rows})
    return [", ".join(f"{r:g}" for r in rates), ap, relative, ap50, aps, str(len(rows))]


def worst_error(rows: Iterable[Row]) -> str:
    """The largest gradient error that was met in training."""
    met = [error for row in rows for *_, error in row["gradient_error"]]
    if not met:
        return "-"
    return "not finite" if None in met else f"{max(met):.1e}"


def cost_cells(costs: dict[str, Any], name: str) -> list[str]:
    found = costs["arms"]
    if name not in found:
        return ["not measured"] * 2
    seconds, reference = (
        statistics.median(found[arm]["step_seconds"]) for arm in (name, CONVENTIONAL)
    )
    return [f"{found[name]['peak_bytes'] / 1e6:.0f}", f"{seconds / reference:.2f} x"]


def arm_table(
    rows: Sequence[Row],
    costs: dict[str, Any],
    names: Iterable[str],
    columns: Iterable[str] = (*HEADER[1:], *COST_HEADER),
) -> str:
    """A row per arm: accuracy over seeds, memory, time, gradient error; or fewer columns."""
    reference = final_rows(rows, CONVENTIONAL)
    header: tuple[str, ...] = (*HEADER, *COST_HEADER)
    shown = [0, *map(header.index, columns)]
    lines = [header]
    for name in names:
        found = final_rows(rows, name)
        cells = [*accuracy(found, reference), *cost_cells(costs, name), worst_error(found)]
        lines.append((arms.EVERYTHING[name].label, *cells))
    return markdown_table([[line[column] for column in shown] for line in lines])


def accuracy_table(rows: Sequence[Row], shown: Iterable[tuple[str, str]], reference: str) -> str:
    """A row per (label, name), each beside the arm ``reference``."""
    others = final_rows(rows, reference)
    lines = [[label, *accuracy(final_rows(rows, name), others)] for label, name in shown]
    return markdown_table([list(HEADER), *lines])


def tuning_table(rows: Sequence[Row], compared: Iterable[arms.Arm]) -> str:
    """AP of every tuning run: arms by learning rates."""
    found = {arm.label: tuned(rows, arm) for arm in compared if not arm.rate_of}
    rates = sorted(set().union(*found.values()))
    lines = [["", *(f"{rate:g}" for rate in rates)]]
    for label, by_rate in found.items():
        cells = (by_rate.get(rate) for rate in rates)
        shown = ("-" if ap is None else DIVERGED if ap < 0 else f"{ap:.1f}" for ap in cells)
        lines.append([label, *shown])
    return markdown_table(lines)


def setting_line(rows: Sequence[Row], costs: dict[str, Any]) -> str:
    machines = sorted({f"{row['processor']}, torch {row['torch']}" for row in rows})
    found = costs["setting"]
    return (
        f"Trainings: CPU, one thread each, {'; '.join(machines)}. Memory and time: "
        f"{found['processor']}, {found['threads']} thread, torch {found['torch']}."
    )


def tables(rows: Sequence[Row], costs: dict[str, Any]) -> dict[str, str]:
    """Marker -> what stands there in this project's page."""
    shapes, long = (
        accuracy_table(rows, [(arm.label, arm.name) for arm in task], task[0].name)
        for task in (arms.SHAPES, arms.LONG)
    )
    ablations = {
        heading: accuracy_table(
            rows, [("default", OURS), *((v.label, v.name) for v in variants)], CONVENTIONAL
        )
        for heading, variants in arms.ABLATIONS.items()
    }
    return {
        "arms": arm_table(rows, costs, [arm.name for arm in arms.ARMS]),
        "tuning": tuning_table(rows, arms.ARMS),
        "shapes": shapes,
        "shapes tuning": tuning_table(rows, arms.SHAPES),
        "long": long,
        "setting": setting_line(rows, costs),
        **ablations,
    }


def top_level(rows: Sequence[Row], costs: dict[str, Any]) -> str:
    """The table of the top-level page."""
    table = arm_table(rows, costs, TOP_LEVEL, TOP_LEVEL_HEADER)
    return f"{table}\n\n{setting_line(rows, costs)}"


def main() -> None:
    rows, costs = read_results(), json.loads(COSTS.read_text())
    fill_page(HERE / "README.md", tables(rows, costs))
    fill_page(HERE.parents[1] / "README.md", {"accuracy": top_level(rows, costs)})
    draw_arms(rows, costs, HERE / "arms.png")
    draw_curves(rows, HERE / "curves.png")
    draw_ablations(rows, HERE / "ablations.png")
    draw_tasks(rows, HERE / "tasks.png")


if __name__ == "__main__":
    main()
