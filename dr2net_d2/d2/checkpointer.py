"""Detectron2's checkpoint formats, written atomically and loaded strictly."""

from __future__ import annotations

from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from dr2net_d2.checkpointer import StrictCheckpointer


class Dr2NetCheckpointer(StrictCheckpointer, DetectionCheckpointer):
    """``StrictCheckpointer`` for all formats of ``DetectionCheckpointer``, its .pkl zoo included.

    Only the main process writes. A model without a plain ViT is loaded as Detectron2 does it, with
    its name heuristics.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().load(path, *args, **kwargs)
        finally:
            # Detectron2 keeps this when a load fails, and refuses every later one.
            self._parsed_url_during_load = None
