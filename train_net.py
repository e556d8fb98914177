#!/usr/bin/env python
"""Finetune or evaluate a Dr2Net detector, with Detectron2 or with torchvision.

    python train_net.py --config-file configs/quickstart.yaml
    python train_net.py --config-file configs/quickstart.yaml SOLVER.MAX_ITER 1000
    python train_net.py --config-file configs/quickstart.yaml --resume
    python train_net.py --config-file configs/quickstart.yaml --eval-only \\
        MODEL.WEIGHTS output/quickstart/model_final.pth
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence

from dr2net_d2.errors import ConfigError, UserError

DETECTRON2_INSTALL = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_net.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument(
        "--engine",
        choices=("auto", "detectron2", "torchvision"),
        default="auto",
        help="auto: Detectron2 where it is installed, otherwise torchvision",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in OUTPUT_DIR, if there is one",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="GPUs per machine, one process each; with MODEL.DEVICE cpu leave it at 1",
    )
    several = parser.add_argument_group("several machines (Detectron2 only)")
    several.add_argument("--num-machines", type=int, default=1, metavar="N")
    several.add_argument("--machine-rank", type=int, default=0, metavar="I")
    several.add_argument("--dist-url", default="tcp://127.0.0.1:29500", metavar="URL")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end"
    )
    return parser.parse_args(argv)


def choose_engine(name: str) -> str:
    """The engine to use: "detectron2" or "torchvision"."""
    installed = importlib.util.find_spec("detectron2") is not None
    if name == "detectron2" and not installed:
        raise ConfigError(
            f"--engine detectron2, but Detectron2 is not installed; see {DETECTRON2_INSTALL}, or "
            "use --engine torchvision"
        )
    if name == "auto":
        name = "detectron2" if installed else "torchvision"
    return name


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    try:
        engine = choose_engine(args.engine)
        logging.info("engine: %s (choose with --engine)", engine)
        if engine == "detectron2":
            from dr2net_d2.d2.engine import run
        else:
            from dr2net_d2.tv.engine import run
        run(args)
    except UserError as error:
        # One that was raised in a data loader's worker has its traceback in front.
        print(f"train_net.py: error: {str(error).splitlines()[-1]}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train_net.py: training diverged: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
