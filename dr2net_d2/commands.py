"""Shared by all commands: options, choice of the engine, config and device, reports on disk."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from fvcore.common.config import CfgNode

from dr2net_d2.config import add_dr2net_config, merge_config
from dr2net_d2.errors import ConfigError

logger = logging.getLogger(__name__)

DETECTRON2_INSTALL = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"


class Engine(Protocol):
    """What ``train_net.py`` asks of ``dr2net_d2.d2.engine`` and ``dr2net_d2.tv.engine``."""

    def run(self, args: argparse.Namespace) -> dict[str, Any]:
        """Train and evaluate the detector that a config file describes, or only evaluate it.

        Args:
            args: config_file, opts (config overrides), eval_only, resume, num_gpus (per machine);
                for Detectron2 also num_machines, machine_rank, dist_url.

        Returns:
            Metrics by task, such as {"bbox": {"AP": 41.5}}; empty without a test set.

        Raises:
            UserError: the config, a dataset or the weights cannot be used.
            FloatingPointError: the training has diverged; the last checkpoint is still good.
        """


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for --config-file, --engine and, after all options, config overrides (``opts``)."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument(
        "--engine",
        choices=("auto", "detectron2", "torchvision"),
        default="auto",
        help="auto takes Detectron2 if it is installed, otherwise torchvision",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config overrides, after all options",
    )
    return parser


def choose_engine(name: str) -> str:
    """The engine to use for a value of --engine: "detectron2" or "torchvision".

    Raises:
        ConfigError: Detectron2 was asked for, but is not installed.
    """
    installed = importlib.util.find_spec("detectron2") is not None
    if name == "detectron2" and not installed:
        raise ConfigError(
            f"--engine is detectron2, but Detectron2 is not installed; see {DETECTRON2_INSTALL}, "
            "or use --engine torchvision"
        )
    if name == "auto":
        name = "detectron2" if installed else "torchvision"
    return name


def load_config(config_file: str | None, overrides: Sequence[str], engine: str) -> CfgNode:
    """Merge a config file and overrides into the defaults of an engine.

    Args:
        config_file: path of a YAML file; None leaves the defaults.
        overrides: KEY VALUE pairs as one flat list.
        engine: "detectron2" or "torchvision", see ``choose_engine``.

    Raises:
        ConfigError: the file is a LazyConfig, or ``merge_config`` refuses it or an override.
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
    """The device of that name.

    Args:
        name: "cpu", "cuda" or "cuda:<number>".
        key: what the config calls it; named in errors.

    Raises:
        ConfigError: another name, or this machine lacks the device.
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
    """Create a folder, if need be, and check that <name>.json can be written to it.

    Raises:
        ConfigError: it cannot.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"{name}.json.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output folder {folder!r} cannot be written ({error.strerror}); choose another "
            "with --output"
        ) from error
    return path


def write_report(
    folder: Path, name: str, results: dict[str, Any], draw: Callable[[Path], object]
) -> None:
    """Write <name>.json and <name>.png; ``draw`` is called with the path to draw to."""
    data, picture = folder / f"{name}.json.partial", folder / f"{name}.png.partial"
    data.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    draw(picture)
    for partial_file in (data, picture):
        partial_file.replace(partial_file.with_suffix(""))
    logger.info("wrote %s", folder / f"{name}.{{json,png}}")


def fill_page(page: Path, tables: dict[str, str]) -> None:
    """Replace the text between <!-- name --> and <!-- /name --> in a page by a table.

    Args:
        page: Markdown file with the markers.
        tables: name -> table.

    Raises:
        ConfigError: the page or a marker is missing.
    """
    if not page.is_file():
        raise ConfigError(f"{page} does not exist; give a page with markers")
    text = page.read_text()
    for name, table in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, opened, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ConfigError(f"{page} lacks {start} or {end}; put both where the table belongs")
        text = f"{before}{start}\n{table}\n{end}{after}"
    page.write_text(text)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with right-aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])
