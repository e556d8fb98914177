"""What the commands have in common: options, the engine, the config, reports on disk."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from dr2net_d2.config import add_dr2net_config, merge_config
from dr2net_d2.errors import ConfigError

logger = logging.getLogger(__name__)

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
        from dr2net_d2.config.torchvision import get_cfg

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


def writable_folder(folder: str, name: str) -> Path:
    """The folder, made if need be, after a look whether <name>.json could be written to it.

    Raises:
        ConfigError: it could not.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"{name}.json.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output folder {folder!r} cannot be written ({error.strerror}); choose another by "
            "--output"
        ) from error
    return path


def write_report(
    folder: Path, name: str, results: dict[str, Any], draw: Callable[[Path], object]
) -> None:
    """Write <name>.json, and <name>.png by ``draw``, which gets the path to draw to."""
    data, picture = folder / f"{name}.json.partial", folder / f"{name}.png.partial"
    data.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    draw(picture)
    for partial_file in (data, picture):
        partial_file.replace(partial_file.with_suffix(""))
    logger.info("wrote %s", folder / f"{name}.{{json,png}}")


def fill_page(page: Path, tables: dict[str, str]) -> None:
    """Replace what stands between <!-- name --> and <!-- /name --> in a page.

    Raises:
        ConfigError: no such page, or it has no such pair.
    """
    if not page.is_file():
        raise ConfigError(f"{page} does not exist; give a page with markers")
    text = page.read_text()
    for name, table in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ConfigError(f"{page} lacks {start} or {end}; put both where the table is to be")
        text = f"{before}{start}\n{table}\n{end}{after}"
    page.write_text(text)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as a Markdown table with right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])
