"""The LazyConfigs that Detectron2 ships."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from detectron2.config import LazyConfig


def zoo_config(path: str) -> Any:
    """What ``model_zoo.get_config`` gives, which needs a setuptools that has pkg_resources.

    Args:
        path: within Detectron2's configs, such as "common/models/mask_rcnn_vitdet.py".
    """
    return LazyConfig.load(str(files("detectron2").joinpath("model_zoo", "configs", path)))
