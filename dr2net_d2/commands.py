"""What the commands have in common: options, the engine, the config, errors in one line."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence

import torch
from fvcore.common.config import CfgNode

from dr2net_d2.config import add_dr2net_config, merge_config
from dr2net_d2.errors import ConfigError, UserError

DETECTRON2_INSTALL = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with --config-file, --engine and, after all options, config overrides (``opts``)."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument(
        "--engine",
        choices=("auto", "detectron2", "torchvision"),
        default="auto",
        help="auto: Detectron2 where it is installed, otherwise torchvision",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end"
    )
    return parser


def choose_engine(name: str) -> str:
    """The engine that --engine means: "detectron2" or "torchvision".

    Raises:
        ConfigError: Detectron2 was asked for and is not installed.
    """
    installed = importlib.util.find_spec("detectron2") is not None
    if name == "detectron2" and not installed:
        raise ConfigError(
            f"--engine detectron2, but Detectron2 is not installed; see {DETECTRON2_INSTALL}, or "
            "use --engine torchvision"
        )
    if name == "auto":
        name = "detectron2" if installed else "torchvision"
    return name


def load_config(config_file: str | None, overrides: Sequence[str], engine: str) -> CfgNode:
    """A config file and overrides on the defaults of an engine.

    Args:
        config_file: YAML; None for the defaults alone.
        overrides: KEY VALUE words.
        engine: as ``choose_engine`` gives it.

    Raises:
        ConfigError: a LazyConfig; see also ``merge_config``.
    """
    if config_file is not None and config_file.endswith(".py"):
        raise ConfigError(
            f"{config_file} is a LazyConfig, which only train_net.py with Detectron2 takes; give a "
            "YAML file"
        )
    if engine == "torchvision":
        from dr2net_d2.tv.config import get_cfg

        cfg = get_cfg()
    else:
        from detectron2.config import get_cfg as get_detectron2_cfg

        cfg = get_detectron2_cfg()
        add_dr2net_config(cfg)
    merge_config(cfg, config_file, overrides)
    return cfg


def torch_device(name: str, key: str = "MODEL.DEVICE") -> torch.device:
    """The device that a key of the config means.

    Raises:
        ConfigError: it is none of "cpu", "cuda", "cuda:<number>", or not to be had here.
    """
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda")
        torch.empty(0, device=device if known else None)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{key} is {name!r}, which torch cannot use here ({str(error).splitlines()[0]}); set "
            f"{key} to cpu, or name a device that exists"
        ) from error
    if not known:
        raise ConfigError(f"{key} is {name!r}; use 'cpu', 'cuda' or 'cuda:<number>'")
    return device


def run_command(
    prog: str, run: Callable[[argparse.Namespace], object], args: argparse.Namespace
) -> int:
    """Run a command with its log on stderr.

    Returns:
        The exit code: 2 for a mistake of the user's, 1 where a number is not finite; the error is
        one line on stderr.
    """
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    try:
        run(args)
    except (UserError, FloatingPointError) as error:
        # One that was raised in a data loader's worker has its traceback in front.
        print(f"{prog}: error: {str(error).splitlines()[-1]}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0
