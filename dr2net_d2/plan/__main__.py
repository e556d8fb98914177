"""Does this training fit my GPU? How large may the images and the batch be? Needs no GPU.

    python -m dr2net_d2.plan --config-file configs/COCO-InstanceSegmentation/mask_rcnn_vitdet_l.yaml
    python -m dr2net_d2.plan --config-file F --budget-gb 16 --image-size 1536 --batch-size 2

Runs one training iteration of the config's whole detector on fake tensors, which have shapes but no
memory, and follows every one of them: with Detectron2's ViT, with and without checkpoints, and with
ours. Checkpoints are one per block; MODEL.DR2NET.LEAN applies with our ViT. Prints what the peak
consists of, the largest square images and the largest batch that fit the budget, and the peak over
the coefficient schedule; writes plan.json and plan.png. A GB is 2^30 bytes, as in the name of a
GPU.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from functools import partial

from fvcore.common.config import CfgNode

from dr2net_d2.commands import (
    choose_engine,
    load_config,
    make_parser,
    writable_folder,
    write_report,
)
from dr2net_d2.errors import ConfigError, run_command
from dr2net_d2.plan.arms import ARMS
from dr2net_d2.plan.comparison import GB, Plan, SchedulePeak, Setting, format_plan, plan_arm
from dr2net_d2.plan.picture import draw_plan
from dr2net_d2.plan.planner import Planner, pairs_of_schedule, training_side

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m dr2net_d2.plan", __doc__)
    parser.add_argument(
        "--budget-gb", type=float, default=24.0, metavar="GB", help="memory of the GPU, default: 24"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="side of the square images; default: that of INPUT.LSJ, of a resized tile, or "
        "MODEL.VIT.IMG_SIZE",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="images on one GPU, default: 1"
    )
    parser.add_argument(
        "--objects", type=int, default=20, metavar="N", help="objects in each image, default: 20"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="N",
        help="TFLOP/s that your GPU sustains: adds the arithmetic of an iteration and its seconds",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder for plan.json and plan.png, default: OUTPUT_DIR"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Plan the training that the arguments describe, print the tables, write the files.

    Raises:
        UserError: the config, a number or the output folder cannot be used.
    """
    for name, value in (("--budget-gb", args.budget_gb), ("--tflops", args.tflops)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} is {value:g}; it must be above 0")
    engine = choose_engine(args.engine)
    cfg = load_config(args.config_file, args.opts, engine)
    if engine == "torchvision":
        from dr2net_d2.config.torchvision import check_config

        check_config(cfg)
    planners = [Planner(cfg, arm, objects=args.objects, engine=engine) for arm in ARMS]
    side = choose_side(args.image_size, cfg, math.lcm(*(planner.stride for planner in planners)))
    output = writable_folder(args.output or cfg.OUTPUT_DIR, "plan")
    batch, budget = args.batch_size, int(args.budget_gb * GB)
    arms = []
    for number, planner in enumerate(planners, 1):
        logger.info("%s, %d of %d", planner.arm, number, len(planners))
        arms.append(plan_arm(planner, side, batch, budget=budget, tflops=args.tflops))
    schedule = plan_schedule(planners[-1], cfg, side, batch)
    setting = Setting(
        config_file=args.config_file,
        overrides=args.opts,
        engine=engine,
        image_size=side,
        tile_size=cfg.INPUT.TILES.SIZE if cfg.INPUT.TILES.ENABLED else None,
        batch_size=batch,
        objects=args.objects,
        budget_gb=args.budget_gb,
        tflops=args.tflops,
    )
    plan = Plan(setting, arms, schedule)
    print(format_plan(plan))
    write_report(output, "plan", plan.as_json(), partial(draw_plan, plan))


def choose_side(given: int | None, cfg: CfgNode, stride: int) -> int:
    """Side of the images to plan for, in pixels: as given, or the training's, padded.

    Raises:
        ConfigError: the detector would pad images of the given side.
    """
    if given is None:
        return math.ceil(training_side(cfg) / stride) * stride
    if given < 1 or given % stride:
        nearest = max(round(given / stride), 1) * stride
        raise ConfigError(
            f"--image-size is {given} px; it must be a multiple of {stride}, to which the detector "
            f"pads images, such as {nearest}"
        )
    return given


def plan_schedule(planner: Planner, cfg: CfgNode, side: int, batch: int) -> list[SchedulePeak]:
    """The peak at each pair of coefficients of the config's schedule; logs a line for each."""
    peaks = []
    pairs = pairs_of_schedule(cfg)
    for number, (alpha, beta) in enumerate(pairs, 1):
        peaks.append(SchedulePeak(alpha, beta, planner.peak(side, batch, (alpha, beta))))
        logger.info("schedule, %d of %d: α %.3f, β %.3f", number, len(pairs), alpha, beta)
    return peaks


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("dr2net_d2.plan", run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
