"""A trained detector of either engine, for the commands that use one."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from fvcore.common.config import CfgNode
from torch import nn

from dr2net_d2.checkpointer import StrictCheckpointer
from dr2net_d2.commands import choose_engine, load_config, torch_device
from dr2net_d2.errors import ConfigError, DatasetError

ENGINES = {"detectron2": "dr2net_d2.d2.inference", "torchvision": "dr2net_d2.tv.inference"}
"""Engine -> its module with ``load_detector`` and a ``Predictor``."""


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector finds in one image of H x W px.

    Attributes:
        boxes: ``(n, 4)`` float32, XYXY in px of the image.
        scores: ``(n,)`` float32, in [0, 1].
        labels: ``(n,)`` int64, category indices from 0.
        masks: ``(n, H, W)`` bool, or None from a detector without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None


class Predictor(Protocol):
    """A trained detector of one of the engines, for single images.

    Attributes:
        class_names: of the categories; their numbers where no dataset tells their names.
    """

    class_names: Sequence[str]

    def detect(self, image: np.ndarray) -> Detections:
        """Find objects in (H, W, 3) uint8, BGR, of any size."""


def open_config(args: argparse.Namespace) -> tuple[CfgNode, Any]:
    """The config of a command, checked, and the module of its engine in ``ENGINES``.

    Raises:
        ConfigError: the config cannot be used, or names no weights or no device to use.
    """
    engine = choose_engine(args.engine)
    cfg = load_config(args.config_file, args.opts, engine)
    if engine == "torchvision":
        from dr2net_d2.tv.config import check_config

        check_config(cfg)
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError(
            "MODEL.WEIGHTS is empty; add the weights of a trained detector to the command line, "
            "such as MODEL.WEIGHTS output/quickstart/model_final.pth"
        )
    torch_device(cfg.MODEL.DEVICE)
    return cfg, importlib.import_module(ENGINES[engine])


def load_weights(
    checkpointer: type[StrictCheckpointer], model: nn.Module, weights: str
) -> nn.Module:
    """A detector with all of its weights, in evaluation mode.

    Raises:
        WeightsError: they are missing, unreadable, or not of the whole detector.
    """
    checkpointer(model, plain_vit=False).load(weights, checkpointables=[])
    return model.eval()


def category_names(
    cfg: CfgNode, count: int, look_up: Callable[[str], Sequence[str]]
) -> tuple[str, ...]:
    """Names of a detector's categories, from the first dataset of the config that tells as many.

    Args:
        cfg: DATASETS.TEST and TRAIN are read.
        count: of the categories; they are called "0", "1", ... if no dataset is at hand.
        look_up: dataset -> its names; raises DatasetError where it cannot.
    """
    for dataset in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        with suppress(DatasetError):
            if len(names := look_up(dataset)) == count:
                return tuple(names)
    return tuple(map(str, range(count)))
