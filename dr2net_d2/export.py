"""Export the backbone and pyramid of a trained detector, for torch.export or ONNX runtimes.

    python -m dr2net_d2.export --config-file configs/quickstart.yaml --output backbone.onnx \\
        MODEL.WEIGHTS output/quickstart/model_final.pth
    python -m dr2net_d2.export --config-file F --output backbone.pt2 --image-size 800 1344 KEY VALUE

The suffix chooses the format, .pt2 or .onnx; neither file needs this package to run. The network is
exported in evaluation mode, at the coefficients of the weights. Its input "image" is
(1, channels, H, W), of a fixed size, normalised and padded as the detector does it; its outputs are
the levels by name, p2, p3, and so on. The new file is run, and its outputs compared with the
detector's own, before it replaces an older one.
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
"""The largest difference allowed, relative to the largest value of a level."""

Features = dict[str, Tensor]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m dr2net_d2.export", __doc__)
    parser.add_argument("--output", required=True, metavar="FILE", help="a .pt2 or .onnx file")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="in pixels, default: a square of MODEL.VIT.IMG_SIZE",
    )
    return parser.parse_args(argv)


def exportable(network: nn.Module) -> nn.Module:
    """A copy whose attention consists of operators that exporters know."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, Attention):
            module.kernel = "matrix"
    return network


def write_pt2(network: nn.Module, image: Tensor, path: Path) -> Callable[[Tensor], Features]:
    """Write a program of torch.export; returns a function that runs the file."""
    torch.export.save(torch.export.export(network, (image,)), path)
    program: Any = torch.export.load(path).module()
    return program


def write_onnx(
    network: nn.Module, image: Tensor, path: Path
) -> Callable[[Tensor], Features] | None:
    """Write an ONNX file; returns a function that runs it, or None without onnxruntime.

    Raises:
        ConfigError: the packages that write ONNX files are not installed.
    """
    if missing := [name for name in ("onnx", "onnxscript") if not find_spec(name)]:
        raise ConfigError(
            f"ONNX needs {' and '.join(missing)}; install the extra: dr2net_d2[export]"
        )
    for name in ("onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they log every merged node
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


def largest_difference(features: Features, expected: Features) -> float:
    """The largest difference of any level, relative to the level's largest value."""
    return max(
        float((features[name].cpu() - level.cpu()).abs().max() / level.abs().max())
        for name, level in expected.items()
    )


@torch.no_grad()
def export(network: nn.Module, image: Tensor, path: Path) -> float | None:
    """Write a network in the format of the suffix, and check it before it replaces ``path``.

    Args:
        network: image -> {name: level}, in evaluation mode.
        image: (1, C, H, W), of the size to export, on the network's device.
        path: a file with a suffix of ``WRITERS``.

    Returns:
        The largest relative difference of the file's outputs; None if the file cannot be run here.

    Raises:
        FloatingPointError: the difference is beyond ``TOLERANCE``; ``path`` is unchanged.
    """
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        # Under its final name, because an ONNX file of more than 2 GB refers to a file of weights.
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
    """Export the detector that the arguments describe; print how exact it is, log its input.

    Raises:
        UserError: an option, the config or the weights cannot be used, or a package is missing.
        FloatingPointError: see ``export``.
    """
    path = Path(args.output)
    if path.suffix not in WRITERS:
        raise ConfigError(f"--output is {args.output!r}; it must end in {' or '.join(WRITERS)}")
    cfg, engine = open_config(args)
    # TF32 would make float32 less precise on a GPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    backbone: Any = load_model(cfg, engine).backbone
    stride = backbone.size_divisibility
    side = math.ceil(cfg.MODEL.VIT.IMG_SIZE / stride) * stride
    height, width = args.image_size or (side, side)
    if min(height, width) < 1 or height % stride or width % stride:
        raise ConfigError(
            f"--image-size is {height} {width}; both must be multiples of {stride} px, to which "
            "the detector pads images"
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
