"""COCO-format datasets in Detectron2's catalogs, and where in its data a training starts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import SizeMismatchError
from torch.utils.data import Sampler

from dr2net_d2.data import load_coco, resolve_dataset
from dr2net_d2.errors import DatasetError


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
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") != "coco":
            return tuple(metadata.get("thing_classes", ()))
        return load_coco(metadata.json_file, metadata.image_root).categories
    json_file, image_root = resolve_dataset(name)
    categories = load_coco(json_file, image_root).categories
    register_coco_instances(name, {}, str(json_file), str(image_root))
    return categories


class CheckedMapper(DatasetMapper):
    """Detectron2's mapper; an image that cannot be read is a DatasetError with its name."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        try:
            mapped: dict[str, Any] = super().__call__(dataset_dict)
        except (OSError, SizeMismatchError) as error:
            raise DatasetError(
                f"image {dataset_dict['file_name']} cannot be used "
                f"({' '.join(str(error).split())}); restore the file or correct the JSON"
            ) from error
        return mapped


def skip_samples(loader: Any, count: int) -> None:
    """Let a train loader of Detectron2 that has not started yet leave out its first samples.

    Exact, unless the loader groups images by aspect ratio and has both wide and tall ones, or
    workers: then a few images around the cut come twice or not at all.

    Args:
        loader: from ``build_detection_train_loader``.
        count: in samples of this process.
    """
    samples = loader.dataset
    if isinstance(loader, AspectRatioGroupedDataset):
        samples = samples.dataset
    samples.sampler = _Skipping(samples.sampler, count)


class _Skipping(Sampler[int]):
    def __init__(self, sampler: Sampler[int], count: int) -> None:
        self._sampler = sampler
        self._count = count

    def __iter__(self) -> Iterator[int]:
        yield from islice(self._sampler, self._count, None)
