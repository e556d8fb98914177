"""Does this training fit my GPU? How large may the images and the batch be? Without a GPU.

    python -m dr2net_d2.plan --config-file configs/COCO-InstanceSegmentation/mask_rcnn_vitdet_l.yaml
    python -m dr2net_d2.plan --config-file F --budget-gb 16 --image-size 1536 --batch-size 2

It goes through one training iteration of the config's whole detector on fake tensors, which have
shapes and no memory, and follows every one of them: for the ViT of Detectron2, with and without
checkpoints, and for ours. A checkpoint is one per block; our ViT comes with MODEL.DR2NET.LEAN.
Prints what the peak consists of, the largest square images and the largest batch that fit the
budget, and the peak over the coefficient schedule; writes plan.json and plan.png. A GB is 2^30
bytes, as in the name of a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from dr2net_d2.commands import (
    choose_engine,
    load_config,
    make_parser,
    markdown_table,
    writable_folder,
    write_report,
)
from dr2net_d2.errors import ConfigError, run_command
from dr2net_d2.plan.picture import draw_plan
from dr2net_d2.plan.planner import (
    ARMS,
    ASSUMED,
    NOT_INCLUDED,
    PARTS,
    Planner,
    largest_fitting,
    pairs_of_schedule,
    training_side,
)

logger = logging.getLogger(__name__)

GB = 2**30
LONGEST_SIDE = 8192
LARGEST_BATCH = 64


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m dr2net_d2.plan", __doc__)
    parser.add_argument("--budget-gb", type=float, default=24.0, metavar="GB", help="default: 24")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="side of the square images; unless given, INPUT.LSJ's, a resized tile's, or "
        "MODEL.VIT.IMG_SIZE",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="images on one GPU, default: 1"
    )
    parser.add_argument(
        "--objects", type=int, default=20, metavar="N", help="in every image, default: 20"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="N",
        help="TFLOP/s that your GPU sustains: adds the arithmetic of an iteration and its seconds",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="for plan.json and plan.png; OUTPUT_DIR unless given"
    )
    return parser.parse_args(argv)


def plan_arm(planner: Planner, side: int, batch: int, budget: int) -> dict[str, Any]:
    """The prediction for an arm, and the largest images and batch that fit; logs each look.

    Args:
        planner: of the arm.
        side: px.
        batch: images.
        budget: bytes.

    Returns:
        The fields of ``Prediction``, largest_side (px, at the batch), largest_batch (at the side);
        0 where nothing fits.
    """
    prediction = planner.predict(side, batch)
    seen = {(side, batch): prediction.peak}

    def peak(side: int, batch: int) -> int:
        if (side, batch) not in seen:
            seen[side, batch] = planner.peak(side, batch)
        _log_look(planner.arm, side, batch, seen[side, batch])
        return seen[side, batch]

    step = planner.side_step
    steps = largest_fitting(
        lambda n: peak(n * step, batch), budget, LONGEST_SIDE // step, 2, max(side // step, 1)
    )
    images = largest_fitting(lambda n: peak(side, n), budget, LARGEST_BATCH, known=batch)
    found = {"largest_side": steps * step, "largest_batch": images}
    return dataclasses.asdict(prediction) | found


def time_of_iteration(planner: Planner, side: int, batch: int, tflops: float) -> dict[str, Any]:
    """Its "tflop" and the "seconds" that ``tflops`` TFLOP/s take for them."""
    logger.info("%s: counting the arithmetic", planner.arm)
    tflop = batch * planner.flops(side) / 1e12
    return {"tflop": tflop, "seconds": tflop / tflops}


def format_tables(results: dict[str, Any]) -> str:
    """What the peaks consist of, what fits, and the peak over the schedule, as Markdown."""
    setting, arms = results["setting"], results["arms"]
    side, batch, budget = (setting[key] for key in ("image_size", "batch_size", "budget_gb"))
    peaks = [["GB", *ARMS]]
    for name in PARTS:
        peaks.append([name, *(_gb(row["parts"][name]) for row in arms)])
    peaks.append(["peak", *(_gb(row["peak"]) for row in arms)])
    peaks.append(["saved for backward", *(_gb(row["saved"]) for row in arms)])
    fitting = [["", *ARMS]]
    for name, key, most in (
        (f"largest side at batch {batch}, px", "largest_side", LONGEST_SIDE),
        (f"largest batch at {side} px", "largest_batch", LARGEST_BATCH),
    ):
        fitting.append([name, *(_largest(row[key], most) for row in arms)])
    if setting["tflops"] is not None:
        for name, key in (
            ("TFLOP an iteration", "tflop"),
            (f"s an iteration at {setting['tflops']:g} TFLOP/s", "seconds"),
        ):
            fitting.append([name, *(f"{row[key]:.3g}" for row in arms)])
    schedule = [["α", "β", "peak, GB"]]
    for row in results["schedule"]:
        schedule.append([f"{row['alpha']:.4g}", f"{row['beta']:.4g}", _gb(row["peak"])])
    return _of_tiles(setting, arms[-1]) + (
        f"Peak of an iteration, {side} x {side} px, batch {batch}, {setting['objects']} objects "
        f"an image, and its parts at that moment:\n{markdown_table(peaks)}\n\n"
        f"What fits {budget:g} GB{_and_time(setting)}:\n{markdown_table(fitting)}\n\n"
        f"dr2net over the schedule:\n{markdown_table(schedule)}\n\n"
        f"Assumed: {ASSUMED}.\nNot included: {NOT_INCLUDED}."
    )


def _and_time(setting: dict[str, Any]) -> str:
    if setting["tflops"] is None:
        return ""
    return ", and the time of an iteration's products, without memory traffic and data"


def _of_tiles(setting: dict[str, Any], arm: dict[str, Any]) -> str:
    """What the training input is, and whether whole images would do, if it is tiles."""
    if setting["tile_size"] is None:
        return ""
    return (
        f"INPUT.TILES cuts images into {setting['tile_size']} px tiles, which come into the network"
        f" with {setting['image_size']} px. Of whole images, dr2net fits "
        f"{_largest(arm['largest_side'], LONGEST_SIDE)} px into {setting['budget_gb']:g} GB.\n\n"
    )


def run(args: argparse.Namespace) -> None:
    """Predict what the arguments describe, print the tables, write the files.

    Raises:
        UserError: the config, a number or the output folder cannot be used.
    """
    if not args.budget_gb > 0:
        raise ConfigError(f"--budget-gb is {args.budget_gb:g}; it must be above 0")
    if args.tflops is not None and not args.tflops > 0:
        raise ConfigError(f"--tflops is {args.tflops:g}; it must be above 0")
    engine = choose_engine(args.engine)
    cfg = load_config(args.config_file, args.opts, engine)
    if engine == "torchvision":
        from dr2net_d2.config.torchvision import check_config

        check_config(cfg)
    side = args.image_size
    if side is None:
        side = training_side(cfg)
    batch, budget = args.batch_size, int(args.budget_gb * GB)
    rows: list[dict[str, Any]] = []
    for number, arm in enumerate(ARMS, 1):
        planner = Planner(cfg, arm, args.objects, engine)
        if args.image_size is None:
            side = math.ceil(side / planner.stride) * planner.stride
        if side < 1 or side % planner.stride:
            nearest = max(round(side / planner.stride), 1) * planner.stride
            raise ConfigError(
                f"--image-size is {side} px; it must be a multiple of {planner.stride}, which "
                f"images are padded to, such as {nearest}"
            )
        if arm == ARMS[0]:
            output = writable_folder(args.output or cfg.OUTPUT_DIR, "plan")
        logger.info("%s, %d of %d", arm, number, len(ARMS))
        rows.append(plan_arm(planner, side, batch, budget))
        if args.tflops is not None:
            rows[-1] |= time_of_iteration(planner, side, batch, args.tflops)
    schedule = []
    pairs = pairs_of_schedule(cfg)
    for number, (alpha, beta) in enumerate(pairs, 1):
        peak = planner.peak(side, batch, (alpha, beta))
        logger.info("schedule, %d of %d: α %.3f, β %.3f", number, len(pairs), alpha, beta)
        schedule.append({"alpha": alpha, "beta": beta, "peak": peak})
    results = {
        "setting": {
            "config_file": args.config_file,
            "overrides": args.opts,
            "engine": engine,
            "image_size": side,
            "tile_size": cfg.INPUT.TILES.SIZE if cfg.INPUT.TILES.ENABLED else None,
            "batch_size": batch,
            "objects": args.objects,
            "budget_gb": args.budget_gb,
            "tflops": args.tflops,
            "torch": torch.__version__,
            "assumed": ASSUMED,
            "not_included": NOT_INCLUDED,
        },
        "arms": rows,
        "schedule": schedule,
    }
    print(format_tables(results))
    write_report(output, "plan", results, partial(draw_plan, results))


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("dr2net_d2.plan", run, parse_arguments(argv))


def _log_look(arm: str, side: int, batch: int, peak: int) -> None:
    logger.info("%s: %d px, batch %d: %s GB", arm, side, batch, _gb(peak))


def _gb(size: int) -> str:
    return f"{size / GB:.3f}"


def _largest(found: int, most: int) -> str:
    return "none" if not found else f"{found} or more" if found == most else str(found)


if __name__ == "__main__":
    sys.exit(main())
