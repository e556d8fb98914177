"""Memory and time of an iteration of each arm, at the size of parity.yaml; writes costs.json.

Peak: tensors alive in forward and backward, beyond weights and optimizer state, gradients included;
the largest over the coefficients that the arm passes through. Time: the arms in turns, one thread.

    python -m projects.parity.costs [--turns 7]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dr2net_d2.core.memory import peak_tensor_bytes
from dr2net_d2.training import update_coefficients
from dr2net_d2.tv.dataset import TrainingStream, as_lists
from projects.parity import arms
from projects.parity.finetune import prepare

COSTS = Path(__file__).parent / "costs.json"
PROGRESS = (0.0, 0.25, 0.5, 1.0)


class Iteration:
    """One iteration of an arm, forward and backward, again and again on the same images."""

    def __init__(self, arm: arms.Arm) -> None:
        self.training = prepare(arm, [], seed=1).training
        cfg, self.model = self.training.cfg, self.training.model.train()
        stream = TrainingStream(
            self.training.records,
            shortest_sides=cfg.INPUT.MIN_SIZE_TRAIN,
            longest_side=cfg.INPUT.MAX_SIZE_TRAIN,
            flip=False,
            channel_order=cfg.INPUT.FORMAT,
            seed=1,
        )
        images, self.targets = as_lists([stream[i] for i in range(cfg.SOLVER.IMS_PER_BATCH)])
        self.images: list[Tensor] = [image.float() for image in images]

    def __call__(self) -> None:
        self.model.zero_grad()
        sum(self.model(self.images, self.targets).values()).backward()

    def peak_bytes(self) -> int:
        peaks = []
        for progress in PROGRESS:
            update_coefficients(self.model, self.training.schedule, round(1000 * progress), 1000)
            self()  # measures the range of the streams, if need be
            self.model.zero_grad()
            with peak_tensor_bytes() as live:
                self()
            peaks.append(live.peak)
        return max(peaks)

    def seconds(self) -> float:
        started = time.perf_counter()
        self()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    iterations = {arm.name: Iteration(arm) for arm in arms.ARMS if arm.engine == "torchvision"}
    rows: dict[str, dict[str, Any]] = {
        name: {"peak_bytes": iteration.peak_bytes(), "step_seconds": []}
        for name, iteration in tqdm(iterations.items(), desc="memory")
    }
    for _ in tqdm(range(args.turns), desc="time"):
        for name, iteration in iterations.items():
            rows[name]["step_seconds"].append(round(iteration.seconds(), 4))
    setting = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
    }
    COSTS.write_text(json.dumps({"setting": setting, "arms": rows}, indent=2) + "\n")
    for name, row in rows.items():
        seconds = statistics.median(row["step_seconds"])
        print(f"{name}: {row['peak_bytes'] / 1e6:.0f} MB, {seconds:.3f} s")


if __name__ == "__main__":
    main()
