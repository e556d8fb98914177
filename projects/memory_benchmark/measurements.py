"""The files of this folder as one object, and what several pages and pictures take from it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from projects.memory_benchmark.store import Results, Work, step_seconds, turns

HERE = Path(__file__).parent
NOT_MEASURED = "not measured"


class Measurements:
    """The files of a folder: measured on a CPU and on a GPU, and predicted; any may be missing."""

    def __init__(self, folder: Path = HERE) -> None:
        self.devices = {
            name: Results(folder / f"results-{file}.json")
            for name, file in (("CPU", "cpu"), ("GPU", "cuda"))
        }
        self.predicted = Results(folder / "predictions.json")
        self.lean = Results(folder / "lean-cpu.json")

    def hardware(self, device: str) -> str:
        setting = self.devices[device].setting
        return NOT_MEASURED if setting is None else hardware(setting, device)


def hardware(setting: dict[str, Any], device: str) -> str:
    """Processor or GPU and torch of the setting of a file, ``device`` being CPU or GPU."""
    where = f"{setting['threads']} threads of " if device == "CPU" else ""
    return f"{where}{setting['device']}, torch {setting['torch']}"


def ratio(device: Results, work: Work, arm: str, other: str) -> float | None:
    """The step time of an arm over another's: median over the turns; None if not measured."""
    pair = [device.find(work, name) for name in (arm, other)]
    if not all(row and turns(row) for row in pair):
        return None
    turn_by_turn = zip(*(step_seconds(row) for row in pair if row), strict=False)
    return statistics.median(one / two for one, two in turn_by_turn)
