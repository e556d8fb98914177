"""Time and memory of evaluating a million detections: ours, pycocotools, faster-coco-eval.

    python projects/small_objects/evaluation_speed.py

Every run is a process of its own. The results, with what differs from pycocotools, go to
evaluation_speed.json beside this file. faster-coco-eval is no dependency: it is compared where it
is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dr2net_d2.evaluation import PROTOCOLS
from dr2net_d2.evaluation.counting import count
from dr2net_d2.evaluation.tables import read_results, read_truth

SEED = 0
CASES = {
    # 2000 detections and 200 objects an image, as in the crowded ones of VisDrone and AI-TOD.
    "few crowded images": {"images": 500, "detections": 1_000_000, "objects": 100_000},
    "many images": {"images": 10_000, "detections": 1_000_000, "objects": 100_000},
}
ENGINES = {"ours": "dr2net_d2", "faster": "faster_coco_eval", "pycocotools": "pycocotools"}
ARRAYS = ("precision", "recall", "scores")
PROTOCOL = PROTOCOLS["aitod"]
CLASSES = 8


def draw(images: int, detections: int, objects: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A ground truth and results: jittered copies of the objects, 3 in 10 of them elsewhere."""
    rng = np.random.default_rng(SEED)
    image = rng.integers(1, images + 1, objects)
    category = rng.integers(1, CLASSES + 1, objects)
    sides = np.exp(rng.normal(np.log(13), 0.6, (objects, 2))).clip(2, 200)
    boxes = np.concatenate([rng.uniform(0, 600, (objects, 2)), sides], axis=1).round(1)
    crowd = rng.random(objects) < 0.02
    truth = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 800, "height": 800}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": k, "name": f"class{k}"} for k in range(1, CLASSES + 1)],
        "annotations": [
            {"id": i, "image_id": im, "category_id": k, "bbox": b, "area": a, "iscrowd": int(c)}
            for i, (im, k, b, a, c) in enumerate(
                zip(
                    image.tolist(),
                    category.tolist(),
                    boxes.tolist(),
                    (boxes[:, 2] * boxes[:, 3]).tolist(),
                    crowd,
                    strict=True,
                ),
                1,
            )
        ],
    }
    source = rng.integers(0, objects, detections)
    jitter = rng.normal(0, 0.12, (detections, 4))
    found = boxes[source]
    found[:, :2] += jitter[:, :2] * found[:, 2:]
    found[:, 2:] *= np.exp(jitter[:, 2:])
    elsewhere = rng.random(detections) < 0.3
    found[elsewhere, :2] = rng.uniform(0, 600, (elsewhere.sum(), 2))
    mistaken = rng.random(detections) < 0.1
    labels = np.where(mistaken, rng.integers(1, CLASSES + 1, detections), category[source])
    columns = (image[source], labels, found.round(2), rng.random(detections).round(4))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    keys = ("image_id", "category_id", "bbox", "score")
    return truth, [dict(zip(keys, row, strict=True)) for row in rows]


def evaluate_ours(file: str, results: list[dict[str, Any]]) -> tuple[dict[str, float], Any]:
    started = time.perf_counter()
    truth = read_truth(file)
    table = read_results(results, truth)
    loaded = time.perf_counter()
    counts = count(truth, table, PROTOCOL)
    parts = {"loading": loaded - started, "counting": time.perf_counter() - loaded}
    return parts, {name: getattr(counts, name) for name in ARRAYS}


def evaluate_coco(
    engine: str, file: str, results: list[dict[str, Any]]
) -> tuple[dict[str, float], Any]:
    """pycocotools, or the library with its interface."""
    if engine == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    clock = [time.perf_counter()]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        params = evaluation.params
        params.maxDets = list(PROTOCOL.max_detections)
        params.areaRng = [[size.low, size.high] for size in PROTOCOL.size_bins]
        params.areaRngLbl = [size.name for size in PROTOCOL.size_bins]
        clock.append(time.perf_counter())
        evaluation.evaluate()
        clock.append(time.perf_counter())
        evaluation.accumulate()
    clock.append(time.perf_counter())
    parts = dict(zip(("loading", "matching", "accumulating"), np.diff(clock).tolist(), strict=True))
    return parts, {name: evaluation.eval[name] for name in ARRAYS}


def run(engine: str, case: str, folder: Path) -> None:
    """In a process of its own: evaluate, and leave the arrays and the figures in the folder."""
    truth, results = draw(**CASES[case])
    file = str(folder / "truth.json")
    Path(file).write_text(json.dumps(truth))
    del truth
    gc.collect()
    # Linux forgets the peak of the drawing.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    cpu = time.process_time()
    if engine == "ours":
        parts, arrays = evaluate_ours(file, results)
    else:
        parts, arrays = evaluate_coco(engine, file, results)
    figures = {
        "seconds": round(sum(parts.values()), 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "parts": {name: round(seconds, 2) for name, seconds in parts.items()},
        "peak_mib_beyond_the_data": memory("VmHWM") - before,
    }
    np.savez(folder / f"{engine}.npz", **arrays)
    (folder / f"{engine}.json").write_text(json.dumps(figures))


def memory(name: str) -> int:
    """Of this process in MiB: VmRSS now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs=3, metavar=("ENGINE", "CASE", "FOLDER"))
    parser.add_argument("--output", default=Path(__file__).with_suffix(".json"), type=Path)
    arguments = parser.parse_args()
    if arguments.run:
        engine, case, folder = arguments.run
        return run(engine, case, Path(folder))
    engines = [name for name, module in ENGINES.items() if importlib.util.find_spec(module)]
    packages = [name.replace("_", "-") for name in ENGINES.values() if name != "dr2net_d2"]
    versions = [
        name for name in ("numpy", *packages) if importlib.util.find_spec(name.replace("-", "_"))
    ]
    document: dict[str, Any] = {
        "hardware": f"{platform.machine()}, {platform.processor() or cpu_name()}, one thread",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in versions}},
        "seed": SEED,
        "protocol": PROTOCOL.description,
        "classes": CLASSES,
        "cases": {},
    }
    for case, numbers in CASES.items():
        rows: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for engine in engines:
                print(f"{case}: {engine}", flush=True)
                command = [sys.executable, __file__, "--run", engine, case, temporary]
                subprocess.run(command, check=True)
                rows[engine] = json.loads((folder / f"{engine}.json").read_text())
                # Others on the machine lengthen the seconds, hardly those of the processor.
                rows[engine]["load_average"] = round(os.getloadavg()[0], 1)
            reference = np.load(folder / "pycocotools.npz")
            for engine in engines[:-1]:
                arrays = np.load(folder / f"{engine}.npz")
                rows[engine]["largest_difference"] = {
                    name: float(np.abs(arrays[name] - reference[name]).max()) for name in ARRAYS
                }
                for key in ("seconds", "cpu_seconds"):
                    ratio = rows["pycocotools"][key] / rows[engine][key]
                    rows[engine][f"times_faster_in_{key}"] = round(ratio, 1)
        document["cases"][case] = {**numbers, "engines": rows}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    return None


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
