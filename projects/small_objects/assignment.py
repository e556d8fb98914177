"""Does assigning anchors by NWD in place of IoU help on digits of 8 to 16 px? Trains, compares.

    python -m projects.small_objects.assignment --arms iou-stock iou-data nwd-data --seeds 1 2

Every run is the quickstart with the torchvision engine; anchors "data" are those that
``python -m dr2net_d2.anchors`` proposes. One row of assignment.json per finished run; runs that are
there already are skipped. Prints the mean AP and its spread over the seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dr2net_d2.anchors import config_anchors, find_anchors, training_objects
from dr2net_d2.commands import load_config
from dr2net_d2.data import load_coco, resolve_dataset
from dr2net_d2.tv import engine

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "quickstart.yaml"
RESULTS = HERE / "assignment.json"
DATA = [f"small_digits_{split}_s256_d12_min8_max16" for split in ("train_n400", "val_n100")]
ARMS = ("iou-stock", "iou-data", "nwd-data")


def normalized_wasserstein_distance(a: Tensor, b: Tensor, constant: float) -> Tensor:
    """Similarity of boxes that also tells near from far where they do not overlap.

    Boxes are Gaussians of mean (cx, cy) and standard deviations (w / 2, h / 2); W is the
    2-Wasserstein distance of two of them (Wang et al., arXiv 2110.13389, section 3):

        W^2 = |(cx, cy, w / 2, h / 2)_a - (cx, cy, w / 2, h / 2)_b|^2,   NWD = exp(-W / constant)

    Args:
        a, b: (n, 4) and (m, 4), XYXY in px.
        constant: px; the mean size of the objects.

    Returns:
        (n, m), from 0 to 1.
    """

    def gaussians(boxes: Tensor) -> Tensor:
        first, last = boxes[:, :2], boxes[:, 2:]
        return torch.cat([(first + last) / 2, (last - first) / 2], dim=1)

    distance = torch.cdist(gaussians(a), gaussians(b), compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-distance / constant)


def train(arm: str, seed: int) -> dict[str, Any]:
    """One run: its metrics, anchors and wall-clock time."""
    similarity, anchors = arm.split("-")
    overrides = ["DATASETS.TRAIN", f"('{DATA[0]}',)", "DATASETS.TEST", f"('{DATA[1]}',)"]
    overrides += ["SEED", str(seed), "OUTPUT_DIR", f"output/assignment/{arm}-{seed}"]
    cfg = load_config(str(CONFIG), overrides, "torchvision")
    objects = training_objects(cfg, load_coco(*resolve_dataset(DATA[0])).records, 16)
    chosen = config_anchors(cfg)
    if anchors == "data":
        chosen = find_anchors(objects, chosen, None, None)
    for key, lists in (("SIZES", chosen.sizes), ("ASPECT_RATIOS", chosen.aspect_ratios)):
        overrides += [f"MODEL.ANCHOR_GENERATOR.{key}", str([list(values) for values in lists])]
    constant = float(objects.sizes.mean())

    def build(cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        if similarity == "nwd":
            model.rpn.box_similarity = partial(normalized_wasserstein_distance, constant=constant)
        return model

    build_model, engine.build_model = engine.build_model, build
    started = time.time()
    try:
        args = {"config_file": str(CONFIG), "opts": overrides, "num_gpus": 1}
        metrics = engine.run(argparse.Namespace(**args, eval_only=False, resume=False))["bbox"]
    finally:
        engine.build_model = build_model
    return {
        "arm": arm,
        "seed": seed,
        **{name: round(metrics[name], 3) for name in ("AP", "AP50", "AP75")},
        "sizes": chosen.sizes,
        "aspect_ratios": chosen.aspect_ratios[0],
        "constant": round(constant, 3) if similarity == "nwd" else None,
        "minutes": round((time.time() - started) / 60, 2),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for arm in args.arms:
            if (arm, seed) not in done:
                rows.append(train(arm, seed))
                RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    for arm in ARMS:
        found = torch.tensor([row["AP"] for row in rows if row["arm"] == arm])
        if len(found) > 1:
            print(f"{arm}: AP {found.mean():.2f} ± {found.std():.2f}, {len(found)} seeds")


if __name__ == "__main__":
    main()
