"""The LazyConfigs that are installed with Detectron2."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from detectron2.config import LazyConfig


def zoo_config(path: str) -> Any:
    """Like ``model_zoo.get_config``, but without pkg_resources, which new setuptools lack.

    Args:
        path: path within Detectron2's configs, such as "common/models/mask_rcnn_vitdet.py".
    """
    return LazyConfig.load(str(files("detectron2").joinpath("model_zoo", "configs", path)))
