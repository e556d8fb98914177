"""Export the backbone and pyramid of a trained detector, for torch.export or ONNX runtimes.

    python -m dr2net_d2.export --config-file configs/quickstart.yaml --output backbone.onnx \\
        MODEL.WEIGHTS output/quickstart/model_final.pth
    python -m dr2net_d2.export --config-file F --output backbone.pt2 --image-size 800 1344 KEY VALUE

The suffix chooses the format: .pt2 or .onnx. The network is that of evaluation, at the coefficients
that the weights have; neither file needs this package. Its input "image" is (1, channels, H, W),
normalised and padded as the detector does it, at one fixed size; its outputs are the levels by
name, p2, p3, and so on. The file replaces another only after it was run and its outputs were
compared with the detector's own.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dr2net_d2.commands import make_parser, writable_folder
from dr2net_d2.core.attention import Attention
from dr2net_d2.errors import ConfigError, run_command
from dr2net_d2.inference import load_model, open_config

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Of the largest difference, relative to the largest value of a level."""

Features = dict[str, Tensor]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m dr2net_d2.export", __doc__)
    parser.add_argument("--output", required=True, metavar="FILE", help="ends in .pt2 or .onnx")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="px; a square of MODEL.VIT.IMG_SIZE unless given",
    )
    return parser.parse_args(argv)


def exportable(network: nn.Module) -> nn.Module:
    """A copy with attention in operators that exporters know, instead of our own functions."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, Attention):
            module.kernel = "matrix"
    return network


def write_pt2(network: nn.Module, image: Tensor, path: Path) -> Callable[[Tensor], Features]:
    """Write a program of torch.export; returns what runs the file."""
    torch.export.save(torch.export.export(network, (image,)), path)
    program: Any = torch.export.load(path).module()
    return program


def write_onnx(
    network: nn.Module, image: Tensor, path: Path
) -> Callable[[Tensor], Features] | None:
    """Write an ONNX file; returns what runs it, None without onnxruntime.

    Raises:
        ConfigError: the packages that write it are not installed.
    """
    if missing := [name for name in ("onnx", "onnxscript") if not find_spec(name)]:
        raise ConfigError(
            f"ONNX needs {' and '.join(missing)}; install the extra: dr2net_d2[export]"
        )
    for name in ("onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line for every node they merge
    names = list(network(image))
    program: Any = torch.onnx.export(
        network,
        (image,),
        dynamo=True,
        input_names=["image"],
        output_names=names,
        verbose=False,
    )
    program.save(path)
    if not find_spec("onnxruntime"):
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Features:
        outputs = session.run(names, {"image": image.numpy(force=True)})
        return {name: torch.from_numpy(x) for name, x in zip(names, outputs, strict=True)}

    return run


WRITERS = {".pt2": write_pt2, ".onnx": write_onnx}


def largest_difference(found: Features, expected: Features) -> float:
    """Between levels of the same names, relative to the largest value of each."""
    return max(
        float((found[name].cpu() - level.cpu()).abs().max() / level.abs().max())
        for name, level in expected.items()
    )


@torch.no_grad()
def export(network: nn.Module, image: Tensor, path: Path) -> float | None:
    """Write a network in the format of the suffix, checked before it takes the place of ``path``.

    Args:
        network: in evaluation mode; image -> {name: level}.
        image: (1, C, H, W), on the network's device; the size that is exported.
        path: ends in a suffix of ``WRITERS``.

    Returns:
        The largest relative difference of the file's outputs; None if nothing here can run it.

    Raises:
        FloatingPointError: it is beyond ``TOLERANCE``; ``path`` is as it was.
    """
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        # Under its own name, as an ONNX file of more than 2 GB names a second one with the weights.
        run = WRITERS[path.suffix](exportable(network), image, Path(folder, path.name))
        difference = None
        if run is not None:
            difference = largest_difference(run(image), network(image))
            if not difference < TOLERANCE:
                raise FloatingPointError(
                    f"the exported network's outputs are {difference:.1e} off, relative to the "
                    f"largest; {TOLERANCE:g} is allowed, and {path} has not been written"
                )
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    return difference


def run(args: argparse.Namespace) -> None:
    """Export what the arguments describe, say how exact it is and what it takes.

    Raises:
        UserError: an option, the config or the weights cannot be used, a package is missing.
        FloatingPointError: see ``export``.
    """
    path = Path(args.output)
    if path.suffix not in WRITERS:
        raise ConfigError(f"--output is {args.output!r}; it must end in {' or '.join(WRITERS)}")
    cfg, engine = open_config(args)
    # "float32" is to mean that on a GPU's tensor cores too.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    backbone: Any = load_model(cfg, engine).backbone
    stride = backbone.size_divisibility
    side = math.ceil(cfg.MODEL.VIT.IMG_SIZE / stride) * stride
    height, width = args.image_size or (side, side)
    if min(height, width) < 1 or height % stride or width % stride:
        raise ConfigError(
            f"--image-size is {height} {width}; both must be multiples of {stride} px, as those of "
            "padded images are"
        )
    image = torch.randn(1, len(cfg.MODEL.PIXEL_MEAN), height, width, device=cfg.MODEL.DEVICE)
    writable_folder(str(path.parent), path.stem)
    difference = export(backbone, image, path)
    if difference is None:
        logger.warning("%s was not checked: onnxruntime is not installed", path)
    else:
        print(f"largest difference to the detector's own features, relative: {difference:.1e}")
    logger.info(
        "wrote %s: image (1, %d, %d, %d), %s order, (pixel - %s) / %s; at the right and the "
        "bottom padded with zeros",
        path,
        image.shape[1],
        height,
        width,
        cfg.INPUT.FORMAT,
        cfg.MODEL.PIXEL_MEAN,
        cfg.MODEL.PIXEL_STD,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("dr2net_d2.export", run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
