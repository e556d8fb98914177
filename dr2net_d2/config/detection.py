"""What the keys of a detector, its categories and its evaluation mean."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from fvcore.common.config import CfgNode

from dr2net_d2.config.merging import value_of
from dr2net_d2.data.tiling import Grid
from dr2net_d2.errors import ConfigError, DatasetError, config_section
from dr2net_d2.evaluation import Protocol, choose_protocol

if TYPE_CHECKING:
    from dr2net_d2.data.slicing import Slicing

logger = logging.getLogger(__name__)


def head_section(cfg: CfgNode) -> str:
    """The section of MODEL that has NUM_CLASSES of the detector."""
    sections = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
    # The torchvision engine leaves the key out.
    return sections.get(cfg.MODEL.get("META_ARCHITECTURE"), "ROI_HEADS")


def check_categories(datasets: Mapping[str, Sequence[str]], key: str, num_classes: int) -> None:
    """Refuse datasets (name -> category names) that differ from each other or from the model.

    Raises:
        ConfigError: names the datasets and ``key``, that of ``num_classes``.
    """
    first = next(iter(datasets), "")
    for name, categories in datasets.items():
        if len(categories) != num_classes:
            raise ConfigError(
                f"{key} is {num_classes}, but {name} has {len(categories)} "
                f"categories; set it to {len(categories)}"
            )
        if tuple(categories) != tuple(datasets[first]):
            raise ConfigError(
                f"DATASETS: {name} has other categories than {first}, or another order; use "
                "datasets whose categories agree"
            )


def evaluation_protocol(cfg: CfgNode) -> Protocol:
    """That of TEST.PROTOCOL; warns if the detector gives fewer boxes than it counts.

    Raises:
        ConfigError: there is none of that name.
    """
    given = cfg.TEST.DETECTIONS_PER_IMAGE
    protocol = choose_protocol(cfg.TEST.PROTOCOL, given)
    if given < (most := protocol.max_detections[-1]):
        logger.warning(
            "TEST.DETECTIONS_PER_IMAGE is %d, but the protocol %s counts up to %d; the metrics may "
            "be lower than they could be",
            given,
            protocol.name,
            most,
        )
    return protocol


def box_limits(cfg: CfgNode, phase: str) -> dict[str, int]:
    """What bounds the number of boxes of an image, by key; those before NMS hold for each level.

    Bounds of a tile are none of an image.

    Args:
        phase: "TRAIN" or "TEST", as in DATASETS.
    """
    section = head_section(cfg)
    tiles = (cfg.INPUT if phase == "TRAIN" else cfg.TEST).TILES
    if tiles.ENABLED:
        keys = []
    elif section == "ROI_HEADS":
        keys = [f"MODEL.RPN.{when}_NMS_TOPK_{phase}" for when in ("PRE", "POST")]
    else:
        keys = [f"MODEL.{section}.TOPK_CANDIDATES_TEST"] if phase == "TEST" else []
    if phase == "TEST":
        keys.append("TEST.DETECTIONS_PER_IMAGE")
    return {key: value_of(cfg, key) for key in keys}


def warn_of_limits(limits: Mapping[str, int], densest: Mapping[str, int]) -> None:
    """Warn where fewer boxes can be found than an image has objects.

    Args:
        limits: of the boxes of an image, by key.
        densest: objects of the densest image, by dataset.
    """
    if not densest:
        return
    count, name = max((count, name) for name, count in densest.items())
    short = [f"{key} is {limit}" for key, limit in limits.items() if limit < count]
    if short:
        logger.warning(
            "%s has an image with %d objects, but %s; others are lost: raise such limits together",
            name,
            count,
            " and ".join(short),
        )


def check_weights_to_evaluate(
    weights: str, resuming: bool, key: str = "MODEL.WEIGHTS", folder: str = "OUTPUT_DIR"
) -> None:
    """Refuse an evaluation that has neither weights nor a checkpoint to resume from.

    Args:
        key, folder: what the config calls the weights and the folder of the checkpoints.
    """
    if not (weights or resuming):
        raise ConfigError(
            f"--eval-only without weights: set {key} to a checkpoint, or add --resume with the "
            f"{folder} of a training"
        )


def build_slicing(cfg: CfgNode) -> Slicing | None:
    """TEST.TILES, None if it is not enabled.

    Raises:
        ConfigError: numbers that make no tiles.
    """
    tiles = cfg.TEST.TILES
    if not tiles.ENABLED:
        return None
    # torchvision, whose operators it needs, takes a second to import.
    from dr2net_d2.data.slicing import Slicing

    with config_section("TEST.TILES"):
        return Slicing(
            Grid(tiles.SIZE, tiles.OVERLAP),
            tiles.WHOLE_IMAGE,
            tiles.MERGE_THRESH,
            tiles.BATCH_SIZE,
            cfg.TEST.DETECTIONS_PER_IMAGE,
        )


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
