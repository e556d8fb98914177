"""Do a config's anchors fit the objects of its training set, and which anchors would?

    python -m dr2net_d2.anchors --config-file configs/quickstart.yaml
    python -m dr2net_d2.anchors --config-file F --output F_anchors.yaml DATASETS.TRAIN "('my_set',)"

Scales the boxes as the training does (INPUT.MIN_SIZE_TRAIN, LSJ, TILES), clusters their sizes and
aspect ratios with 1 - IoU as the distance, and compares the config's anchors with the new ones,
each on the grid of its locations. Works for detectors with an RPN and for RetinaNet; FCOS has no
anchors. Prints a table and the new keys as YAML. --output writes a config that is based on the
given one and adds the overrides of the command line and the new anchors.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fvcore.common.config import CfgNode

from dr2net_d2.commands import choose_engine, load_config, make_parser, markdown_table
from dr2net_d2.config import value_of
from dr2net_d2.data import CocoRecord, load_coco, resolve_dataset
from dr2net_d2.data.anchors import Anchors, Objects, propose_anchors
from dr2net_d2.errors import ConfigError, run_command

logger = logging.getLogger(__name__)

_SECTION = "MODEL.ANCHOR_GENERATOR"
_EDGES = (0, 8, 16, 32, 64, 128, np.inf)  # of the sizes in the table, in pixels
_ENOUGH_OBJECTS = 10_000  # to draw where the scale of an image is random


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m dr2net_d2.anchors", __doc__)
    for name in ("sizes", "ratios"):
        parser.add_argument(
            f"--{name}",
            type=int,
            metavar="N",
            help=f"{name} per level, default: as many as keep the number of anchors per location",
        )
    parser.add_argument("--output", metavar="FILE", help="the config to write, a YAML file")
    return parser.parse_args(argv)


def training_objects(cfg: CfgNode, records: Sequence[CocoRecord], divisor: int) -> Objects:
    """The objects of a training set, resized and cropped as in training.

    Random sizes and crops are drawn with a fixed seed, several times if the dataset is small.

    Args:
        cfg: the config, of which INPUT is read.
        records: the images of the training set.
        divisor: image sides are padded to a multiple of it, in pixels.

    Raises:
        ConfigError: there is no object, or INPUT.CROP is enabled.
    """
    data, tiles = cfg.INPUT, cfg.INPUT.TILES
    if data.CROP.ENABLED:
        raise ConfigError("INPUT.CROP.ENABLED is True; anchors cannot be fitted to it, disable it")
    rng = np.random.default_rng(0)
    random = data.LSJ.ENABLED or len({*data.MIN_SIZE_TRAIN}) > 1
    total = sum(int((~record.iscrowd).sum()) for record in records)
    boxes, image_sizes = [np.empty((0, 4))], [np.empty((0, 2))]
    for record in [*records] * (math.ceil(_ENOUGH_OBJECTS / max(total, 1)) if random else 1):
        corners = record.boxes[~record.iscrowd].reshape(-1, 2, 2).astype(np.float64)
        image = np.array([record.width, record.height], dtype=np.float64)
        corners = corners.clip(0, image)
        if tiles.ENABLED:
            # Take the tile that the object's centre is in; it holds the object, or most of it.
            tile = np.minimum(image, tiles.SIZE)
            start = corners.mean(axis=1) // tile * tile
            corners -= np.minimum(start, image - tile)[:, None]
            image = tile
        scale, crop = _resizing(cfg, image, rng)
        resized = np.maximum(np.rint(image * scale), 1)
        start = np.maximum(resized - crop, 0) * rng.random(2)
        image, corners = np.minimum(resized, crop), corners * (resized / image) - start
        corners = corners.clip(0, image)
        kept = (corners[:, 1] > corners[:, 0]).all(axis=1)
        boxes.append(corners[kept].reshape(-1, 4))
        padded = np.ceil(image / divisor) * divisor
        image_sizes.append(np.broadcast_to(padded, (len(boxes[-1]), 2)))
    objects = Objects(np.concatenate(boxes), np.concatenate(image_sizes))
    if not len(objects):
        raise ConfigError(f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no object; name another")
    return objects


def _resizing(cfg: CfgNode, image: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The factor that an image (width, height) is resized by, and the side of the square crop."""
    lsj, sizes = cfg.INPUT.LSJ, cfg.INPUT.MIN_SIZE_TRAIN
    if lsj.ENABLED:
        factor = rng.uniform(lsj.MIN_SCALE, lsj.MAX_SCALE)
        return factor * lsj.IMAGE_SIZE / image.max(), lsj.IMAGE_SIZE
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        shortest = int(rng.integers(sizes[0], sizes[1] + 1))
    else:
        shortest = int(rng.choice(sizes))
    if shortest == 0:  # images keep their size
        return 1.0, np.inf
    return min(shortest / image.min(), cfg.INPUT.MAX_SIZE_TRAIN / image.max()), np.inf


