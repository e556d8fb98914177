"""Sliced inference around Detectron2's detectors, whatever finds instances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dr2net_d2.config import build_slicing, training_tiles, value_of
from dr2net_d2.data.slicing import Detections, Slicing
from dr2net_d2.errors import ConfigError


class SlicedDetector(nn.Module):
    """A detector that goes over the tiles of its images; see ``dr2net_d2.data.slicing.Slicing``.

    Args:
        model: gives boxes, scores and classes.
        slicing: how.
        augmentations: of each tile, and of the whole image, in place of the mapper's.

    Shape: as ``model``'s, images (C, H, W) uint8 being those of the dataset, of full size.

    Raises:
        ConfigError: the model finds masks or keypoints, which are not merged.
    """

    def __init__(
        self, model: nn.Module, slicing: Slicing, augmentations: Sequence[Any] = ()
    ) -> None:
        super().__init__()
        heads = getattr(model, "roi_heads", None)
        for what in ("mask", "keypoint"):
            if getattr(heads, f"{what}_on", False):
                raise ConfigError(
                    f"sliced inference merges boxes, and the detector finds {what}s as well; set "
                    f"MODEL.{what.upper()}_ON False, or detect in whole images"
                )
        self.model = model
        self.slicing = slicing
        self.augmentations = T.AugmentationList(augmentations)
        self.training = model.training

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        return [{"instances": self._instances(given)} for given in batched_inputs]

    def _instances(self, given: dict[str, Any]) -> Instances:
        image = given["image"]
        boxes, scores, labels = self.slicing.detect(image, self._detect)
        height, width = image.shape[1:]
        instances = Instances(
            (height, width), pred_boxes=Boxes(boxes), scores=scores, pred_classes=labels
        )
        return detector_postprocess(
            instances, given.get("height", height), given.get("width", width)
        )

    def _detect(self, parts: list[Tensor]) -> list[Detections]:
        found = self.model([self._resized(part) for part in parts])
        instances = (one["instances"] for one in found)
        return [Detections(i.pred_boxes.tensor, i.scores, i.pred_classes) for i in instances]

    def _resized(self, part: Tensor) -> dict[str, Any]:
        height, width = part.shape[1:]
        sample = T.AugInput(np.ascontiguousarray(part.cpu().numpy().transpose(1, 2, 0)))
        self.augmentations(sample)
        image = torch.as_tensor(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
        return {"image": image, "height": height, "width": width}


def sliced(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The detector of a config, as TEST.TILES says; it is ``model`` itself without tiles.

    Raises:
        ConfigError: TEST.TILES cannot be used, or not with this detector.
    """
    slicing, sizes = build_slicing(cfg), cfg.INPUT
    if slicing is None:
        return model
    resize = T.ResizeShortestEdge([sizes.MIN_SIZE_TEST] * 2, sizes.MAX_SIZE_TEST)
    return SlicedDetector(model, slicing, [resize])


def check_tiles(cfg: CfgNode) -> None:
    """Refuse tiles that Detectron2 cannot train on or detect in.

    Raises:
        ConfigError: names the key that stands in the way.
    """
    samplers = ("TrainingSampler", "RandomSubsetTrainingSampler", "RepeatFactorTrainingSampler")
    refused = []
    if training_tiles(cfg):
        refused += [("INPUT", f"MODEL.{key}") for key in ("KEYPOINT_ON", "LOAD_PROPOSALS")]
        if cfg.DATALOADER.SAMPLER_TRAIN not in samplers:
            raise ConfigError(
                f"INPUT.TILES.ENABLED needs one of {samplers} in DATALOADER.SAMPLER_TRAIN, which "
                f"is {cfg.DATALOADER.SAMPLER_TRAIN}"
            )
    if build_slicing(cfg):
        refused += [("TEST", key) for key in ("MODEL.LOAD_PROPOSALS", "TEST.AUG.ENABLED")]
    for split, key in refused:
        if value_of(cfg, key):
            raise ConfigError(f"{split}.TILES.ENABLED does not go with {key} True; turn off one")
