"""What can be wrong in a config of either style, found before anything is written."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from detectron2.utils import comm

from dr2net_d2.checkpointer import locate_weights
from dr2net_d2.config import check_categories, check_weights_to_evaluate
from dr2net_d2.d2.data import register_dataset
from dr2net_d2.errors import ConfigError


def check_batch_size(key: str, images: int, accumulation_steps: int) -> int:
    """The images of all processes that go through the network at once.

    Args:
        key: of ``images``, those of an iteration.

    Raises:
        ConfigError: they cannot be divided among the processes and the steps.
    """
    processes = comm.get_world_size()
    if accumulation_steps < 1 or images < 1 or images % (processes * accumulation_steps):
        raise ConfigError(
            f"{key} is {images}; it must be a positive multiple of the {processes} processes "
            f"times the {accumulation_steps} accumulation steps"
        )
    return images // accumulation_steps


def check_datasets(key: str, num_classes: int, names: Iterable[str]) -> None:
    """Register datasets, and refuse what is missing, damaged or of other categories.

    Args:
        key: of ``num_classes``.

    Raises:
        DatasetError: see ``register_dataset``.
        ConfigError: see ``check_categories``.
    """
    found = {name: categories for name in names if (categories := register_dataset(name))}
    check_categories(found, key, num_classes)


def check_weights(args: argparse.Namespace, weights: str, output_dir: str, *names: str) -> None:
    """Refuse an evaluation without weights, and weights that are not there.

    Args:
        args: eval_only, and resume, which reads the last checkpoint in ``output_dir`` instead.
        names: what the config calls ``weights`` and ``output_dir``; of YAML unless given.

    Raises:
        ConfigError: see ``check_weights_to_evaluate``.
        WeightsError: see ``locate_weights``.
    """
    resuming = args.resume and Path(output_dir, "last_checkpoint").is_file()
    if args.eval_only:
        check_weights_to_evaluate(weights, resuming, *names)
    if not resuming:
        locate_weights(weights)
