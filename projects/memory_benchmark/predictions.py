"""What the memory planner says of the same configurations, kept in predictions.json."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from dr2net_d2.plan.planner import Prediction, predict
from projects.memory_benchmark.arms import BETA, load_config
from projects.memory_benchmark.measure import HERE, parse_arguments, plan, say
from projects.memory_benchmark.measurements import Measurements
from projects.memory_benchmark.store import Results, Work

PLANNED = {
    "stock": "stock",
    "stock-checkpoint": "stock + checkpoint",
    "our-attention-checkpoint": "our attention + checkpoint",
    "dr2net-float": "dr2net",
    "dr2net-exact": "dr2net",
}
"""Our arms -> the planner's; of a frozen backbone it knows nothing."""


def ask(work: Work, arm: str, beta: float | None = BETA) -> Prediction:
    """The planner's answer for a whole detector.

    Args:
        work: its scope is the detector.
        arm: of ``PLANNED``.
        beta: with alpha = 1 - beta; None: the costliest of the default schedule.
    """
    cfg = load_config(work.model, work.depth)
    cfg.SOLVER.AMP.ENABLED = work.precision == "bf16"
    cfg.MODEL.DR2NET.ARITHMETIC = "float" if arm == "dr2net-float" else "exact"
    coefficients = None if beta is None else (1 - beta, beta)
    return predict(
        cfg, PLANNED[arm], work.size, work.batch, objects=work.objects, coefficients=coefficients
    )


def predict_missing(folder: Path = HERE) -> None:
    """Predict what is measured, and what the GPU's preset would measure."""
    found = Measurements(folder)
    works = plan(parse_arguments(["--preset", "gpu"]))
    for device in found.devices.values():
        works += device.works()
    results = Results(folder / "predictions.json", {"torch": torch.__version__})
    for work in dict.fromkeys(works):
        for arm in PLANNED:
            if work.scope != "detector" or results.find(work, arm):
                continue
            started = time.perf_counter()
            prediction = ask(work, arm)
            results.put(
                work,
                arm,
                status="predicted",
                saved_bytes=prediction.saved,
                peak_bytes=prediction.beyond,
                total_bytes=prediction.peak,
                parts=prediction.parts,
            )
            seconds = time.perf_counter() - started
            say(f"{work}, {arm}: peak {prediction.beyond / 1e9:.2f} GB ({seconds:.0f} s)")
