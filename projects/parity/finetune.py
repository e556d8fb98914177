"""One finetuning run of one arm: what it reached, and how exact its gradients were on the way."""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dr2net_d2.commands import load_config
from dr2net_d2.config.torchvision import check_config
from dr2net_d2.core import Dr2NetViT
from dr2net_d2.fidelity.gradients import measure
from dr2net_d2.training import read_metrics
from dr2net_d2.tv.dataset import Split, load_image, load_split
from dr2net_d2.tv.engine import build_seeded_model
from dr2net_d2.tv.training import Training
from dr2net_d2.weights import StrictCheckpointer
from projects.parity import arms, photo_shapes

HERE = Path(__file__).parent
CONFIG = HERE / "parity.yaml"

TUNING, FINAL = "tuning", "final"
FINISHED, DIVERGED = "finished", "diverged"
TUNING_CANVASES = "_seed1"
"""Learning rates are chosen on other canvases than those that the tables are about."""

EVALUATIONS = 4
GRADIENT_MARKS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
"""Progress at which a final run's gradient error is measured."""


class Run(NamedTuple):
    """What a row of results.jsonl is about. ``rate`` is the base learning rate."""

    stage: str
    arm: str
    rate: float
    seed: int


def finetune(run: Run, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """The row of a run.

    Args:
        run: what to do.
        extra: further KEY VALUE words, for a trial at reduced size.

    Returns:
        The run's fields; status, "finished" or "diverged" with a message; AP, AP50, AP75, APs and
        those per class; curve, [iteration, AP] of each evaluation; loss, [iteration, total loss];
        gradient_error, [progress, alpha, beta, error or None where not finite]; minutes.
    """
    arm = arms.EVERYTHING[run.arm]
    started = time.perf_counter()
    errors: list[list[float | None]] = []
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        words = [*_words(run, folder), *extra]
        try:
            if arm.engine == "detectron2":
                metrics = _train_with_detectron2([*arm.overrides(), *words])
            else:
                metrics = _train_with_torchvision(arm, words, run, errors)
            rounded = {name: round(value, 2) for name, value in metrics.items() if value == value}
            outcome = {"status": FINISHED, **rounded}
        except FloatingPointError as error:
            outcome = {"status": DIVERGED, "message": str(error)}
        rows = read_metrics(Path(folder, "metrics.json"))
    return {
        **run._asdict(),
        **outcome,
        "curve": _series(rows, "bbox/AP"),
        "loss": _series(rows, "total_loss"),
        "gradient_error": errors,
        "minutes": round((time.perf_counter() - started) / 60, 2),
    }


def _series(rows: list[dict[str, Any]], name: str) -> list[list[float]]:
    # Detectron2 writes the last evaluation an iteration late.
    last = max((row["iteration"] for row in rows if "total_loss" in row), default=0)
    return [[min(row["iteration"], last) + 1, round(row[name], 3)] for row in rows if name in row]


def _words(run: Run, folder: str) -> list[str]:
    cfg = load_config(str(CONFIG), arms.EVERYTHING[run.arm].overrides(), "torchvision")
    words = ["SOLVER.BASE_LR", str(run.rate), "SEED", str(run.seed), "OUTPUT_DIR", folder]
    if run.stage == TUNING:
        test = tuple(name + TUNING_CANVASES for name in cfg.DATASETS.TEST)
        return [*words, "DATASETS.TEST", str(test)]
    return [*words, "TEST.EVAL_PERIOD", str(cfg.SOLVER.MAX_ITER // EVALUATIONS)]


class Prepared(NamedTuple):
    """A training that can begin: ``training.run(test, folder)``."""

    training: Training
    vit: Dr2NetViT
    test: Split


def prepare(arm: arms.Arm, words: list[str], seed: int) -> Prepared:
    """An arm of torchvision's engine, its weights loaded, at KEY VALUE words beyond its own."""
    cfg = load_config(str(CONFIG), [*arm.overrides(), *words], "torchvision")
    check_config(cfg)
    weights, cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS, ""
    cfg.freeze()
    model = build_seeded_model(cfg, seed)
    # Before the arm's changes, which give parameters other names.
    StrictCheckpointer(model).load(weights)
    vit = model.backbone.net
    if arm.equip is not None:
        arm.equip(vit)
    photo_shapes.provide((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    (train,) = map(load_split, cfg.DATASETS.TRAIN)
    (test,) = map(load_split, cfg.DATASETS.TEST)
    training = Training(cfg, model, train.content.records, seed, resume=False)
    if arm.schedule is not None:
        training.schedule = arm.schedule
    return Prepared(training, vit, test)


def _train_with_torchvision(
    arm: arms.Arm, words: list[str], run: Run, errors: list[list[float | None]]
) -> dict[str, float]:
    training, vit, test = prepare(arm, words, run.seed)
    cfg = training.cfg
    if run.stage == FINAL and arm.backward:
        pixels = load_image(training.records[0], cfg.INPUT.FORMAT).float()
        image = training.model.transform.normalize(pixels)[None]
        probe = GradientProbe(training.schedule, vit, image, arm.backward, errors)
        training.schedule = probe
    metrics = training.run(test, Path(cfg.OUTPUT_DIR))["bbox"]
    # With the final weights.
    training.schedule(1.0)
    return metrics


def _train_with_detectron2(words: list[str]) -> dict[str, float]:
    from dr2net_d2.d2.engine import run  # Detectron2 may be missing

    single = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": ""}
    asked = {"eval_only": False, "resume": False, **single}
    return run(argparse.Namespace(config_file=str(CONFIG), opts=words, **asked))["bbox"]


class GradientProbe:
    """A schedule that measures the gradient error of a ViT in training, at some of its calls.

    Args:
        schedule: what it hands on.
        vit: in training; it is copied for each measurement.
        image: (1, channels, H, W), normalised.
        backward: of ``gradients.ARMS``.
        errors: gets [progress, alpha, beta, relative error against float64].
    """

    def __init__(
        self,
        schedule: arms.Pairs,
        vit: Dr2NetViT,
        image: Tensor,
        backward: str,
        errors: list[list[float | None]],
    ) -> None:
        self.schedule, self.vit, self.image, self.backward = schedule, vit, image, backward
        self.errors = errors
        self._marks = list(GRADIENT_MARKS)

    def __call__(self, progress: float) -> tuple[float, float]:
        alpha, beta = self.schedule(progress)
        if self._marks and progress >= self._marks[0]:
            self._marks.pop(0)
            vit = copy.deepcopy(self.vit).eval()
            (row,) = measure(vit, self.image, alpha, beta, arms=[self.backward])
            error = row["gradient_error"]
            rounded = None if error is None else float(f"{error:.3g}")
            self.errors.append([round(progress, 4), round(alpha, 4), round(beta, 4), rounded])
        return alpha, beta
