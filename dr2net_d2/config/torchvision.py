"""Config of the torchvision engine: Detectron2's keys and ours, and which values it can honour."""

from __future__ import annotations

import logging
from typing import Any

from fvcore.common.config import CfgNode

from dr2net_d2.config.detection import build_slicing
from dr2net_d2.config.detectron2_keys import HONOURED, HONOURED_SECTIONS
from dr2net_d2.config.detectron2_only_keys import DETECTRON2_ONLY, DETECTRON2_ONLY_SECTIONS
from dr2net_d2.config.keys import DR2NET_KEYS, add_dr2net_config, add_sections
from dr2net_d2.config.merging import value_of
from dr2net_d2.config.table import check_value_for_torchvision
from dr2net_d2.config.training import check_jittering, training_tiles
from dr2net_d2.errors import ConfigError

logger = logging.getLogger(__name__)


def get_cfg() -> CfgNode:
    """The default config: Detectron2's keys and ours; those only Detectron2 reads are None."""
    cfg = CfgNode()
    add_sections(cfg, HONOURED_SECTIONS)
    add_dr2net_config(cfg)
    add_sections(cfg, DETECTRON2_ONLY_SECTIONS)
    return cfg


def check_config(cfg: CfgNode) -> None:
    """Refuse what this engine cannot do, and remove the keys that only Detectron2 reads.

    Raises:
        ConfigError: names the key, its value, what is allowed and what to do.
    """
    for name, key in DETECTRON2_ONLY.items():
        value = _remove(cfg, name)
        if value is not None:
            check_value_for_torchvision(name, value, key)
            logger.info("%s says what this engine does anyway; only Detectron2 reads it", name)
    for name, key in (HONOURED | DR2NET_KEYS).items():
        if _is_enabled(cfg, name):
            check_value_for_torchvision(name, value_of(cfg, name), key)
    if not cfg.SOLVER.BASE_LR_END <= cfg.SOLVER.BASE_LR:
        raise ConfigError(
            f"SOLVER.BASE_LR_END is {cfg.SOLVER.BASE_LR_END}, above SOLVER.BASE_LR "
            f"{cfg.SOLVER.BASE_LR}; lower it, or raise the other"
        )
    if cfg.INPUT.LSJ.ENABLED:
        check_jittering(cfg.INPUT.LSJ)
    training_tiles(cfg)
    build_slicing(cfg)
    _check_square(cfg)


def _is_enabled(cfg: CfgNode, name: str) -> bool:
    """Whether the key is read; the keys next to an ENABLED that is False are not."""
    section, _, _ = name.rpartition(".")
    return not section or value_of(cfg, section).get("ENABLED", True)


def _check_square(cfg: CfgNode) -> None:
    side = cfg.MODEL.VIT.SQUARE_PAD
    for phase in ("TRAIN", "TEST"):
        longest = cfg.INPUT[f"MAX_SIZE_{phase}"]
        if side and longest > side:
            raise ConfigError(
                f"INPUT.MAX_SIZE_{phase} is {longest} px, MODEL.VIT.SQUARE_PAD only {side} px; "
                "lower it, or pad to a larger square (0: only as far as the strides need)"
            )


def _remove(cfg: CfgNode, name: str) -> Any:
    """Remove a key, with the sections that it leaves empty; returns its value."""
    first, _, rest = name.partition(".")
    if not rest:
        return cfg.pop(first)
    value = _remove(cfg[first], rest)
    if not cfg[first]:
        del cfg[first]
    return value
