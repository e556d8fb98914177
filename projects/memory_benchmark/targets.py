"""What has to be shown: memory and time of Dr2Net against stock ViTDet, each beside its target.

One image, Mask R-CNN, bf16 autocast, exact arithmetic at beta 1/2. Memory is counted on fake
tensors, the detector's by the memory planner; times come from the files of measure.py. Writes
targets.json and the table in README.md here.

    python -m projects.memory_benchmark.targets [--rows 6 7]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from dr2net_d2.commands import fill_page, markdown_table
from dr2net_d2.core.attention_kernels import planned_for
from dr2net_d2.core.memory import peak_tensor_bytes
from dr2net_d2.errors import UserError
from dr2net_d2.plan.planner import Prediction, pairs_of_schedule
from projects.memory_benchmark.arms import (
    build_networks,
    gradients,
    load_config,
    make_inputs,
    take_step,
)
from projects.memory_benchmark.measure import say
from projects.memory_benchmark.measurements import HERE, NOT_MEASURED, Measurements, ratio
from projects.memory_benchmark.predictions import ask
from projects.memory_benchmark.store import Work

EXACT, CHECKPOINT = "dr2net-exact", "our-attention-checkpoint"
CARD = 24e9
"""Bytes: what a "24 GB" card has left beside the CUDA context."""
SIDES = range(512, 8192, 32)
WORK = Work("detector", "b", None, 1024, 1, "bf16", 20, 0)
PLANNER = "planner"
FAKE = "fake tensors, the attention of a GPU"
CPU_FILE, GPU_FILE = "results-cpu.json, fp32", "results-cuda.json, bf16"


@dataclass(frozen=True)
class Row:
    """A number of the issue's table; ``met`` is None where nothing was measured."""

    number: int
    what: str
    found: str
    target: str
    met: bool | None
    how: str


def at_most(number: int, what: str, value: float, limit: float, unit: str, how: str) -> Row:
    found = f"{value:.3g}{unit}"
    return Row(number, what, found, f"at most {limit:g}{unit}", value <= limit, how)


@cache
def planned(work: Work, arm: str, beta: float = 1 / 2) -> Prediction:
    return ask(work, arm, beta)


@cache
def vit_peak(model: str, arm: str, depth: int | None = None) -> int:
    """Bytes at the peak of forward and backward of the ViT alone, beyond weights and gradients.

    Args:
        model: of ``arms.MODELS``.
        arm: of ``store.ARMS``.
        depth: number of blocks; None: the model's own.
    """
    work = WORK._replace(scope="vit", model=model, depth=depth)
    device = torch.device("cpu")
    cfg = load_config(model, depth)
    network = build_networks(cfg, "vit", [arm], device, work.seed)[arm]
    inputs, gradient = make_inputs(work, cfg.MODEL.VIT.EMBED_DIM, device)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        network.module = copy.deepcopy(network.module)
        inputs, gradient = copy.deepcopy((inputs, gradient))
    with mode, planned_for("cuda"), gradients(network):
        network.equip()  # what a copied function is bound to is the module before
        with peak_tensor_bytes() as live:
            take_step(network, inputs, gradient, work)
    return live.peak


def saved_bytes() -> Iterator[Row]:
    stock, ours = (planned(WORK, arm).saved / 1e9 for arm in ("stock", EXACT))
    what = f"saved for backward, ViT-B 1024 px, detector (stock {stock:.2f} GB)"
    yield at_most(1, what, ours, 0.65, " GB", PLANNER)


def peak_of_vit() -> Iterator[Row]:
    for model, of_stock, of_checkpoint in (("b", 0.06, 0.7), ("l", 0.035, 0.35)):
        ours, stock, other = (vit_peak(model, a) for a in (EXACT, "stock", CHECKPOINT))
        name = f"peak of the ViT alone, ViT-{model.upper()} 1024 px ({ours / 1e9:.3f} GB)"
        yield at_most(2, f"{name}, of stock", ours / stock, of_stock, " x", FAKE)
        yield at_most(2, f"{name}, of checkpointing", ours / other, of_checkpoint, " x", FAKE)


