"""Memory and time of the projects' trainings, from the planner: plans/ and the READMEs' tables.

    python projects/plans.py

Runs ``python -m dr2net_d2.plan`` for every config of VisDrone, AI-TOD and TinyPerson at its batch
size, without a GPU, keeps plan.json and plan.png beside the configs, and writes the table between
the marks in each README. Plans that are there already are kept.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dr2net_d2 import plan
from dr2net_d2.commands import choose_engine, load_config
from dr2net_d2.reports import markdown_table

HERE = Path(__file__).parent
MARKS = ("<!-- plans -->", "<!-- /plans -->")


@dataclass(frozen=True)
class Card:
    """What a config is meant for; its TFLOP/s are what it is taken to sustain."""

    gigabytes: int
    tflops: int


CARDS = {"b": Card(24, 50), "l": Card(80, 250)}
"""An RTX 4090 has 165 TFLOP/s (float16 with float32 sums), an H100 990; both dense."""

OBJECTS = {"VisDrone": 100, "AITOD": 60, "TinyPerson": 30}
"""In an image, or a tile."""


def make_plan(project: str, config: Path) -> Path:
    folder = config.parent.parent / "plans" / config.stem
    card = CARDS[config.stem.split("_")[3]]
    batch = load_config(str(config), [], choose_engine("auto")).SOLVER.IMS_PER_BATCH
    if not (folder / "plan.json").is_file():
        words = ["--config-file", str(config.relative_to(HERE.parent)), "--batch-size", str(batch)]
        words += ["--budget-gb", str(card.gigabytes), "--tflops", str(card.tflops)]
        words += ["--objects", str(OBJECTS[project]), "--output", str(folder)]
        if plan.main([*words, "MODEL.DEVICE", "cpu"]):
            raise SystemExit(f"no plan for {config}")
    return folder / "plan.json"


def row(config: Path, results: dict[str, Any]) -> list[str]:
    setting, arms = results["setting"], {arm["arm"]: arm for arm in results["arms"]}
    ours, stock, checkpoint = (
        arms[name] for name in ("dr2net", "stock", "our attention + checkpoint")
    )
    iterations = load_config(str(config), [], setting["engine"]).SOLVER.MAX_ITER
    return [
        f"`{config.stem}`",
        f"{setting['image_size']} px x {setting['batch_size']}",
        *(f"{arm['peak'] / 2**30:.1f}" for arm in (ours, checkpoint, stock)),
        f"{ours['largest_batch']}",
        f"{ours['tflop']:.0f}",
        f"{ours['seconds'] * iterations / 3600:.0f} h at {setting['tflops']:g} TFLOP/s",
    ]


def table(project: str) -> str:
    rows = [
        [
            *("config", "batch", "peak, GB", "with checkpoints", "stock ViTDet"),
            *("largest batch in the card", "TFLOP an iteration", "training"),
        ]
    ]
    for config in sorted((HERE / project / "configs").glob("*.yaml")):
        results = json.loads(make_plan(project, config).read_text())
        rows.append(row(config, results))
    return markdown_table(rows)


def write_table(readme: Path, text: str) -> None:
    pattern = f"({re.escape(MARKS[0])}\n).*({re.escape(MARKS[1])})"
    old = readme.read_text()
    readme.write_text(re.sub(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.DOTALL))


def main() -> None:
    for project in OBJECTS:
        write_table(HERE / project / "README.md", table(project))


if __name__ == "__main__":
    main()