def config_anchors(cfg: CfgNode) -> Anchors:
    """The anchors that a config describes.

    Raises:
        ConfigError: the detector has no anchors or another anchor generator, its levels are not
            named after their strides, or the number of lists is not the number of levels.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE or "GeneralizedRCNN"
    sections = {"GeneralizedRCNN": "RPN", "ProposalNetwork": "RPN", "RetinaNet": "RETINANET"}
    if architecture not in sections:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {architecture}, which has no anchors to choose; use one "
            f"of {', '.join(sections)}"
        )
    node, key = cfg.MODEL.ANCHOR_GENERATOR, f"MODEL.{sections[architecture]}.IN_FEATURES"
    if node.NAME not in (None, "DefaultAnchorGenerator"):
        raise ConfigError(f"{_SECTION}.NAME is {node.NAME}; it must be DefaultAnchorGenerator")
    names = cfg.MODEL[sections[architecture]].IN_FEATURES
    levels = [re.fullmatch(r"p(\d)", name) for name in names]
    if not levels or not all(levels):
        raise ConfigError(f"{key} is {names}; levels must be named p<log2 of their stride>")
    per_level: list[list[list[float]]] = []
    for name in ("SIZES", "ASPECT_RATIOS"):
        lists = [list(values) for values in node[name]]
        if len(lists) not in (1, len(levels)) or len({*map(len, lists)}) != 1 or not lists[0]:
            raise ConfigError(
                f"{_SECTION}.{name} is {node[name]}; give one list for all levels or one for each "
                f"of {names}, all of equal length"
            )
        per_level.append(lists * len(levels) if len(lists) == 1 else lists)
    strides = [2 ** int(level[1]) for level in levels if level]
    sizes, aspect_ratios = per_level
    return Anchors(strides, sizes, aspect_ratios, node.OFFSET or 0.0)


def find_anchors(objects: Objects, old: Anchors, sizes: int | None, ratios: int | None) -> Anchors:
    """Find anchors that fit the objects better, on the levels of the old ones.

    Args:
        sizes, ratios: how many per level. If one is None, it follows from the old number of anchors
            per location; if both are, the best split of that number is chosen.
    """
    count = len(old.sizes[0]) * len(old.aspect_ratios[0])
    if sizes is None and ratios is None:
        splits = [(n, count // n) for n in range(1, count + 1) if count % n == 0]
    else:
        other = max(count // (sizes or ratios or 1), 1)
        splits = [(sizes or other, ratios or other)]
    proposals = [propose_anchors(objects, old.strides, *split, old.offset) for split in splits]
    return max(proposals, key=lambda anchors: anchors.best_ious(objects).mean())


def format_table(objects: Objects, old: Anchors, new: Anchors) -> str:
    """How well the old and the new anchors fit, by object size, as Markdown."""
    header = ["side, px", "objects"]
    for measure in ("mean best IoU", "IoU ≥ 0.5", "IoU ≥ 0.7"):
        header += [f"{measure}: config", "new"]
    rows, ious = [header], [anchors.best_ious(objects) for anchors in (old, new)]
    bins = np.digitize(objects.sizes, _EDGES[1:-1])
    for i, (low, high) in enumerate(pairwise(_EDGES)):
        if (bins == i).any():
            name = f"{low:g} to {high:g}" if np.isfinite(high) else f"{low:g} or more"
            rows.append(_row(name, [iou[bins == i] for iou in ious]))
    return markdown_table([*rows, _row("all", ious)])


def _row(name: str, ious: Sequence[np.ndarray]) -> list[str]:
    means = [f"{iou.mean():.3f}" for iou in ious]
    shares = [f"{100 * (iou >= limit).mean():.1f} %" for limit in (0.5, 0.7) for iou in ious]
    return [name, str(len(ious[0])), *means, *shares]


def changes(cfg: CfgNode, overrides: Sequence[str], anchors: Anchors) -> dict[str, Any]:
    """What a config adds to its base: the overrides and the new anchors, as nested sections."""
    values = {key: value_of(cfg, key) for key in overrides[::2]}
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    values[f"{_SECTION}.SIZES"] = [list(sizes) for sizes in anchors.sizes]
    values[f"{_SECTION}.ASPECT_RATIOS"] = [list(anchors.aspect_ratios[0])]
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def write_config(output: Path, config_file: str, tree: dict[str, Any]) -> None:
    """Write a config that adds a tree of sections to a base, completely or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    partial = output.with_name(f"{output.name}.partial")
    base = os.path.relpath(Path(config_file).resolve(), output.resolve().parent)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(_as_yaml({"_BASE_": base} | tree))
        partial.replace(output)
    except OSError as error:
        raise ConfigError(
            f"--output {output} cannot be written ({error.strerror}); choose another"
        ) from error


def _as_yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def run(args: argparse.Namespace) -> None:
    """Find anchors for the training that the arguments describe, print them, write the config.

    Raises:
        UserError: the config, a dataset, a number or the output cannot be used.
    """
    for name in ("sizes", "ratios"):
        if (count := getattr(args, name)) is not None and count < 1:
            raise ConfigError(f"--{name} is {count}; it must be at least 1")
    output = None if args.output is None else Path(args.output)
    if output is not None and output.exists():
        raise ConfigError(f"--output {output} exists; choose another name, or remove it")
    cfg = load_config(args.config_file, args.opts, choose_engine(args.engine))
    old = config_anchors(cfg)
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty; name a dataset, such as small_digits_train")
    datasets = [load_coco(*resolve_dataset(name)) for name in cfg.DATASETS.TRAIN]
    records = [record for dataset in datasets for record in dataset.records]
    objects = training_objects(cfg, records, max(cfg.MODEL.VIT.SQUARE_PAD, old.strides[-1]))
    new = find_anchors(objects, old, args.sizes, args.ratios)
    print(f"{len(objects)} objects, scaled as in training:\n{format_table(objects, old, new)}\n")
    tree = changes(cfg, args.opts, new)
    print(_as_yaml(tree))
    if output is not None:
        write_config(output, args.config_file, tree)
        logger.info("wrote %s", output)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("dr2net_d2.anchors", run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