def peak_of_detector() -> Iterator[Row]:
    large = WORK._replace(model="l")
    ours, stock, checkpoint = (planned(large, arm).beyond for arm in (EXACT, "stock", CHECKPOINT))
    name = f"peak of the detector, ViT-L 1024 px ({ours / 1e9:.3f} GB)"
    yield at_most(3, f"{name}, of stock", ours / stock, 0.15, " x", PLANNER)
    yield at_most(3, f"{name}, of checkpointing", ours / checkpoint, 0.6, " x", PLANNER)


def over_depth() -> Iterator[Row]:
    deep, usual = (planned(WORK._replace(depth=depth), EXACT).beyond for depth in (48, 12))
    what = "peak of the detector at depth 48, of that at 12, ViT-B's width"
    yield at_most(4, what, deep / usual, 1.15, " x", PLANNER)
    vit = vit_peak("b", EXACT, 48) / vit_peak("b", EXACT)
    yield at_most(4, "the same of the ViT alone", vit, 1.15, " x", FAKE)


def over_schedule() -> Iterator[Row]:
    peaks = [planned(WORK, EXACT, beta).beyond for _, beta in pairs_of_schedule(load_config("b"))]
    what = "highest peak over the default schedule, of its lowest, ViT-B"
    yield at_most(5, what, max(peaks) / min(peaks), 1.1, " x", PLANNER)


def step_times(number: int, other: str, on_gpu: float, on_cpu: float) -> Iterator[Row]:
    """Against the arm ``other``, with the limits on both devices."""
    found = Measurements()
    for device, work, limit, file in (
        ("GPU", WORK, on_gpu, GPU_FILE),
        ("CPU", WORK._replace(precision="fp32"), on_cpu, CPU_FILE),
    ):
        what = f"step time, ViT-B 1024 px, {device}, of {other}"
        value = ratio(found.devices[device], work, EXACT, other)
        if value is None:
            yield Row(number, what, NOT_MEASURED, f"at most {limit:g} x", None, file)
        else:
            yield at_most(number, what, value, limit, " x", file)


def largest_side() -> Iterator[Row]:
    ours, stock = (largest_that_fits(arm) for arm in (EXACT, "stock"))
    what = f"largest side in 24 GB, Mask R-CNN with ViT-B (stock {stock} px)"
    found = f"{ours} px" + " or more" * (ours == SIDES[-1])
    yield Row(8, what, found, "at least 3072 px", ours >= 3072, PLANNER)


def largest_that_fits(arm: str) -> int:
    """The largest of ``SIDES`` whose whole iteration stays within ``CARD``, in px."""
    fits, exceeds = 0, len(SIDES)
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if planned(WORK._replace(size=SIDES[middle]), arm).peak <= CARD:
            fits = middle
        else:
            exceeds = middle
    return SIDES[fits]


def targets_table(rows: list[Row]) -> str:
    words = {True: "yes", False: "**no**", None: "-"}
    lines = [["", "quantity", "result", "required", "met", "source"]]
    lines += [[str(r.number), r.what, r.found, r.target, words[r.met], r.how] for r in rows]
    return markdown_table(lines)


def write(rows: list[Row], folder: Path) -> None:
    """targets.json, and the table in the folder's README.md."""
    content = {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    (folder / "targets.json").write_text(json.dumps(content, indent=2) + "\n")
    fill_page(folder / "README.md", {"targets": targets_table(rows)})


MAKERS: dict[int, Callable[[], Iterator[Row]]] = {
    1: saved_bytes,
    2: peak_of_vit,
    3: peak_of_detector,
    4: over_depth,
    5: over_schedule,
    6: partial(step_times, 6, "stock", 1.0, 1.15),
    7: partial(step_times, 7, "stock-checkpoint", 0.85, 0.95),
    8: largest_side,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", type=int, nargs="+", choices=MAKERS, help="only these; others stay as they are"
    )
    wanted = parser.parse_args().rows or list(MAKERS)
    file = HERE / "targets.json"
    before = json.loads(file.read_text())["rows"] if file.is_file() else []
    rows = [Row(**row) for row in before if row["number"] not in wanted]
    try:
        for number in wanted:
            for row in MAKERS[number]():
                say(f"{row.number} {row.what}: {row.found}, {row.target}")
                rows.append(row)
        rows.sort(key=lambda row: row.number)
        write(rows, HERE)
    except UserError as error:
        print(f"targets.py: error: {error}", file=sys.stderr)
        return 2
    print(targets_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
