"""COCO-format datasets in Detectron2's catalogs, its mapper and tiles, and skipping of batches."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import configurable
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import SizeMismatchError, get_bbox
from fvcore.common.config import CfgNode
from torch.utils.data import Sampler

from dr2net_d2.config import check_jittering
from dr2net_d2.data import CocoDataset, load_coco, resolve_dataset
from dr2net_d2.data.tiling import Grid, ImageBoxes, Tile, TileChoice, choose_tiles, paint_over
from dr2net_d2.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)


def register_dataset(name: str) -> tuple[str, ...]:
    """Make a dataset usable by name in DATASETS.TRAIN and DATASETS.TEST, and check its files.

    Args:
        name: a name that is registered in Detectron2 or known to
            ``dr2net_d2.data.resolve_dataset``.

    Returns:
        The category names; empty for a dataset of Detectron2's in another format than COCO whose
        names are only known once it is loaded.

    Raises:
        DatasetError: the name is unknown, or files are missing or invalid.
    """
    content = load_registered(name)
    if content is None:
        return tuple(MetadataCatalog.get(name).get("thing_classes", ()))
    return content.categories


def load_registered(name: str) -> CocoDataset | None:
    """Like ``register_dataset``, but return the dataset; None if it is not in COCO format."""
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") != "coco":
            _check_lvis(name)
            return None
        return load_coco(metadata.json_file, metadata.image_root)
    json_file, image_root = map(str, resolve_dataset(name))
    dataset = load_coco(json_file, image_root)
    regions = {
        record.image_id: record.ignore_regions.tolist()
        for record in dataset.records
        if len(record.ignore_regions)
    }

    def load() -> list[dict[str, Any]]:
        dicts: list[dict[str, Any]] = load_coco_json(json_file, image_root, name)
        for image in dicts:
            if image["image_id"] in regions:
                image["ignore_regions"] = regions[image["image_id"]]
        return dicts

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")
    return dataset


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
    """Detectron2's mapper with tiles, ignore regions, and errors that name the image.

    For a dict from ``tile_dicts``, it crops the image to the tile before anything else. Built from
    a config, it also applies INPUT.LSJ, and it leaves resizing to the detector if TEST.TILES is
    enabled.

    Args:
        is_train: see ``DatasetMapper``.
        pixel_mean: the colour to paint regions with, in the order of ``image_format``.
        fill_ignored: in training, paint over crowds and the dict's "ignore_regions" (XYXY).
        **arguments: the other arguments of ``DatasetMapper``.

    Raises:
        DatasetError: when called, for an image that cannot be read or has another size.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        pixel_mean: Sequence[float] = (103.53, 116.28, 123.675),
        fill_ignored: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(is_train, **arguments)
        self.colour = np.rint(pixel_mean)
        self.fill_ignored = fill_ignored

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        arguments: dict[str, Any] = super().from_config(cfg, is_train)
        arguments["pixel_mean"] = cfg.MODEL.PIXEL_MEAN
        arguments["fill_ignored"] = cfg.INPUT.FILL_IGNORED
        if not is_train and cfg.TEST.TILES.ENABLED:
            arguments["augmentations"] = []
        if is_train and cfg.INPUT.LSJ.ENABLED:
            if cfg.INPUT.CROP.ENABLED:
                raise ConfigError("INPUT.LSJ and INPUT.CROP are both enabled; turn off one")
            _, *flip = arguments["augmentations"]
            arguments["augmentations"] = [*flip, *large_scale_jittering(cfg.INPUT.LSJ)]
        if is_train and (cfg.INPUT.LSJ.ENABLED or cfg.INPUT.TILES.ENABLED):
            # A crop moves the edges of the objects that it cuts; only masks tell the new edges.
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        mapper = copy.copy(self)
        mapper.augmentations = T.AugmentationList(
            [*self._before_augmentation(dataset_dict), *self.augmentations.augs]
        )
        # Detectron2 would try to compute boxes from masks even where there are no objects.
        objects = (not row.get("iscrowd", 0) for row in dataset_dict.get("annotations", ()))
        mapper.recompute_boxes = self.recompute_boxes and any(objects)
        try:
            mapped: dict[str, Any] = DatasetMapper.__call__(mapper, dataset_dict)
        except (OSError, SizeMismatchError) as error:
            raise DatasetError(
                f"image {dataset_dict['file_name']} cannot be used "
                f"({' '.join(str(error).split())}); restore the file or correct the JSON"
            ) from error
        if "tile" in mapped:
            x0, y0, x1, y1 = mapped["tile"]
            mapped.update(width=x1 - x0, height=y1 - y0)
        return mapped

    def _before_augmentation(self, dataset_dict: dict[str, Any]) -> list[T.Transform]:
        """The crop to the tile, if there is one, then the paint over regions to ignore."""
        transforms: list[T.Transform] = []
        x0, y0, x1, y1 = dataset_dict.get("tile", (0, 0, 0, 0))
        if "tile" in dataset_dict:
            transforms.append(T.CropTransform(x0, y0, x1 - x0, y1 - y0))
        if self.is_train:
            annotations = dataset_dict.get("annotations", ())
            regions = [*dataset_dict.get("cut", ())]
            if self.fill_ignored:
                regions += dataset_dict.get("ignore_regions", ())
                regions += [get_bbox(row) for row in annotations if row.get("iscrowd", 0)]
            objects = [get_bbox(row) for row in annotations if not row.get("iscrowd", 0)]
            if regions:
                start = np.array([x0, y0, x0, y0])
                own = _boxes(objects) - start
                transforms.append(PaintTransform(_boxes(regions) - start, own, self.colour))
        return transforms


