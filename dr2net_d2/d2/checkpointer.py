"""Detectron2's checkpoint formats, written atomically and loaded strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.backbone.mvit import MViT
from detectron2.modeling.backbone.swin import SwinTransformer
from torch import nn

from dr2net_d2.weights import Converter, StrictCheckpointer, convert_stages_checkpoint

LEGACY_AUTHORS = {".pkl": "Caffe2", ".pyth": "pycls"}
"""The author that Detectron2 assumes for files without one, which it matches by heuristics."""


class Dr2NetCheckpointer(StrictCheckpointer, DetectionCheckpointer):
    """``StrictCheckpointer`` for all formats of ``DetectionCheckpointer``, .pkl files included.

    Only the main process writes. A detector whose backbone is neither a ViT nor Swin nor MViTv2 is
    loaded like in Detectron2, by its name heuristics.
    """

    def _pretrained_part(self) -> tuple[str, nn.Module, Converter] | None:
        for name, module in self.model.named_modules():
            if isinstance(module, (SwinTransformer, MViT)):
                return name, module, convert_stages_checkpoint
        return super()._pretrained_part()

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().load(path, *args, **kwargs)
        finally:
            # Detectron2 leaves this set after a failed load, and then refuses every other load.
            self._parsed_url_during_load: Any = None

    def _load_file(self, f: str) -> dict[str, Any]:
        checkpoint = super()._load_file(f)
        author = LEGACY_AUTHORS.get(Path(f).suffix)
        if author and "__author__" not in checkpoint:
            checkpoint |= {"__author__": author, "matching_heuristics": True}
            statistics = ("_momentum", "num_batches_tracked")
            for key in [key for key in checkpoint["model"] if key.endswith(statistics)]:
                del checkpoint["model"][key]
        if "matching_heuristics=True" in self._parsed_url_during_load.query:
            checkpoint["matching_heuristics"] = True
        return checkpoint
