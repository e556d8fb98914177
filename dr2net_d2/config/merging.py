"""Merge config files and overrides into a config; read values by full name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from dr2net_d2.errors import ConfigError


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of a key by its full name, such as "MODEL.VIT.DEPTH"."""
    return reduce(getattr, key.split("."), cfg)


def merge_config(cfg: CfgNode, config_file: str | None, overrides: Sequence[str]) -> None:
    """Merge a YAML file, if there is one, and then overrides into ``cfg``.

    Args:
        cfg: the defaults; changed in place.
        config_file: path of a YAML file, which may name another as ``_BASE_``.
        overrides: KEY VALUE pairs as one flat list.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type,
            or SEED is too large for NumPy.
    """
    if config_file is not None and not Path(config_file).is_file():
        raise ConfigError(f"config file {config_file!r} does not exist; see configs/ for some")
    if len(overrides) % 2:
        raise ConfigError(
            f"overrides come as KEY VALUE pairs, but {list(overrides)} has {len(overrides)} words"
        )
    try:
        if config_file is not None:
            # The default, True, lets a YAML file run code.
            cfg.merge_from_file(config_file, allow_unsafe=False)
    except (KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {config_file}: {_one_line(error)}") from error
    try:
        cfg.merge_from_list(list(overrides))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"command line: {_one_line(error)}") from error
    if cfg.SEED >= 2**32:
        raise ConfigError(f"SEED is {cfg.SEED}; it must be below 2^32, or negative to draw one")


def _one_line(error: Exception) -> str:
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split())
