"""Tables and pictures from what measure.py and the memory planner wrote; into README.md here.

python -m projects.memory_benchmark.report
python -m projects.memory_benchmark.report --predict            # asks the planner what is missing
python -m projects.memory_benchmark.report --ladder README.md   # the table of the top-level page
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dr2net_d2.commands import fill_page, markdown_table
from dr2net_d2.errors import UserError
from projects.memory_benchmark.measurements import HERE, NOT_MEASURED, Measurements, ratio
from projects.memory_benchmark.pictures import draw_memory, draw_time
from projects.memory_benchmark.predictions import predict_missing
from projects.memory_benchmark.store import (
    ARMS,
    LEAN_ARMS,
    MEASURED,
    Results,
    Work,
    step_seconds,
    turns,
)

LADDER = Work("detector", "b", None, 1024, 1, "fp32", 20, 0)
STOCK_HEADS = "dr2net-stock-heads"


def memory_table(device: Results, predicted: Results, works: Iterable[Work]) -> str:
    """Saved and peak GB, a line per configuration, a column per arm; predictions in italics."""
    lines = [["GB saved / peak", *ARMS.values()]]
    for work in works:
        cells = []
        for arm in ARMS:
            cell = _memory(device.find(work, arm))
            if expected := predicted.find(work, arm):
                cell += f"<br>*predicted {_gigabytes(expected)}*"
            cells.append(cell)
        lines.append([str(work), *cells])
    return markdown_table(lines)


def time_table(device: Results, works: Iterable[Work]) -> str:
    """Seconds of a step, of its forward and backward, images a second, ratio to stock."""
    lines = [["step (forward + backward), images/s, ratio to stock", *ARMS.values()]]
    for work in works:
        cells = [_time(device, work, arm) for arm in ARMS]
        if any(cell != NOT_MEASURED for cell in cells):
            lines.append([str(work), *cells])
    return markdown_table(lines)


def lean_table(measured: Results) -> str:
    """Saved and peak GB, seconds of a step and ratio, a line per choice of MODEL.DR2NET.LEAN."""
    lines = [["configuration", "MODEL.DR2NET.LEAN", "GB saved / peak", "step", "of stock heads'"]]
    for work in measured.works():
        for arm, parts in LEAN_ARMS.items():
            row, times = measured.find(work, arm), ratio(measured, work, arm, STOCK_HEADS)
            line = [str(work), ", ".join(parts) or "none", _memory(row)]
            if row is None or times is None:
                line += [NOT_MEASURED] * 2
            else:
                line += [f"{statistics.median(step_seconds(row)):.3g} s", f"{times:.2f} x"]
            lines.append(line)
    return markdown_table(lines)


def ladder_table(found: Measurements) -> str:
    """One technique a row: what the same training step takes on a CPU and on a GPU."""
    cpu, gpu = found.devices["CPU"], found.devices["GPU"]
    half = LADDER._replace(precision="bf16")
    lines = [
        [
            "technique",
            "CPU, fp32: saved / peak, GB",
            "step time",
            "GPU, bf16: saved / peak, GB",
            "step time",
            "GPU, bf16, predicted, GB",
        ]
    ]
    for arm, name in ARMS.items():
        line = [name]
        for device, work in ((cpu, LADDER), (gpu, half)):
            times = ratio(device, work, arm, "stock")
            line += [
                _memory(device.find(work, arm)),
                NOT_MEASURED if times is None else f"{times:.2f} x",
            ]
        expected = found.predicted.find(half, arm)
        lines.append([*line, _gigabytes(expected) if expected else "-"])
    return (
        f"{markdown_table(lines)}\n\n"
        "One training step of Mask R-CNN with ViTDet-B: batch 1, 1024 px, 20 objects. Peaks "
        "exclude weights and gradients;\nstep times are relative to stock; the memory planner "
        f"makes the predictions.\nCPU: {found.hardware('CPU')}. GPU: {found.hardware('GPU')}."
    )


def fill_ladder(page: Path, found: Measurements) -> None:
    """Write the memory ladder into a page that has its markers, such as the top-level README."""
    fill_page(page, {"memory ladder": ladder_table(found)})


def fill_report(page: Path, found: Measurements) -> None:
    """Write all tables of measurements into this project's page."""
    tables = {"lean": lean_table(found.lean)}
    for name, device in found.devices.items():
        works = list(device.works())
        # What is predicted and not measured belongs to a GPU.
        further = found.predicted.works() if name == "GPU" else ()
        shown = list(dict.fromkeys([*works, *further]))
        where = f"{name}: {found.hardware(name)}."
        memory = memory_table(device, found.predicted, shown) if shown else ""
        tables[f"memory {name}"] = f"{where}\n\n{memory}".rstrip()
        seconds = time_table(device, works) if works else ""
        tables[f"time {name}"] = f"{where}\n\n{seconds}".rstrip()
    fill_page(page, tables)


def _memory(row: dict[str, Any] | None) -> str:
    if row is None:
        return NOT_MEASURED
    return _gigabytes(row) if row["status"] == MEASURED else row["status"]


def _gigabytes(row: dict[str, Any]) -> str:
    return f"{row['saved_bytes'] / 1e9:.2f} / {row['peak_bytes'] / 1e9:.2f}"


def _time(device: Results, work: Work, arm: str) -> str:
    row = device.find(work, arm)
    if not (row and turns(row)):
        return NOT_MEASURED if row is None or row["status"] == MEASURED else row["status"]
    step, forward, backward = (
        statistics.median(values)
        for values in (step_seconds(row), row["forward_seconds"], row["backward_seconds"])
    )
    times = ratio(device, work, arm, "stock")
    relative = "" if times is None else f", {times:.2f} x"
    return f"{step:.3g} s ({forward:.3g} + {backward:.3g}), {work.batch / step:.3g}/s{relative}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predict", action="store_true", help="fill predictions.json first")
    parser.add_argument("--ladder", type=Path, metavar="FILE", help="also fill the ladder there")
    args = parser.parse_args(argv)
    try:
        if args.predict:
            predict_missing()
        found = Measurements()
        fill_report(HERE / "README.md", found)
        if args.ladder:
            fill_ladder(args.ladder, found)
    except UserError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    draw_memory(found, HERE / "memory.png")
    draw_time(found, HERE / "time.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
