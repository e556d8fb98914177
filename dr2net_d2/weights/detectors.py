"""Checkpoints of whole detectors, fitted to a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dr2net_d2.weights.formats import matches
from dr2net_d2.weights.matching import match_tensors
from dr2net_d2.weights.report import CheckpointReport, Converted

FROM_CONFIG = ("pixel_mean", "pixel_std", "*anchor_generator.cell_anchors*")
"""Buffers that only some checkpoints have, and that the config determines."""


def convert_detector_checkpoint(checkpoint: Mapping[str, Tensor], model: nn.Module) -> Converted:
    """Fit the checkpoint of a whole detector to a detector with the same names.

    Args:
        checkpoint: saved from the detector, or from its DistributedDataParallel wrapper.
        model: the detector to load; it is not changed.

    Returns:
        The tensors to load and the report.
    """
    state = {key.removeprefix("module."): tensor for key, tensor in checkpoint.items()}
    report = CheckpointReport("a detector")
    converted = match_tensors(state, {key: key for key in state}, model, report, _why_dropped)
    report.missing = [key for key in report.missing if not matches(key, FROM_CONFIG)]
    return converted, report


def _why_dropped(name: str) -> str | None:
    return "the config determines it" if matches(name, FROM_CONFIG) else None
