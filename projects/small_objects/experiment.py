"""What anchors from data, tiles, and both bring for digits of 8 to 16 px.

    python -m projects.small_objects.experiment
    python -m projects.small_objects.experiment --seeds 2

Trains experiment.yaml with torchvision, four arms for each seed, all with the same number of
iterations on inputs of the same size: a tile of 128 px comes into the network as large as a whole
image of 256 px. One line of experiment.jsonl per finished run; runs that are there already are
skipped, so processes with different seeds may run side by side. report.py makes the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CONFIG = HERE / "experiment.yaml"
RESULTS = HERE / "experiment.jsonl"

TILES = ["INPUT.TILES.ENABLED", "True", "TEST.TILES.ENABLED", "True"]
ARMS: dict[str, tuple[bool, list[str]]] = {
    "stock settings": (False, []),
    "anchors from data": (True, []),
    "tiles": (False, TILES),
    "both": (True, TILES),
}
"""Name -> whether the anchors come from the data, and words for the command line."""

METRICS = {
    "AP": "AP",
    "AP50": "AP50",
    "APvt": "below 8 px",
    "APt": "8 to 16 px",
}


def run(arm: str, seed: int) -> dict[str, Any]:
    """One training and its evaluation."""
    from_data, words = ARMS[arm]
    folder = ROOT / "output" / "small_objects" / f"{arm.replace(' ', '_')}-{seed}"
    config = CONFIG
    started = time.time()
    if from_data:
        config = folder.with_suffix(".yaml")
        config.parent.mkdir(parents=True, exist_ok=True)
        config.unlink(missing_ok=True)
        _python(["-m", "dr2net_d2.anchors"], CONFIG, "--output", str(config), *words)
    _python(["train_net.py"], config, "OUTPUT_DIR", str(folder), "SEED", str(seed), *words)
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    last = [row for row in rows if "bbox/AP" in row][-1]
    found = {name: last[f"bbox/{name}"] for name in METRICS}
    return {
        "arm": arm,
        "seed": seed,
        # Nothing of a size: null, as JSON has no NaN.
        **{k: None if math.isnan(v) else round(v, 3) for k, v in found.items()},
        "minutes": round((time.time() - started) / 60, 2),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        **{name: version(name) for name in ("torch", "torchvision")},
    }


def _python(program: list[str], config: Path, *words: str) -> None:
    command = [sys.executable, *program, "--config-file", str(config), "--engine", "torchvision"]
    subprocess.run([*command, *words], check=True, cwd=ROOT)


def read_results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def draw(results: Sequence[dict[str, Any]], picture: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    colours = ("#999999", "#0072B2", "#D55E00", "#009E73")
    for i, (arm, colour) in enumerate(zip(ARMS, colours, strict=True)):
        runs = [row for row in results if row["arm"] == arm]
        for x, name in enumerate(METRICS):
            values = [row[name] for row in runs if row[name] is not None]
            if values:
                place = x + (i - 1.5) / 5
                axes.bar(place, mean(values), 0.19, color=colour, label=arm if x == 0 else None)
                axes.plot([place] * len(values), values, "o", color="black", ms=3)
    axes.set_xticks(range(len(METRICS)), METRICS.values())
    axes.set_ylabel("average precision / %")
    axes.set_title("Digits of 8 to 16 px; bars: mean, points: seeds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    done = {(row["arm"], row["seed"]) for row in read_results()} if RESULTS.is_file() else set()
    for seed in args.seeds:
        for arm in ARMS:
            if (arm, seed) not in done:
                row = run(arm, seed)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
