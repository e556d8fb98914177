"""Checkpoints of networks with stages, Swin and MViTv2, fitted to a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dr2net_d2.weights.formats import STEM, matches
from dr2net_d2.weights.matching import match_tensors
from dr2net_d2.weights.report import CheckpointReport, Converted

OUTPUT_NORMS = ("norm[0-9].*", "scale[0-9]_norm.*")
CLASSIFIER = ("norm.*", "head.*", "cls_token", "*.attn_mask")


def convert_stages_checkpoint(checkpoint: Mapping[str, Tensor], model: nn.Module) -> Converted:
    """Fit the Swin or MViTv2 in a checkpoint to Detectron2's network of that name, or ours.

    Checkpoints of classifiers have no norms for the outputs; finetuning learns them.

    Args:
        checkpoint: under the names of the networks' authors, alone or within a larger model.
        model: the network to load; it is not changed.

    Returns:
        The tensors to load and the report.

    Raises:
        ValueError: the checkpoint has no such network, or several.
    """
    prefixes = [key.removesuffix(STEM) for key in checkpoint if key.endswith(STEM)]
    if len(prefixes) != 1:
        raise ValueError(f"there are {len(prefixes)} keys *{STEM}, and one network needs one")
    (prefix,) = prefixes
    report = CheckpointReport(f"a network of stages, under {prefix or 'its own names'}")
    keys = {key.removeprefix(prefix): key for key in checkpoint if key.startswith(prefix)}
    outside = set(checkpoint) - set(keys.values())
    report.dropped = dict.fromkeys(sorted(outside), "outside the network")
    state = {name: checkpoint[key] for name, key in keys.items()}
    converted = match_tensors(state, keys, model, report, _why_dropped)
    report.initialized = [key for key in report.missing if matches(key, OUTPUT_NORMS)]
    report.missing = [key for key in report.missing if key not in report.initialized]
    return converted, report


def _why_dropped(name: str) -> str | None:
    return "classifier" if matches(name, CLASSIFIER) else None
