"""The rows of results.jsonl, and what runs, page and pictures take from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from projects.parity import arms
from projects.parity.finetune import FINAL, FINISHED, TUNING

CONVENTIONAL, OURS = "conventional", "convex"
RESULTS = Path(__file__).parent / "results.jsonl"
Row = dict[str, Any]


def read_results(path: Path = RESULTS) -> list[Row]:
    """The rows of results.jsonl; none if there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def tuned(rows: Iterable[Row], arm: arms.Arm) -> dict[float, float]:
    """Learning rate -> AP of an arm's tuning runs; -1 for one that diverged."""
    name = arm.rate_of or arm.name
    return {
        row["rate"]: row["AP"] if row["status"] == FINISHED else -1.0
        for row in rows
        if row["stage"] == TUNING and row["arm"] == name
    }


def final_rows(rows: Iterable[Row], name: str) -> list[Row]:
    """The final runs of an arm, by seed."""
    found = [row for row in rows if row["stage"] == FINAL and row["arm"] == name]
    return sorted(found, key=lambda row: row["seed"])


def differences(rows: Sequence[Row], reference: Sequence[Row]) -> list[float]:
    """AP of each finished run beyond that of the reference with the same seed."""
    others = {row["seed"]: row["AP"] for row in reference if row["status"] == FINISHED}
    return [
        row["AP"] - others[row["seed"]]
        for row in rows
        if row["status"] == FINISHED and row["seed"] in others
    ]
