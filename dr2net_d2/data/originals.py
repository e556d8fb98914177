"""Datasets by name in their original layout under $DETECTRON2_DATASETS, converted at first use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from dr2net_d2.data.conversion import convert_to_coco
from dr2net_d2.data.folders import cache_folder, datasets_folder
from dr2net_d2.data.formats import FORMATS, Format, Layout
from dr2net_d2.data.formats.base import first_folder
from dr2net_d2.errors import DatasetError

# Raise it whenever a converter writes something else, so that no older JSON is taken for new.
_VERSION = 1
_AITOD_PARTS = ("train", "trainval", "val", "test")

NAMES = (
    *(f"visdrone_{part}" for part in ("train", "val", "test_dev")),
    *(f"{version}_{part}" for version in ("aitod", "aitodv2") for part in _AITOD_PARTS),
    *(f"tinyperson_{part}" for part in ("train", "test")),
)
"""What ``resolve_original`` knows."""


def find_original(name: str) -> tuple[Format, Layout]:
    """The format and the files of a dataset of ``NAMES``.

    Raises:
        DatasetError: they are not there.
    """
    kind, _, part = name.partition("_")
    if kind == "visdrone":
        root = datasets_folder() / "VisDrone"
        layouts = FORMATS["visdrone"].find(root)
        expected = root / f"VisDrone2019-DET-{part.replace('_', '-')}"
        if part not in layouts:
            raise DatasetError(
                f"{expected}: no such folder with annotations/ and images/; unpack {name} there, or"
                " set DETECTRON2_DATASETS to the folder that holds VisDrone/"
            )
        return FORMATS["visdrone"], layouts[part]
    if kind == "tinyperson":
        root = first_folder(*(datasets_folder() / "TinyPerson" / n for n in ("tiny_set", ".")))
        files = [root / "annotations" / f"tiny_set_{part}.json"]
        images = [root / part]
    else:
        root = datasets_folder() / "AI-TOD"
        files = [root / "annotations" / f"{kind}_{part}{end}.json" for end in ("", "_v1")]
        images = [root / "images" / part / "images", root / "images" / part]
        images += [root / part / "images", root / part]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise DatasetError(
            f"{files[0]}: no such file; unpack {name} there, or set DETECTRON2_DATASETS to the"
            f" folder that holds {'TinyPerson' if kind == 'tinyperson' else 'AI-TOD'}/"
        )
    format_name = "tinyperson" if kind == "tinyperson" else "aitod"
    return FORMATS[format_name], Layout(file, first_folder(*images), part=part)


def resolve_original(name: str) -> tuple[Path, Path]:
    """The COCO-format JSON and the image folder of a dataset of ``NAMES``.

    The JSON is written to the cache unless it is there for the files as they are now; it appears
    whole, so that processes that do this at once do not disturb each other.

    Raises:
        DatasetError: the files are not there or have bad entries, or the cache cannot be written.
    """
    data_format, layout = find_original(name)
    json_file = cache_folder() / "converted" / f"{name}-{_signature(data_format, layout)}.json"
    if not json_file.is_file():
        convert_to_coco(data_format, layout, json_file, layout.images)
    return json_file, layout.images


def _signature(data_format: Format, layout: Layout) -> str:
    """Changes when a file is added, removed or written; what is in the files is not read."""
    files = [*_stats(layout.annotations)]
    if layout.annotations.is_dir():
        # A JSON has the sizes of the images; otherwise they are the images' own.
        files += _stats(layout.images)
    text = json.dumps([_VERSION, data_format.name, str(layout.images.resolve()), sorted(files)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stats(path: Path) -> Iterator[tuple[str, int, int]]:
    for file in path.iterdir() if path.is_dir() else [path]:
        stat = file.stat()
        yield file.name, stat.st_size, stat.st_mtime_ns