class PaintTransform(T.NoOpTransform):
    """Applies ``dr2net_d2.data.tiling.paint_over`` to the image, and nothing to masks and boxes.

    Args:
        regions, objects: XYXY boxes (n, 4) to paint over, and to leave as they are, in pixels.
        colour: the paint, (channels,).
    """

    def __init__(self, regions: np.ndarray, objects: np.ndarray, colour: np.ndarray) -> None:
        super().__init__()
        self._arguments = (regions, objects, colour)

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        return paint_over(image, *self._arguments)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


def tile_dicts(
    names: str | Sequence[str],
    size: int,
    overlap: float = 0.25,
    min_visible: float = 0.4,
    empty_ratio: float = 0.1,
    seed: int = 0,
    filter_empty: bool = True,
) -> list[dict[str, Any]]:
    """Detectron2's dataset dicts, one for each tile to train on.

    Args:
        names: names of registered datasets.
        size, overlap, min_visible, empty_ratio: see the keys of INPUT.TILES.
        seed: seeds the choice among tiles without an object; must agree in all processes.
        filter_empty: leave out images without objects altogether.

    Returns:
        Dicts for ``CheckedMapper``, in pixels of the whole image: "tile" is the tile as XYXY,
        "annotations" has the objects that the tile shows and all crowds, and "cut" the boxes of
        objects of which it shows too little.

    Raises:
        ValueError: the numbers do not describe tiles.
        DatasetError: an image lacks width or height.
    """
    choice = TileChoice(
        grid=Grid(size=size, overlap=overlap), min_visible=min_visible, empty_ratio=empty_ratio
    )
    dicts = get_detection_dataset_dicts(names, filter_empty)
    images = [_image_boxes(image) for image in dicts]
    tiles = choose_tiles(images=images, choice=choice, seed=seed)
    return [_tile_dict(dicts[tile.image], images[tile.image], tile) for tile in tiles]


def _image_boxes(image: dict[str, Any]) -> ImageBoxes:
    annotations = image.get("annotations", ())
    height, width = _size(image)
    return ImageBoxes(
        height=height,
        width=width,
        boxes=_boxes([get_bbox(row) for row in annotations]),
        iscrowd=np.array([row.get("iscrowd", 0) for row in annotations], dtype=bool),
    )


def _tile_dict(image: dict[str, Any], boxes: ImageBoxes, tile: Tile) -> dict[str, Any]:
    annotations = image.get("annotations", ())
    shown = (*tile.objects, *boxes.iscrowd.nonzero()[0])
    return {
        **image,
        "tile": tile.corners,
        "annotations": [annotations[index] for index in shown],
        "cut": boxes.boxes[tile.cut].tolist(),
    }


def _boxes(rows: Sequence[Any]) -> np.ndarray:
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _size(image: dict[str, Any]) -> tuple[int, int]:
    try:
        return image["height"], image["width"]
    except KeyError as error:
        raise DatasetError(
            f"image {image['file_name']} has no {error} in its dataset; INPUT.TILES needs it"
        ) from None


def large_scale_jittering(lsj: CfgNode) -> list[T.Augmentation]:
    """Rescale and crop as INPUT.LSJ says; smaller images stay unpadded, as in ViTDet's recipe.

    Raises:
        ConfigError: INPUT.LSJ lacks a side or a range of scales.
    """
    check_jittering(lsj)
    side = lsj.IMAGE_SIZE
    resize = T.ResizeScale(
        min_scale=lsj.MIN_SCALE, max_scale=lsj.MAX_SCALE, target_height=side, target_width=side
    )
    return [resize, T.FixedSizeCrop((side, side), pad=False)]


def skip_batches(loader: Any, count: int) -> None:
    """Make a train loader of Detectron2 that has not started yet skip its first batches.

    This is exact, unless the loader has workers, or groups images by aspect ratio and has both
    wide and tall ones: then a few images around the cut are seen twice or not at all.

    Args:
        loader: made by ``build_detection_train_loader``; for any other loader a warning is logged.
        count: batches to skip in this process.
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
