"""What exact arithmetic costs in time: one training step of a ViT, against its alternatives.

The arms take turns, so that a noisy machine slows all of them alike; the ratios are of medians.
One row of step_time.json per model and device; rows that are there already are skipped.

    python -m projects.fidelity.step_time [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dr2net_d2.commands import markdown_table
from dr2net_d2.core import Dr2NetViT
from dr2net_d2.core.streams import FixedPointStream
from dr2net_d2.fidelity.__main__ import surroundings

RESULTS = Path(__file__).parent / "step_time.json"
MODELS = {
    "ViT-S, 4 blocks, 512 px": {"embed_dim": 384, "num_heads": 6, "depth": 4, "img_size": 512},
    "ViT-B, 4 blocks, 512 px": {"embed_dim": 768, "num_heads": 12, "depth": 4, "img_size": 512},
}
MODELS_ON_GPU = {
    "ViT-B, 1024 px": {
        "embed_dim": 768,
        "num_heads": 12,
        "depth": 12,
        "img_size": 1024,
        "use_rel_pos": True,
        "window_size": 14,
        "window_block_indexes": [0, 1, 3, 4, 6, 7, 9, 10],
    },
}
BETAS = (1 / 2, 3 / 8)
ARMS = ("exact", "exact, unchecked", "float reversible", "plain")


def measure(options: dict[str, Any], beta: float, device: torch.device, rounds: int) -> dict:
    """Seconds of forward and backward per arm: {arm: median}."""
    torch.manual_seed(0)
    vit = Dr2NetViT(**options).to(device)
    vit.coefficients.set(1 - beta, beta)
    images = torch.randn(1, 3, options["img_size"], options["img_size"], device=device)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(rounds + 1):
        for arm in ARMS:
            vit.reversible = arm != "plain"
            vit.arithmetic = "exact" if arm.startswith("exact") else "float"
            with unchecked() if arm == "exact, unchecked" else nullcontext():
                elapsed = step_seconds(vit, images)
            if turn:  # the first is for warming up
                seconds[arm].append(elapsed)
    return {arm: statistics.median(values) for arm, values in seconds.items()}


def unchecked() -> Any:
    """Without the checksums that notice a recomputation that differs."""
    return patch.object(FixedPointStream, "checksum", lambda self, state: state.new_zeros(()))


def step_seconds(vit: Dr2NetViT, images: Tensor) -> float:
    wait: Callable[[], None] = torch.cuda.synchronize if images.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        features = vit(images)["last_feat"]
    features.square().mean().backward()
    wait()
    return time.perf_counter() - started


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios of the medians, a line per model and coefficients."""
    lines = [["ViT", "β", "exact / float reversible", "of it the check", "exact / plain"]]
    for row in rows:
        exact, free, floating, plain = (row["seconds"][arm] for arm in ARMS)
        name = f"{row['model']}, {row['dtype']}, {row['hardware']}"
        ratios = [f"{exact / floating:.3f}", f"{exact / free - 1:+.1%}", f"{exact / plain:.2f}"]
        lines.append([name, f"{row['beta']:.4g}", *ratios])
    return markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = torch.device(args.device)
    setting = surroundings(device)
    hardware = setting.pop("device")
    warnings.simplefilter("ignore")  # float reversible says that its gradient is wrong
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    done = {(row["model"], row["beta"], row["device"]) for row in rows}
    for model, options in (MODELS_ON_GPU if args.device == "cuda" else MODELS).items():
        for beta in BETAS:
            if (model, beta, args.device) in done:
                continue
            seconds = measure(options, beta, device, args.rounds)
            rows.append(
                {
                    "model": model,
                    "beta": beta,
                    "device": args.device,
                    "hardware": hardware,
                    **setting,
                    "dtype": "bfloat16 autocast" if args.device == "cuda" else "float32",
                    "rounds": args.rounds,
                    "seed": 0,
                    "seconds": {arm: round(value, 4) for arm, value in seconds.items()},
                }
            )
            RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
