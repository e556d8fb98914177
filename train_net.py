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

from dr2net_d2.commands import choose_engine, make_parser
from dr2net_d2.errors import run_command


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("train_net.py", __doc__)
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
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    engine = choose_engine(args.engine)
    logging.info("engine: %s (choose with --engine)", engine)
    if engine == "detectron2":
        from dr2net_d2.d2.engine import run as run_engine
    else:
        from dr2net_d2.tv.engine import run as run_engine
    run_engine(args)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("train_net.py", run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
