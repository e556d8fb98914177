"""What a config says of the detector's categories, its limits and its evaluation."""

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
    """Name of the section of MODEL that holds the detector's NUM_CLASSES."""
    sections = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
    # The torchvision engine removes the key.
    return sections.get(cfg.MODEL.get("META_ARCHITECTURE"), "ROI_HEADS")


def check_categories(datasets: Mapping[str, Sequence[str]], key: str, num_classes: int) -> None:
    """Refuse datasets whose categories differ from each other's or from the model's.

    Args:
        datasets: name -> names of its categories.
        key: the config key of ``num_classes``.
        num_classes: number of categories of the model.

    Raises:
        ConfigError: names the datasets and ``key``.
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
                f"DATASETS: {name} has other categories than {first}, or in another order; use "
                "datasets whose categories agree"
            )


def evaluation_protocol(cfg: CfgNode) -> Protocol:
    """The protocol of TEST.PROTOCOL; warns if it counts more detections than the detector returns.

    Raises:
        ConfigError: there is no protocol of that name.
    """
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    protocol = choose_protocol(cfg.TEST.PROTOCOL, limit)
    if limit < (maximum := protocol.max_detections[-1]):
        logger.warning(
            "TEST.DETECTIONS_PER_IMAGE is %d, but the protocol %s counts up to %d; the metrics may "
            "be lower than they could be",
            limit,
            protocol.name,
            maximum,
        )
    return protocol


def box_limits(cfg: CfgNode, phase: str) -> dict[str, int]:
    """The keys that limit the number of boxes per image, and their values.

    Limits before NMS hold per level. Limits on a tile do not count.

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
    """Warn if an image has more objects than the detector may return boxes.

    Args:
        limits: key -> maximum number of boxes per image, see ``box_limits``.
        densest: dataset -> number of objects in its densest image.
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
        weights: value of ``key``.
        resuming: there is a checkpoint to resume from.
        key, folder: the config's names for the weights and for the folder of checkpoints.

    Raises:
        ConfigError: neither is there.
    """
    if not (weights or resuming):
        raise ConfigError(
            f"--eval-only without weights: set {key} to a checkpoint, or add --resume with the "
            f"{folder} of a training"
        )


def build_slicing(cfg: CfgNode) -> Slicing | None:
    """Sliced inference as TEST.TILES describes it, None if it is not enabled.

    Raises:
        ConfigError: a value of that section is out of range.
    """
    tiles = cfg.TEST.TILES
    if not tiles.ENABLED:
        return None
    # It imports torchvision, which takes a second.
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
    """Names of a detector's categories, from the first dataset of the config that has as many.

    Args:
        cfg: DATASETS.TEST and DATASETS.TRAIN are searched, in this order.
        count: number of categories; without such a dataset they are named "0", "1", ...
        look_up: name of a dataset -> names of its categories; raises DatasetError on failure.
    """
    for dataset in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        with suppress(DatasetError):
            if len(names := look_up(dataset)) == count:
                return tuple(names)
    return tuple(map(str, range(count)))
