"""Memory and time of the projects' trainings: plans.json and the table of each README.

    python -m projects.plans

Predicts an iteration of every config of VisDrone, AI-TOD and TinyPerson at its batch size, without
a GPU, as ``python -m dr2net_d2.plan --tflops`` does, and writes the table between the marks in each
README. It takes an hour on one core; what is in plans.json already is kept.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dr2net_d2.commands import fill_page, load_config, markdown_table
from dr2net_d2.plan.planner import Planner, training_side

HERE = Path(__file__).parent
ARMS = {
    "dr2net": "ours",
    "our attention + checkpoint": "with checkpoints",
    "stock": "stock ViTDet",
}
GB = 2**30


@dataclass(frozen=True)
class Card:
    """What a config is meant for; its TFLOP/s are what it is taken to sustain."""

    name: str
    gigabytes: int
    tflops: int


CARDS = {"b": Card("RTX 4090", 24, 50), "l": Card("H100", 80, 250)}
"""They have 165 and 990 TFLOP/s (float16 with float32 sums, dense)."""

OBJECTS = {"VisDrone": 100, "AITOD": 60, "TinyPerson": 30}
"""In an image, or a tile."""


def plan(project: str, config: Path) -> dict[str, Any]:
    cfg = load_config(str(config), ["MODEL.DEVICE", "cpu"], "detectron2")
    side, batch = training_side(cfg), cfg.SOLVER.IMS_PER_BATCH
    row = {
        "config": config.stem,
        "image_size": side,
        "batch_size": batch,
        "objects": OBJECTS[project],
        "iterations": cfg.SOLVER.MAX_ITER,
        "card": asdict(CARDS[config.stem.split("_")[3]]),
        "torch": torch.__version__,
        "peak": {},
    }
    for arm in ARMS:
        planner = Planner(cfg, arm, objects=OBJECTS[project])
        row["peak"][arm] = planner.peak(side, batch)
        if arm == "dr2net":
            row["flop"] = batch * planner.flops(side)
        print(config.stem, arm, f"{row['peak'][arm] / GB:.2f} GB", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    cells = [["config", "card", "batch", *(f"{name}, GB" for name in ARMS.values()), "training"]]
    for row in rows:
        card = row["card"]
        hours = row["flop"] * row["iterations"] / (card["tflops"] * 1e12) / 3600
        cells.append(
            [
                f"`{row['config']}`",
                f"{card['gigabytes']} GB",
                f"{row['batch_size']} x {row['image_size']} px",
                *(f"{row['peak'][arm] / GB:.1f}" for arm in ARMS),
                f"{row['flop'] / 1e12:.0f} TFLOP x {row['iterations']}: {hours:.0f} h",
            ]
        )
    return markdown_table(cells)


def main() -> None:
    for project in OBJECTS:
        file = HERE / project / "plans.json"
        rows = json.loads(file.read_text()) if file.is_file() else []
        for config in sorted((HERE / project / "configs").glob("*.yaml")):
            if config.stem not in {row["config"] for row in rows}:
                rows.append(plan(project, config))
                file.write_text(json.dumps(rows, indent=1) + "\n")
        fill_page(HERE / project / "README.md", {"plans": table(rows)})


if __name__ == "__main__":
    main()
