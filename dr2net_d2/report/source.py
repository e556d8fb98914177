"""The inputs of a report: test set and protocol from config.yaml, and the detections."""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dr2net_d2.errors import ConfigError, DatasetError

_KEYS = {"image_id", "category_id", "bbox", "score"}


@dataclass(frozen=True)
class Recorded:
    """Dataset and protocol of an evaluation; ``detections_per_image`` is for protocol "coco"."""

    dataset: str
    protocol: str = "coco"
    detections_per_image: int = 100


def recorded(output_dir: Path, dataset: str | None, protocol: str | None) -> Recorded:
    """Read the config.yaml of a training, written from a YAML config or a LazyConfig.

    Args:
        output_dir: folder of config.yaml, which may be missing if ``dataset`` is given.
        dataset, protocol: used in place of those of the config.

    Raises:
        ConfigError: if config.yaml cannot be read or names no dataset, and none is given.
    """
    path = output_dir / "config.yaml"
    if not path.is_file():
        if dataset is None:
            raise ConfigError(
                f"{path} does not exist; give the OUTPUT_DIR of a training, or --dataset and "
                "--results"
            )
        return Recorded(dataset, protocol or "coco")
    try:
        config = yaml.load(path.read_text(), _PlainLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read ({reason}); restore it") from error
    test = _at(config, "TEST") or {}
    evaluator = _at(config, "dataloader", "evaluator") or {}
    # Several test sets write the same results file, so it has the detections of the last one.
    names = _at(config, "DATASETS", "TEST") or _at(config, "dataloader", "test", "dataset", "names")
    name = dataset or (names[-1] if isinstance(names, list) and names else names)
    if not isinstance(name, str) or name.startswith("${"):
        raise ConfigError(f"{path} names no test set (found {reprlib.repr(names)}); give --dataset")
    limit = test.get("DETECTIONS_PER_IMAGE") or evaluator.get("max_dets_per_image")
    protocol = protocol or test.get("PROTOCOL") or evaluator.get("protocol") or "coco"
    return Recorded(name, protocol, limit if isinstance(limit, int) else 100)


def read_detections(path: Path) -> list[dict[str, Any]]:
    """Read detections in COCO format.

    Raises:
        ConfigError: if the file cannot be opened.
        DatasetError: if it is not JSON, or has no boxes.
    """
    try:
        results = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; train_net.py writes it when it evaluates (--eval-only, "
            "DATASETS.TEST), or give --results"
        ) from None
    except ValueError as error:
        raise DatasetError(f"{path}: not JSON, or cut short ({error}); evaluate again") from None
    if not isinstance(results, list):
        raise DatasetError(f"{path}: not a list of results; COCO format has a list of objects")
    for row in results:
        if not isinstance(row, dict) or not row.keys() >= _KEYS or len(row["bbox"]) != 4:
            raise DatasetError(
                f"{path}: result {reprlib.repr(row)}; each needs {', '.join(sorted(_KEYS))}, with "
                "bbox as x, y, width, height"
            )
    return results


class _PlainLoader(yaml.SafeLoader):
    """Reads the plain values of Python's tags, which LazyConfig.save writes."""


def _plain(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def _at(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config
