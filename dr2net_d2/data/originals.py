"""Datasets in their original layout under $DETECTRON2_DATASETS, converted at their first use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from dr2net_d2.data.conversion import convert_to_coco
from dr2net_d2.data.folders import cache_folder, datasets_folder
from dr2net_d2.data.formats import FORMATS, DatasetFormat, Layout
from dr2net_d2.data.formats.reading import first_folder
from dr2net_d2.errors import DatasetError

# Increase it whenever a converter changes its output, so that older JSON files are not reused.
_VERSION = 1
_AITOD_SPLITS = ("train", "trainval", "val", "test")

NAMES = (
    *(f"visdrone_{split}" for split in ("train", "val", "test_dev")),
    *(f"{version}_{split}" for version in ("aitod", "aitodv2") for split in _AITOD_SPLITS),
    *(f"tinyperson_{split}" for split in ("train", "test")),
)
"""The names that ``resolve_original`` takes."""


def find_original(name: str) -> tuple[DatasetFormat, Layout]:
    """The format and the files of a dataset in ``NAMES``.

    Raises:
        DatasetError: the files do not exist.
    """
    kind, _, split = name.partition("_")
    if kind == "visdrone":
        root = datasets_folder() / "VisDrone"
        layouts = FORMATS["visdrone"].find(root)
        expected = root / f"VisDrone2019-DET-{split.replace('_', '-')}"
        if split not in layouts:
            raise DatasetError(
                f"{expected}: no such folder with annotations/ and images/; unpack {name} there, or"
                " set DETECTRON2_DATASETS to the folder that holds VisDrone/"
            )
        return FORMATS["visdrone"], layouts[split]
    if kind == "tinyperson":
        data_format, home = FORMATS["tinyperson"], datasets_folder() / "TinyPerson"
        root = first_folder(home / "tiny_set", home)
        files = [root / "annotations" / f"tiny_set_{split}.json"]
        images = [root / split]
    else:
        data_format, home = FORMATS["aitod"], datasets_folder() / "AI-TOD"
        root = home
        files = [root / "annotations" / f"{kind}_{split}{end}.json" for end in ("", "_v1")]
        images = [root / "images" / split / "images", root / "images" / split]
        images += [root / split / "images", root / split]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise DatasetError(
            f"{files[0]}: no such file; unpack {name} there, or set DETECTRON2_DATASETS to the"
            f" folder that holds {home.name}/"
        )
    return data_format, Layout(file, first_folder(*images), split=split)


def resolve_original(name: str) -> tuple[Path, Path]:
    """The COCO-format JSON and the image folder of a dataset in ``NAMES``.

    The JSON is written to the cache, unless the cache has it for the present state of the files.
    It appears complete, so processes that do this at the same time do not disturb each other.

    Raises:
        DatasetError: the files do not exist or have bad entries, or the cache cannot be written.
    """
    data_format, layout = find_original(name)
    json_file = cache_folder() / "converted" / f"{name}-{_signature(data_format, layout)}.json"
    if not json_file.is_file():
        convert_to_coco(data_format, layout, json_file, layout.images)
    return json_file, layout.images


def _signature(data_format: DatasetFormat, layout: Layout) -> str:
    """A hash that changes when a file is added, removed or written; contents are not read."""
    files = [*_stats(layout.annotations)]
    if layout.annotations.is_dir():
        # A JSON states the sizes of the images; other formats take them from the images.
        files += _stats(layout.images)
    text = json.dumps([_VERSION, data_format.name, str(layout.images.resolve()), sorted(files)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stats(path: Path) -> Iterator[tuple[str, int, int]]:
    for file in path.iterdir() if path.is_dir() else [path]:
        stat = file.stat()
        yield file.name, stat.st_size, stat.st_mtime_ns
