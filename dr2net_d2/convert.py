"""Convert pretrained or trained weights to Detectron2's keys, with a report on every key.

    python -m dr2net_d2.convert dinov2_vitb14_pretrain.pth vit.safetensors
    python -m dr2net_d2.convert dinov2_vitb14_pretrain.pth vit.pth MODEL.VIT.PATCH_SIZE 16 \\
        MODEL.VIT.PRETRAIN_IMG_SIZE 592
    python -m dr2net_d2.convert output/model_final.pth detector.pkl

IN is a plain ViT (MAE, timm, DeiT, DINOv2, the image encoder of SAM, Detectron2) or a detector of
this project. OUT ends with .pth, .pkl (as in Detectron2's model zoo) or .safetensors; an older OUT
is replaced once the new one is complete.

A plain ViT gets Detectron2's keys, with LayerScale folded in, and its MODEL.VIT section is printed.
With --config-file it is fitted to the ViT of that config: its position tables and patch embedding
are resized. KEY VALUE overrides single keys, of the config or of the section read from the weights.

A detector loses its optimizer and the rest of the training's state; its heads keep the names of the
engine that trained them. Coefficients (alpha, beta) other than (1, 0) stay in the file; at (1, 0)
Detectron2's own ViT loads the weights, strictly.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dr2net_d2.commands import choose_engine, load_config
from dr2net_d2.config import vit_arguments
from dr2net_d2.core import Dr2NetViT
from dr2net_d2.errors import WeightsError, config_section, run_command, weights_being_read
from dr2net_d2.weights import (
    COEFFICIENTS,
    WRITERS,
    CheckpointReport,
    check_output,
    convert_vit_checkpoint,
    describe_vit,
    find_plain_vit,
    fit_checkpoint,
    locate_weights,
    matches,
    read_checkpoint,
    redundant_scalars,
    write_weights,
)

logger = logging.getLogger(__name__)

DETECTOR = ("*backbone.simfp_*", "*proposal_generator.*", "*roi_heads.*")
"""Keys that our detectors have besides those of their ViT."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dr2net_d2.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", metavar="IN", help="a file, or a name as in MODEL.WEIGHTS")
    parser.add_argument("output", metavar="OUT", help=f"a file ending with {', '.join(WRITERS)}")
    parser.add_argument("--config-file", metavar="FILE", help="YAML; fit OUT to its ViT")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keys that may be missing, unexpected or of another shape; may be repeated",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser.parse_intermixed_args(argv)


def convert(
    state: dict[str, Tensor],
    config_file: str | None,
    overrides: Sequence[str],
    allow: Sequence[str],
) -> tuple[dict[str, Tensor], CheckpointReport, dict[str, Any]]:
    """Convert weights to Detectron2's keys.

    Args:
        state: name -> tensor, of a plain ViT or a detector.
        config_file: the config to fit the ViT to; None for one that is read from the weights.
        overrides: KEY VALUE words for the config.
        allow: patterns of keys that need not fit.

    Returns:
        The converted weights, the report, and the section MODEL.VIT of the config that they fit.

    Raises:
        UserError: the weights or the config cannot be used.
    """
    redundant = redundant_scalars(state)
    state = {key: tensor for key, tensor in state.items() if key not in redundant}
    with weights_being_read():
        plain = find_plain_vit(state)
    if config_file is None:
        overrides = [*_vit_overrides(plain.state), *overrides]
    cfg = load_config(config_file, overrides, choose_engine("auto"))
    with torch.device("meta"), config_section("MODEL.VIT"):
        vit = Dr2NetViT(**vit_arguments(cfg))
    allow = [*cfg.MODEL.DR2NET.ALLOW_PARTIAL, *allow]

    rest: dict[str, Tensor] = {}
    prefix = ""
    if any(matches(key, DETECTOR) for key in state):
        prefix = plain.prefix.removeprefix("module.")
        rest = {key: state.pop(key) for key in list(state) if not key.startswith(plain.prefix)}
    converted, report = fit_checkpoint(convert_vit_checkpoint, state, vit, allow)
    report.loaded += rest
    report.dropped |= redundant
    weights = {f"{prefix}{name}": tensor for name, tensor in converted.items()}
    weights |= {key.removeprefix("module."): tensor for key, tensor in rest.items()}
    names = [name.upper() for name in describe_vit(vit.state_dict()) if name != "in_chans"]
    return weights, report, {name: cfg.MODEL.VIT[name] for name in names}


def _vit_overrides(state: dict[str, Tensor]) -> list[str]:
    """KEY VALUE words for the section MODEL.VIT of the network that the weights come from."""
    # Without relative positions the weights do not tell which blocks have windows: any would fit.
    values = {"window_block_indexes": [], **describe_vit(state)}
    del values["in_chans"]
    words = [(f"MODEL.VIT.{name.upper()}", str(value)) for name, value in values.items()]
    return [word for pair in words for word in pair]


def run(args: argparse.Namespace) -> None:
    """Convert the file that the arguments name, print the report and the keys, write the output.

    Raises:
        UserError: a file or the config cannot be used; OUT is unchanged.
    """
    source = locate_weights(args.weights)
    if not Path(source).is_file():
        raise WeightsError(f"IN is {args.weights!r}; give the path of a downloaded file")
    check_output(args.output)
    if Path(args.output).resolve() == Path(source).resolve():
        raise WeightsError(f"IN and OUT are both {args.output!r}; choose another OUT")
    state = read_checkpoint(source)["model"]
    weights, report, keys = convert(state, args.config_file, args.opts, args.allow)
    write_weights(weights, args.output)
    print("\n".join(report.lines()))
    print("\n".join(["MODEL:", "  VIT:", *(f"    {key}: {value}" for key, value in keys.items())]))
    if args.config_file is None and not keys["USE_REL_POS"]:
        logger.info("NUM_HEADS is the usual number for this width; weights do not tell it")
    if coupled := [key for key in weights if matches(key, COEFFICIENTS)]:
        logger.warning(
            "%s: Detectron2's own ViT would not give the same; load it into build_dr2net_*",
            ", ".join(f"{key} is {weights[key].tolist()}" for key in coupled),
        )
    logger.info("wrote %s", args.output)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("dr2net_d2.convert", run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
