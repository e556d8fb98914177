"""Datasets: formats, checks, conversion to COCO, tiles, anchors; no detector framework.

In: a dataset's name, folder or file in one of seven formats. Out: ``CocoDataset`` with boxes that
can be used, or an error that names file, line and value.
"""

from pathlib import Path

from dr2net_d2.data.coco import CocoDataset, CocoRecord, load_coco, read_image, read_pixels
from dr2net_d2.data.coco_writer import write_coco
from dr2net_d2.data.folders import datasets_folder
from dr2net_d2.data.originals import NAMES, resolve_original
from dr2net_d2.data.small_digits import (
    SmallDigitsConfig,
    digit_samples,
    draw_canvas,
    make_small_digits,
    small_digits_from_name,
)
from dr2net_d2.errors import DatasetError

__all__ = [
    "CocoDataset",
    "CocoRecord",
    "DatasetError",
    "SmallDigitsConfig",
    "digit_samples",
    "draw_canvas",
    "load_coco",
    "make_small_digits",
    "read_image",
    "read_pixels",
    "register_coco_json",
    "resolve_dataset",
    "small_digits_from_name",
    "write_coco",
]

_COCO_SPLITS = {"coco_2017_train": "train2017", "coco_2017_val": "val2017"}
_SMALL_DIGITS = "small_digits_"
_registered: dict[str, tuple[Path, Path]] = {}


def register_coco_json(name: str, json_file: str | Path, image_root: str | Path) -> None:
    """Register a COCO-format dataset under a name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Args:
        name: the new name; registering the same files under it again changes nothing.
        json_file: the annotation file, which is read when the dataset is used.
        image_root: the folder that ``file_name`` in the JSON is relative to.

    Raises:
        DatasetError: the name is taken by other files.
    """
    files = (Path(json_file), Path(image_root))
    taken = name in (*_COCO_SPLITS, *NAMES) or name.startswith(_SMALL_DIGITS)
    if taken or _registered.get(name, files) != files:
        meaning = "a built-in dataset" if taken else str(_registered[name][0])
        raise DatasetError(f"dataset {name!r} already stands for {meaning}; choose another name")
    _registered[name] = files


def resolve_dataset(name: str) -> tuple[Path, Path]:
    """Find the annotation file and the image folder of a named dataset.

    "small_digits_*" is drawn at its first use. "coco_2017_*", "visdrone_*", "aitod_*", "aitodv2_*"
    and "tinyperson_*" are looked for in their original layout under $DETECTRON2_DATASETS (default:
    "datasets"); all but COCO are converted at their first use and whenever they have changed. A
    name that ends in ".json" is a file whose images are below its own folder. Whether the files
    exist is checked by ``load_coco``.

    Raises:
        DatasetError: the name is unknown, a SmallDigits dataset cannot be drawn, or the original
            files have bad entries.
    """
    if name.startswith(_SMALL_DIGITS):
        return make_small_digits(small_digits_from_name(name))
    if name in _COCO_SPLITS:
        root = datasets_folder() / "coco"
        split = _COCO_SPLITS[name]
        return root / "annotations" / f"instances_{split}.json", root / split
    if name in _registered:
        return _registered[name]
    if name in NAMES:
        return resolve_original(name)
    if name.endswith(".json"):
        return Path(name), Path(name).parent
    digits = f"{_SMALL_DIGITS}train", f"{_SMALL_DIGITS}val"
    known = ", ".join([*_COCO_SPLITS, *digits, *NAMES, *_registered])
    raise DatasetError(
        f"dataset {name!r} is not known; use one of {known}, the path of a COCO-format .json, or"
        " register_coco_json for your own"
    )
