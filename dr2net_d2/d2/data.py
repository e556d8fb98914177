"""COCO-format datasets in Detectron2's catalogs, and where in its data a training starts."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import SizeMismatchError
from fvcore.common.config import CfgNode
from torch.utils.data import Sampler

from dr2net_d2.data import CocoDataset, load_coco, resolve_dataset
from dr2net_d2.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)


def register_dataset(name: str) -> tuple[str, ...]:
    """Make a name usable in DATASETS.TRAIN and DATASETS.TEST, and check the dataset behind it.

    Args:
        name: registered in Detectron2, or known to ``dr2net_d2.data.resolve_dataset``.

    Returns:
        The category names; empty where a dataset registered in Detectron2 is not in COCO format and
        tells them only when it is loaded.

    Raises:
        DatasetError: the name is not known, or the files are missing or not valid.
    """
    content = load_registered(name)
    if content is None:
        return tuple(MetadataCatalog.get(name).get("thing_classes", ()))
    return content.categories


def load_registered(name: str) -> CocoDataset | None:
    """``register_dataset``; returns what the dataset holds, or None if it is not in COCO format."""
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") != "coco":
            _check_lvis(name)
            return None
        return load_coco(metadata.json_file, metadata.image_root)
    json_file, image_root = resolve_dataset(name)
    content = load_coco(json_file, image_root)
    register_coco_instances(name, {}, str(json_file), str(image_root))
    return content


def _check_lvis(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "lvis":
        return
    if importlib.util.find_spec("lvis") is None:
        raise DatasetError(f"dataset {name} needs the package lvis: pip install lvis")
    if not Path(metadata.json_file).is_file():
        raise DatasetError(
            f"{metadata.json_file}: no such file; put LVIS under the folder that "
            "DETECTRON2_DATASETS names"
        )


class CheckedMapper(DatasetMapper):
    """Detectron2's mapper; an image that cannot be read is a DatasetError with its name.

    Built from a config it knows INPUT.LSJ as well.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        arguments: dict[str, Any] = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.LSJ.ENABLED:
            if cfg.INPUT.CROP.ENABLED:
                raise ConfigError("INPUT.LSJ and INPUT.CROP are both enabled; turn off one")
            _, *flip = arguments["augmentations"]
            arguments["augmentations"] = [*flip, *large_scale_jittering(cfg.INPUT.LSJ)]
            # A crop moves the edges of the objects that it cuts; only masks tell where to.
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        try:
            mapped: dict[str, Any] = super().__call__(dataset_dict)
        except (OSError, SizeMismatchError) as error:
            raise DatasetError(
                f"image {dataset_dict['file_name']} cannot be used "
                f"({' '.join(str(error).split())}); restore the file or correct the JSON"
            ) from error
        return mapped


def large_scale_jittering(lsj: CfgNode) -> list[T.Augmentation]:
    """Rescale and crop as INPUT.LSJ says; a smaller image stays unpadded, as in ViTDet's recipe.

    Raises:
        ConfigError: no side or no range of scales.
    """
    side, scales = lsj.IMAGE_SIZE, (lsj.MIN_SCALE, lsj.MAX_SCALE)
    if side < 1 or not 0 < scales[0] <= scales[1]:
        raise ConfigError(
            f"INPUT.LSJ has IMAGE_SIZE {side} and scales {scales[0]} to {scales[1]}; it needs a "
            "side of 1 px or more and 0 < MIN_SCALE <= MAX_SCALE"
        )
    return [T.ResizeScale(*scales, side, side), T.FixedSizeCrop((side, side), pad=False)]


def skip_batches(loader: Any, count: int) -> None:
    """Let a train loader of Detectron2 that has not started yet leave out its first batches.

    Exact, unless the loader groups images by aspect ratio and has both wide and tall ones, or
    workers: then a few images around the cut come twice or not at all.

    Args:
        loader: from ``build_detection_train_loader``; another one is left alone, with a warning.
        count: in batches of this process.
    """
    samples: Any = getattr(loader, "dataset", None)
    if isinstance(loader, AspectRatioGroupedDataset):
        samples = samples.dataset
    if hasattr(samples, "sampler"):
        samples.sampler = _Skipping(samples.sampler, count * loader.batch_size)
    elif count:
        logger.warning("the train loader is not Detectron2's: it starts from its first batch again")


class _Skipping(Sampler[int]):
    def __init__(self, sampler: Sampler[int], count: int) -> None:
        self._sampler = sampler
        self._count = count

    def __iter__(self) -> Iterator[int]:
        yield from islice(self._sampler, self._count, None)
