"""Runs the quickstart with every engine and backbone at hand, and prints README's table.

One row of results.json per finished run; runs that are there already are skipped.

    python -m projects.quickstart.measure
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dr2net_d2.commands import load_config
from dr2net_d2.config import dr2net_arguments, vit_arguments
from dr2net_d2.core import Dr2NetViT
from dr2net_d2.core.memory import count_saved_bytes
from dr2net_d2.data import resolve_dataset
from dr2net_d2.training import draw_predictions

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
RESULTS = HERE / "results.json"

DR2NET, STOCK = "build_dr2net_vitdet_backbone", "build_vitdet_backbone"
RUNS = (("torchvision", DR2NET), ("detectron2", DR2NET), ("detectron2", STOCK))


def train(engine: str, backbone: str) -> dict[str, Any]:
    """One run of train_net.py: its metrics, wall-clock time, and the folder that it wrote."""
    folder = ROOT / "output" / f"quickstart-{engine}-{backbone}"
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(CONFIG)]
    command += ["--engine", engine, "OUTPUT_DIR", str(folder), "MODEL.BACKBONE.NAME", backbone]
    started = time.time()
    subprocess.run(command, check=True, cwd=ROOT)
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    last = [row for row in rows if "bbox/AP" in row][-1]
    if engine == "torchvision":
        keep_pictures(folder)
    peaks = [row["memory/peak_mb"] for row in rows if "memory/peak_mb" in row]
    return {
        "engine": engine,
        "backbone": backbone,
        **{name: round(last[f"bbox/{name}"], 2) for name in ("AP", "AP50", "AP75")},
        "minutes": round((time.time() - started) / 60, 2),
        "peak_resident_mib": round(max(peaks)),
    }


def keep_pictures(folder: Path) -> None:
    """The curves of a run and two of its validation images, beside this script."""
    shutil.copy(folder / "curves.png", HERE)
    json_file, image_root = resolve_dataset("small_digits_val")
    found = folder / "inference" / "coco_instances_results.json"
    draw_predictions(json_file, image_root, found, HERE / "predictions.png", num_images=2)


def saved_megabytes() -> dict[str, float]:
    """MB that the ViT's blocks save for backward at the quickstart's size, at beta = 1/2."""
    cfg = load_config(str(CONFIG), [], "torchvision")
    vit = Dr2NetViT(**vit_arguments(cfg), **dr2net_arguments(cfg))
    vit.coefficients.set(0.5, 0.5)
    side = cfg.MODEL.VIT.IMG_SIZE // cfg.MODEL.VIT.PATCH_SIZE
    x = torch.randn(cfg.SOLVER.IMS_PER_BATCH, side, side, cfg.MODEL.VIT.EMBED_DIM)
    found = {}
    for name, reversible, arithmetic in (
        ("dr2net", True, "exact"),
        ("plain_autograd", False, "float"),
    ):
        vit.reversible, vit.arithmetic = reversible, arithmetic
        with count_saved_bytes(exclude=tuple(vit.parameters())) as saved:
            vit.blocks(x.requires_grad_())
        found[name] = round(saved.total / 1e6, 2)
    return found


def setting() -> dict[str, Any]:
    """Hardware and versions."""
    packages = ("torch", "torchvision", "numpy", "opencv-python", "scikit-learn")
    installed = {name: version(name) for name in packages}
    if importlib.util.find_spec("detectron2"):
        installed["detectron2"] = version("detectron2")
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **installed,
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| engine | backbone | AP | AP50 | AP75 | minutes |",
        "| --- | --- | --: | --: | --: | --: |",
    ]
    for run in results["runs"]:
        lines.append(
            f"| {run['engine']} | `{run['backbone']}` | {run['AP']:.1f} | {run['AP50']:.1f} "
            f"| {run['AP75']:.1f} | {run['minutes']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": []}
    results |= {"setting": setting(), "saved_mb": saved_megabytes()}
    done = {(run["engine"], run["backbone"]) for run in results["runs"]}
    for engine, backbone in RUNS:
        if (engine, backbone) in done:
            continue
        if engine == "detectron2" and importlib.util.find_spec("detectron2") is None:
            print("skipped: Detectron2 is not installed")
            continue
        results["runs"].append(train(engine, backbone))
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    print(results["saved_mb"])


if __name__ == "__main__":
    main()
