"""Is the gradient right, and what does it cost? For your own config, weights and image.

    python -m dr2net_d2.fidelity --config-file configs/quickstart.yaml
    python -m dr2net_d2.fidelity --config-file F --image-size 512 --image photo.jpg \\
        MODEL.WEIGHTS mae_pretrain_vit_base.pth MODEL.DR2NET.SCHEDULE.END_BETA 0.75

Takes the ViT backbone of the config with MODEL.WEIGHTS (a plain ViT or a whole detector), and
differentiates a random projection of its features at the coefficients of the schedule, in four
ways: exactly reversible, reversible in floating point, with one checkpoint per block, and plain,
storing everything. Each gradient, of all parameters and of the image, is compared with float64's.
Counts the bytes that the forward saves and the peak of forward and backward, both without the
weights and their gradients. Computes in float32 and without drop path. Prints two tables, and
writes fidelity.json and fidelity.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dr2net_d2.commands import (
    choose_engine,
    load_config,
    make_parser,
    markdown_table,
    torch_device,
    writable_folder,
    write_report,
)
from dr2net_d2.config import (
    coefficient_schedule,
    dr2net_arguments,
    require_plain_vit,
    vit_arguments,
)
from dr2net_d2.core import Dr2NetViT
from dr2net_d2.data import read_pixels
from dr2net_d2.errors import ConfigError, config_section, run_command
from dr2net_d2.fidelity.gradients import (
    ARMS,
    Measurement,
    choose_reference,
    format_error,
    measure_all,
    schedule_pairs,
)
from dr2net_d2.fidelity.picture import draw_fidelity
from dr2net_d2.weights import StrictCheckpointer

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m dr2net_d2.fidelity", __doc__)
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="side of the square image, default: MODEL.VIT.IMG_SIZE",
    )
    parser.add_argument(
        "--image", metavar="FILE", help="an image, stretched to the square; default: seeded noise"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder for fidelity.json and .png, default: OUTPUT_DIR"
    )
    return parser.parse_args(argv)


def build_vit(cfg: CfgNode, seed: int) -> Dr2NetViT:
    """The config's ViT on MODEL.DEVICE, with MODEL.WEIGHTS or else random weights from a seed.

    Raises:
        ConfigError: the backbone is not a plain ViT, its sizes do not fit together, or the device
            does not exist.
        WeightsError: the checkpoint is missing, unreadable or of another network.
    """
    require_plain_vit(cfg, "fidelity")
    device = torch_device(cfg.MODEL.DEVICE)
    torch.manual_seed(seed)
    with config_section("MODEL.VIT, MODEL.DR2NET"):
        vit = Dr2NetViT(
            **vit_arguments(cfg),
            **dr2net_arguments(cfg),
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    if cfg.MODEL.WEIGHTS:
        _checkpointer(vit).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    else:
        logger.info("MODEL.WEIGHTS is empty: random initialisation, seed %d", seed)
    # In evaluation mode there is no drop path, whose random masks would add differences.
    return vit.to(device).eval()


def load_image(cfg: CfgNode, side: int, file: str | None, seed: int) -> Tensor:
    """An image for the ViT, (1, channels, side, side), normalised as the config's detector does.

    Args:
        cfg: the config, of which MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, MODEL.VIT.PATCH_SIZE,
            MODEL.DEVICE and INPUT.FORMAT are read.
        side: side of the square, in pixels.
        file: an image of any size, or None for Gaussian noise.
        seed: seed of the noise.

    Raises:
        ConfigError: the side is not a multiple of the patch size, or a file is given and
            INPUT.FORMAT or MODEL.PIXEL_MEAN is not that of a colour image.
        DatasetError: the file cannot be read.
    """
    patch_size, device = cfg.MODEL.VIT.PATCH_SIZE, torch_device(cfg.MODEL.DEVICE)
    if side < 1 or side % patch_size:
        nearest = max(round(side / patch_size), 1) * patch_size
        raise ConfigError(
            f"--image-size is {side} px; it must be a multiple of MODEL.VIT.PATCH_SIZE "
            f"{patch_size}, such as {nearest}"
        )
    mean, std = (torch.tensor(cfg.MODEL[key]) for key in ("PIXEL_MEAN", "PIXEL_STD"))
    if file is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, len(mean), side, side, generator=generator).to(device)
    if cfg.INPUT.FORMAT not in ("BGR", "RGB") or len(mean) != 3:
        raise ConfigError(
            f"--image needs INPUT.FORMAT BGR or RGB and 3 values in MODEL.PIXEL_MEAN; they are "
            f"{cfg.INPUT.FORMAT!r} and {cfg.MODEL.PIXEL_MEAN}; leave --image out for noise"
        )
    pixels = cv2.resize(read_pixels(file), (side, side), interpolation=cv2.INTER_AREA)
    pixels = pixels[..., ::-1] if cfg.INPUT.FORMAT == "RGB" else pixels
    image = (torch.from_numpy(pixels.astype("float32")) - mean) / std
    return image.permute(2, 0, 1)[None].contiguous().to(device)


def format_tables(rows: Sequence[Measurement], reference: str) -> str:
    """Gradient errors, and saved and peak megabytes, as two Markdown tables.

    Args:
        rows: the measurements, one for each of ``ARMS``, in their order, at each pair.
        reference: what the errors are relative to, such as "float64".
    """
    errors, megabytes = [["α", "β", *ARMS]], [["α", "β", *ARMS]]
    for start in range(0, len(rows), len(ARMS)):
        own = rows[start : start + len(ARMS)]
        pair = [f"{own[0]['alpha']:.4g}", f"{own[0]['beta']:.4g}"]
        errors.append([*pair, *(format_error(row["gradient_error"]) for row in own)])
        sizes = [(row["saved_bytes"] / 1e6, row["peak_bytes"] / 1e6) for row in own]
        megabytes.append([*pair, *(f"{saved:.2f} / {peak:.2f}" for saved, peak in sizes)])
    return (
        f"Gradient error, relative to {reference}, everything stored:\n"
        f"{markdown_table(errors)}\n\n"
        "Megabytes saved for the backward / peak of forward and backward:\n"
        f"{markdown_table(megabytes)}"
    )


def surroundings(device: torch.device) -> dict[str, Any]:
    """The device and the versions, on which the figures depend as well."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def run(args: argparse.Namespace) -> None:
    """Measure what the arguments describe, print the tables, write the files.

    Raises:
        UserError: the config, the weights, the image or the output folder cannot be used.
        FloatingPointError: the features are not finite.
    """
    # TF32 would make float32 less precise on a GPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cfg = load_config(args.config_file, args.opts, choose_engine(args.engine))
    seed = max(cfg.SEED, 0)
    side = cfg.MODEL.VIT.IMG_SIZE if args.image_size is None else args.image_size
    # On the grid for every arm, whatever MODEL.DR2NET.ARITHMETIC says: all compute the same.
    pairs = schedule_pairs(coefficient_schedule(cfg, exact=True), cfg.SOLVER.MAX_ITER)
    image = load_image(cfg, side, args.image, seed)
    vit = build_vit(cfg, seed)
    output = writable_folder(args.output or cfg.OUTPUT_DIR, "fidelity")
    try:
        reference = choose_reference(vit, image)
        logger.info("gradients are compared with stored %s", reference.reason)
        rows = measure_all(vit, image, pairs, reference=reference.dtype, seed=seed)
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"--image-size is {side} px: {reason}; choose a smaller one") from None
    results = {
        "setting": {
            "config_file": args.config_file,
            "overrides": args.opts,
            "weights": cfg.MODEL.WEIGHTS or "random initialisation",
            "image": args.image or "noise",
            "image_size": side,
            "seed": seed,
            "reference": reference.name,
            **surroundings(image.device),
        },
        "rows": rows,
    }
    print(format_tables(rows, reference.name))
    title = f"{Path(args.config_file).stem}, {side} px"
    draw = partial(draw_fidelity, {title: rows}, reference.name)
    write_report(output, "fidelity", results, draw)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("dr2net_d2.fidelity", run, parse_arguments(argv))


def _checkpointer(vit: Dr2NetViT) -> StrictCheckpointer:
    """Detectron2's checkpointer if it is installed, as it can fetch from more places."""
    if importlib.util.find_spec("detectron2"):
        from dr2net_d2.d2.checkpointer import Dr2NetCheckpointer

        return Dr2NetCheckpointer(vit)
    return StrictCheckpointer(vit)


if __name__ == "__main__":
    sys.exit(main())
