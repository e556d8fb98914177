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
import logging
import sys
from collections.abc import Sequence

from dr2net_d2.commands import Engine, choose_engine, make_parser
from dr2net_d2.errors import run_command


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("train_net.py", __doc__)
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, do not train"
    )
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
        help="GPUs per machine, with one process each; 1 for MODEL.DEVICE cpu",
    )
    several = parser.add_argument_group("several machines (Detectron2 only)")
    several.add_argument("--num-machines", type=int, default=1, metavar="N")
    several.add_argument("--machine-rank", type=int, default=0, metavar="I")
    several.add_argument("--dist-url", default="tcp://127.0.0.1:29500", metavar="URL")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    name = choose_engine(args.engine)
    logging.info("engine: %s (choose with --engine)", name)
    load_engine(name).run(args)


def load_engine(name: str) -> Engine:
    if name == "detectron2":
        from dr2net_d2.d2 import engine as detectron2_engine

        return detectron2_engine
    from dr2net_d2.tv import engine as torchvision_engine

    return torchvision_engine


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("train_net.py", run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
