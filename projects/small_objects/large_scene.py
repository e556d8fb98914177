"""A scene of 4096 px with more than 2,000 objects: trained on, evaluated, sliced; peak memory.

Each phase is a train_net.py of its own, so that its peak is its own: the largest resident memory
that the kernel saw (ru_maxrss), images, annotations and evaluation included. The detector of
large_scene.yaml is trained on tiles of the scene first, so that there is something to find, and
from those weights on the whole image; both evaluations are of the weights from tiles, on another
scene. One row of large_scene.json per engine and phase.

    python -m projects.small_objects.large_scene [--engine torchvision] [--iterations 15]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "large_scene.json"
TRAIN, TEST = "small_digits_train_n1_s4096_d2000", "small_digits_val_n1_s4096_d2000"
LIMIT_GIB = 12
SEED = 1

TILE = {
    "INPUT.TILES.ENABLED": "True",
    "INPUT.TILES.SIZE": "256",
    "INPUT.MIN_SIZE_TRAIN": "(256,)",
    "SOLVER.IMS_PER_BATCH": "4",
}
SLICES = {
    "TEST.TILES.ENABLED": "True",
    "TEST.TILES.SIZE": "512",
    "TEST.TILES.OVERLAP": "0.1",
    "TEST.TILES.WHOLE_IMAGE": "False",
    "INPUT.MIN_SIZE_TEST": "512",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "1000",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "300",
}


def phases(folder: Path, iterations: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name -> flags and overrides of train_net.py."""
    weights = {"MODEL.WEIGHTS": str(folder / "tiles/model_final.pth")}
    no_test = {"DATASETS.TEST": "()"}
    length = {"SOLVER.MAX_ITER": str(iterations), "SOLVER.WARMUP_ITERS": "5"}
    return {
        "tiles": ([], {**TILE, **no_test, **length}),
        "whole": ([], {**no_test, **weights}),
        "evaluate_whole": (["--eval-only"], weights),
        "evaluate_sliced": (["--eval-only"], {**SLICES, **weights}),
    }


def measure(words: list[str]) -> dict[str, float]:
    """Run train_net.py in a process of its own: peak in GiB, seconds, seconds of CPU.

    This process stays small: a child's peak begins with the size of its parent.
    """
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, str(ROOT / "train_net.py"), *words], cwd=ROOT)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"train_net.py {' '.join(words)} failed")
    return {
        "peak_gib": round(used.ru_maxrss / 2**20, 3),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
    }


def setting() -> dict[str, Any]:
    names = ("torch", "torchvision", "numpy")
    return {
        "device": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "train": TRAIN,
        "test": TEST,
        "seed": SEED,
    }


def count_and_score(folder: Path, phase: str) -> dict[str, float]:
    """Objects in the scene, and what was found, by the results file of a phase."""
    from dr2net_d2.data import load_coco, resolve_dataset
    from dr2net_d2.evaluation import evaluate_boxes

    training = not phase.startswith("evaluate")
    json_file, images = resolve_dataset(TRAIN if training else TEST)
    objects = sum(len(record.boxes) for record in load_coco(json_file, images).records)
    if training:
        return {"objects": objects}
    results = json.loads((folder / phase / "inference/coco_instances_results.json").read_text())
    score = evaluate_boxes(json_file, results, 4000)["AP50"]
    return {"objects": objects, "detections": len(results), "AP50": round(score, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("detectron2", "torchvision"), default="torchvision")
    parser.add_argument("--iterations", type=int, default=15, help="on tiles, default: 15")
    args = parser.parse_args()
    config = ["--config-file", str(HERE / "large_scene.yaml"), "--engine", args.engine]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for phase, (flags, overrides) in phases(folder, args.iterations).items():
            overrides |= {"OUTPUT_DIR": str(folder / phase), "SEED": str(SEED)}
            words = [word for pair in overrides.items() for word in pair]
            row = {"engine": args.engine, "phase": phase, **measure([*config, *flags, *words])}
            if phase == "tiles":
                row["iterations"] = args.iterations
            print(json.dumps(row), flush=True)
            rows.append(row)
        for row in rows:
            row |= count_and_score(folder, row["phase"])
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    rows = [row for row in kept if row["engine"] != args.engine] + rows
    RESULTS.write_text(json.dumps({"setting": setting(), "rows": rows}, indent=2) + "\n")
    highest = max(row["peak_gib"] for row in rows)
    print(f"at most {highest:.2f} GiB of host memory; the limit is {LIMIT_GIB}")
    return int(highest > LIMIT_GIB)


if __name__ == "__main__":
    sys.exit(main())
