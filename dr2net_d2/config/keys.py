"""The keys that this project adds to a config: one table, by section."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from fvcore.common.config import CfgNode

from dr2net_d2.config.model_keys import MODEL_SECTIONS
from dr2net_d2.config.recipe_keys import RECIPE_SECTIONS
from dr2net_d2.config.table import Section, by_full_name

DR2NET_SECTIONS = (*MODEL_SECTIONS, *RECIPE_SECTIONS)

DR2NET_KEYS = by_full_name(DR2NET_SECTIONS)


def add_dr2net_config(cfg: CfgNode) -> None:
    """Add the keys of this project, with their defaults, to a config of fvcore or Detectron2."""
    add_sections(cfg, DR2NET_SECTIONS)


def add_sections(cfg: CfgNode, sections: Iterable[Section]) -> None:
    """Add keys with their defaults, and the nodes that they need."""
    for section in sections:
        node = cfg
        for name in filter(None, section.name.split(".")):
            if name not in node:
                setattr(node, name, type(cfg)())
            node = node[name]
        for name, key in section.keys.items():
            setattr(node, name, copy.deepcopy(key.default))
