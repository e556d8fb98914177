"""Fills the tables of README here and of docs/small_objects.md from raw results; draws a picture.

python -m projects.small_objects.report
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dr2net_d2.commands import fill_page, markdown_table
from projects.small_objects.experiment import ARMS, METRICS, draw, read_results

HERE = Path(__file__).parent
ENGINES = {"ours": "dr2net_d2", "faster": "faster-coco-eval", "pycocotools": "pycocotools"}
SIMILARITIES = {
    "iou-stock": "IoU, the quickstart's anchors",
    "iou-data": "IoU, anchors from data",
    "nwd-data": "NWD, anchors from data",
}


def read(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text())


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}" if values else "-"


def experiment() -> str:
    rows = [["", *METRICS.values(), "seeds"]]
    for arm in ARMS:
        runs = [row for row in read_results() if row["arm"] == arm]
        found = ([row[name] for row in runs if row[name] is not None] for name in METRICS)
        rows.append([arm, *map(spread, found), f"{len(runs)}"])
    return markdown_table(rows)


def assignment() -> str:
    rows = [["", "AP", "AP50", "AP75", "seeds"]]
    for arm, title in SIMILARITIES.items():
        runs = [row for row in read("assignment") if row["arm"] == arm]
        found = ([row[name] for row in runs] for name in ("AP", "AP50", "AP75"))
        rows.append([title, *map(spread, found), f"{len(runs)}"])
    return markdown_table(rows)


def evaluation() -> str:
    rows = [["", "", "s of CPU", "s", "MiB", "largest difference"]]
    for case, content in read("evaluation_speed")["cases"].items():
        for engine, title in ENGINES.items():
            run = content["engines"][engine]
            differences = run.get("largest_difference")
            rows.append(
                [
                    f"{case} ({content['images']})",
                    title,
                    f"{run['cpu_seconds']:.1f}",
                    f"{run['seconds']:.1f}",
                    f"{run['peak_mib_beyond_the_data']}",
                    f"{max(differences.values()):.2g}" if differences else "",
                ]
            )
    return markdown_table(rows)


def scene() -> str:
    names = {
        "tiles": "train on tiles",
        "whole": "train on the whole image",
        "evaluate_whole": "evaluate the whole image",
        "evaluate_sliced": "evaluate, sliced",
    }
    rows = [["engine", "", "objects", "peak, GiB", "s of CPU"]]
    for run in read("large_scene")["rows"]:
        peak, seconds = f"{run['peak_gib']:.2f}", f"{run['cpu_seconds']:.0f}"
        rows.append([run["engine"], names[run["phase"]], f"{run['objects']}", peak, seconds])
    return markdown_table(rows)


TABLES = {
    "experiment": experiment,
    "assignment": assignment,
    "evaluation": evaluation,
    "scene": scene,
}


def headline() -> str:
    """AP alone, for docs/small_objects.md."""
    runs = [[row["AP"] for row in read_results() if row["arm"] == arm] for arm in ARMS]
    return markdown_table([[*ARMS], [spread(values) for values in runs]])


def main() -> None:
    fill_page(HERE.parents[1] / "docs" / "small_objects.md", {"small objects": headline()})
    fill_page(HERE / "README.md", {name: table() for name, table in TABLES.items()})
    draw(read_results(), HERE / "experiment.png")


if __name__ == "__main__":
    main()
