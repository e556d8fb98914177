"""Sliced inference for Detectron2's detectors."""

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
from dr2net_d2.data.slicing import DetectedBoxes, Slicing
from dr2net_d2.errors import ConfigError


class SlicedDetector(nn.Module):
    """Runs a detector on the tiles of each image and merges the boxes.

    Inputs and outputs are those of ``model``, with images (C, H, W) uint8 in their original size.

    Args:
        model: a detector whose instances have boxes, scores and classes.
        slicing: how to tile images and to merge boxes.
        augmentations: applied to each tile, and to the whole image, in place of the mapper's.

    Raises:
        ConfigError: the model also predicts masks or keypoints, which cannot be merged.
    """

    def __init__(
        self, model: nn.Module, slicing: Slicing, augmentations: Sequence[Any] = ()
    ) -> None:
        super().__init__()
        heads = getattr(model, "roi_heads", None)
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"{kind}_on", False):
                raise ConfigError(
                    f"sliced inference merges boxes, and the detector finds {kind}s as well; set "
                    f"MODEL.{kind.upper()}_ON False, or detect in whole images"
                )
        self.model = model
        self.slicing = slicing
        self.augmentations = T.AugmentationList(augmentations)
        self.training = model.training

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        return [{"instances": self._instances(inputs)} for inputs in batched_inputs]

    def _instances(self, inputs: dict[str, Any]) -> Instances:
        image = inputs["image"]
        boxes, scores, labels = self.slicing.detect(image, self._detect)
        height, width = image.shape[1:]
        instances = Instances(
            (height, width), pred_boxes=Boxes(boxes), scores=scores, pred_classes=labels
        )
        return detector_postprocess(
            instances, inputs.get("height", height), inputs.get("width", width)
        )

    def _detect(self, tiles: list[Tensor]) -> list[DetectedBoxes]:
        outputs = self.model([self._resized(tile) for tile in tiles])
        instances = (output["instances"] for output in outputs)
        return [DetectedBoxes(i.pred_boxes.tensor, i.scores, i.pred_classes) for i in instances]

    def _resized(self, tile: Tensor) -> dict[str, Any]:
        height, width = tile.shape[1:]
        sample = T.AugInput(np.ascontiguousarray(tile.cpu().numpy().transpose(1, 2, 0)))
        self.augmentations(sample)
        image = torch.as_tensor(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
        return {"image": image, "height": height, "width": width}


def sliced(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """``model``, wrapped to go over tiles if TEST.TILES is enabled.

    Raises:
        ConfigError: TEST.TILES has values that cannot be used, or the detector cannot be sliced.
    """
    slicing, sizes = build_slicing(cfg), cfg.INPUT
    if slicing is None:
        return model
    resize = T.ResizeShortestEdge([sizes.MIN_SIZE_TEST] * 2, sizes.MAX_SIZE_TEST)
    return SlicedDetector(model, slicing=slicing, augmentations=[resize])


def check_tiles(cfg: CfgNode) -> None:
    """Refuse INPUT.TILES and TEST.TILES where other keys rule tiles out.

    Raises:
        ConfigError: it names the key to change.
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
            raise ConfigError(
                f"{split}.TILES.ENABLED and {key} are both True; turn off one of them"
            )
