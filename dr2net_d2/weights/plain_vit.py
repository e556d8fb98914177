"""Checkpoints -> models: dict in, dict and report out, no files.

Every key of a checkpoint and of the model is accounted for in the report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dr2net_d2.core.coefficients import HostScalars
from dr2net_d2.weights.formats import (
    MOST_PREFIX_TOKENS,
    STEM,
    Format,
    describe_vit,
    find_plain_vit,
    foreign_parts,
    matches,
    why_unused,
)
from dr2net_d2.weights.resampling import resize_patches, resize_relative_positions, split_positions

LEARNED_ANEW = ("*.rel_pos_h", "*.rel_pos_w")
"""What ViTDet adds to the pretrained blocks and learns during finetuning, from zero."""

OUTPUT_NORMS = ("norm[0-9].*", "scale[0-9]_norm.*")
OF_CLASSIFIERS = ("norm.*", "head.*", "cls_token", "*.attn_mask")

COEFFICIENTS = ("*coefficients.alpha", "*coefficients.beta")
STREAM_RANGE = ("*stream_range.*",)

FROM_CONFIG = ("pixel_mean", "pixel_std", "*anchor_generator.cell_anchors*")
"""Buffers in some detectors' checkpoints that the config determines."""

LAYER_SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass
class CheckpointReport:
    """Where every key of the checkpoint and of the model went.

    Keys are the checkpoint's, but for ``missing`` and ``anew``. All but ``missing``, ``anew`` and
    ``differences`` together are the checkpoint.

    Attributes:
        source: whose checkpoint it is, and where in it the ViT was found.
        loaded: taken over unchanged.
        resized: key -> (shape in the checkpoint, shape in the model), tables and patches.
        folded: LayerScale -> the layer that it was multiplied into.
        dropped: key -> why the model does without.
        anew: keys of the model that no checkpoint of the family has; they are learned.
        missing: keys of the model that the checkpoint lacks.
        unexpected: keys of the checkpoint that the model has no place for.
        mismatched: key -> (shape in the checkpoint, shape in the model), not loadable.
        differences: phrases, how the network in the checkpoint differs from the model.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, Shapes] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    anew: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, Shapes] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def problems(self, allow: Sequence[str] = ()) -> list[str]:
        """Phrases for what makes the load partial, but for keys that match patterns."""
        partial = [
            *(f"missing {key}" for key in self.missing if not matches(key, allow)),
            *(f"unexpected {key}" for key in self.unexpected if not matches(key, allow)),
            *(
                f"{key} is {old}, the model's {new}"
                for key, (old, new) in self.mismatched.items()
                if not matches(key, allow)
            ),
        ]
        return [*self.differences, *_condensed(partial)] if partial else []

    def lines(self, brief: bool = False) -> list[str]:
        """A line for each fate; keys that differ in the block's number alone stand as one.

        Args:
            brief: without the keys that were taken unchanged or left out for a reason.
        """
        resized = (f"{key} {old} -> {new}" for key, (old, new) in self.resized.items())
        wrong = (f"{key} {old}, the model's {new}" for key, (old, new) in self.mismatched.items())
        expected: dict[str, list[str]] = {"taken": self.loaded}
        for key, why in self.dropped.items():
            expected.setdefault(f"left out, {why}", []).append(key)
        notable: dict[str, Iterable[str]] = {
            "resized": resized,
            "folded": (f"{key} into {layer}" for key, layer in self.folded.items()),
            "learned anew": self.anew,
            "missing": self.missing,
            "left over": self.unexpected,
            "of another shape": wrong,
        }
        lines = [f"source: {self.source}"]
        for fate, keys in expected.items():
            lines.append(f"{fate} ({len(keys)})" + f": {', '.join(_condensed(keys))}" * (not brief))
        for fate, phrases in notable.items():
            if phrases := list(phrases):
                lines.append(f"{fate} ({len(phrases)}): {', '.join(_condensed(phrases))}")
        return lines


Converted = tuple[dict[str, Tensor], CheckpointReport]
"""Tensors under the names of a model, and where they came from."""


def convert_vit_checkpoint(checkpoint: Mapping[str, Tensor], model: nn.Module) -> Converted:
    """Fit the plain ViT in a checkpoint to a ViT of ours or Detectron2's.

    LayerScale, F = gamma * (W x + b), becomes part of W and b. Position tables are resized by the
    source's rule, relative ones linearly, the patch embedding by FlexiViT's; a class token's row of
    the table comes and goes with the model's ``pretrain_use_cls_token``.

    Args:
        checkpoint: of any of ``formats.FORMATS``, alone or within a larger model.
        model: the ViT to be filled, on any device; it is not changed.

    Returns:
        The tensors to load, under the model's names, and the report.

    Raises:
        ValueError: there is no plain ViT in the checkpoint, or several.
    """
    vit = find_plain_vit(checkpoint)
    report = CheckpointReport(vit.family.name)
    if vit.prefix:
        report.source += f", under {vit.prefix}"
    outside = f"outside the ViT, which is under {vit.prefix}"
    report.dropped = {key: outside for key in checkpoint if not key.startswith(vit.prefix)}
    state = dict(vit.state)
    report.folded = {vit.keys[name]: layer for name, layer in _fold_layer_scales(state).items()}
    report.differences = [*foreign_parts(state), *_differences(state, model.state_dict())]
    has_cls_token = bool(getattr(model, "pretrain_use_cls_token", False))

    def fit(name: str, tensor: Tensor, target: Tensor) -> Tensor:
        return _resized(name, tensor, target, vit.family, has_cls_token)

    converted = _match(state, vit.keys, model, report, fit, why_unused)
    if not any(matches(name, LEARNED_ANEW) for name in state):
        report.anew = [key for key in report.missing if matches(key, LEARNED_ANEW)]
        report.missing = [key for key in report.missing if key not in report.anew]
    return converted, report


def convert_stages_checkpoint(checkpoint: Mapping[str, Tensor], model: nn.Module) -> Converted:
    """Fit the Swin or MViTv2 in a checkpoint to Detectron2's network of that name, or ours.

    The norms of the outputs are learned anew where the checkpoint, of a classifier, has none.

    Args:
        checkpoint: in the names of the networks' authors, alone or within a larger model.
        model: the network to be filled; it is not changed.

    Returns:
        The tensors to load, under the model's names, and the report.

    Raises:
        ValueError: there is no such network in the checkpoint, or several.
    """
    prefixes = [key.removesuffix(STEM) for key in checkpoint if key.endswith(STEM)]
    if len(prefixes) != 1:
        raise ValueError(f"there are {len(prefixes)} keys *{STEM}, and one network needs one")
    prefix = prefixes[0]
    report = CheckpointReport(f"a network of stages, under {prefix or 'its own names'}")
    keys = {key.removeprefix(prefix): key for key in checkpoint if key.startswith(prefix)}
    outside = set(checkpoint) - set(keys.values())
    report.dropped = dict.fromkeys(sorted(outside), "outside the network")
    converted = _match(
        {name: checkpoint[key] for name, key in keys.items()},
        keys,
        model,
        report,
        lambda name, tensor, target: tensor,
        lambda name: "of the classifier" if matches(name, OF_CLASSIFIERS) else None,
    )
    report.anew = [key for key in report.missing if matches(key, OUTPUT_NORMS)]
    report.missing = [key for key in report.missing if key not in report.anew]
    return converted, report


def fit_detector_checkpoint(checkpoint: Mapping[str, Tensor], model: nn.Module) -> Converted:
    """Match the checkpoint of a whole detector with the model, name by name, shape by shape.

    Returns:
        The tensors to load and the report.
    """
    state = {key.removeprefix("module."): tensor for key, tensor in checkpoint.items()}
    report = CheckpointReport("a detector")
    converted = _match(
        state,
        {key: key for key in state},
        model,
        report,
        lambda name, tensor, target: tensor,
        lambda name: "the config determines it" if matches(name, FROM_CONFIG) else None,
    )
    report.missing = [key for key in report.missing if not matches(key, FROM_CONFIG)]
    return converted, report


def plain_vit_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without what only Dr2Net has: a plain network loads it strictly."""
    scalars = _host_scalars(model)
    return {key: tensor for key, tensor in model.state_dict().items() if key not in scalars}


def redundant_scalars(state: Mapping[str, Tensor]) -> dict[str, str]:
    """What Dr2Net saves and a plain network computes the same without: key -> why."""
    found = {key: "serves the reversible training" for key in state if matches(key, STREAM_RANGE)}
    coefficients = [key for key in state if matches(key, COEFFICIENTS)]
    if all(bool((state[key] == key.endswith("alpha")).all()) for key in coefficients):
        found |= dict.fromkeys(coefficients, "(1, 0) is the plain network")
    return found


def _match(
    state: Mapping[str, Tensor],
    keys: Mapping[str, str],
    model: nn.Module,
    report: CheckpointReport,
    fit: Callable[[str, Tensor, Tensor], Tensor],
    why_dropped: Callable[[str], str | None],
) -> dict[str, Tensor]:
    """The tensors of ``state`` that the model has; their fates, under ``keys``, in the report."""
    targets, scalars = model.state_dict(), _host_scalars(model)
    redundant = redundant_scalars(state)
    converted: dict[str, Tensor] = {}
    seen = set(scalars)
    for name, tensor in state.items():
        key, target = keys[name], targets.get(name)
        if target is None:
            if why := redundant.get(name) or why_dropped(name):
                report.dropped[key] = why
            else:
                report.unexpected.append(key)
            continue
        seen.add(name)
        fitted = tensor if tensor.shape == target.shape else fit(name, tensor, target)
        shapes = (tuple(tensor.shape), tuple(target.shape))
        # Coefficients are one pair, or one for each function.
        if fitted.shape != target.shape and name not in scalars:
            report.mismatched[key] = shapes
            continue
        if fitted is tensor:
            report.loaded.append(key)
        else:
            report.resized[key] = shapes
        converted[name] = fitted.to(target.dtype)
    report.missing = [name for name in targets if name not in seen]
    return converted


def _host_scalars(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, HostScalars)
        for name in module.state_dict()
    }


def _fold_layer_scales(state: dict[str, Tensor]) -> dict[str, str]:
    """Move LayerScale into the linear layers before it; its names -> the layers' names."""
    folded = {}
    for name in [name for name in state if name.endswith(tuple(LAYER_SCALES))]:
        block, _, scale = name.rpartition(".ls")
        layer = f"{block}.{LAYER_SCALES[f'ls{scale}']}"
        weight = state.get(f"{layer}.weight")
        if weight is None or len(weight) != len(state[name]):
            continue
        gamma = state.pop(name).float()
        state[f"{layer}.weight"] = weight * gamma[:, None]
        if (bias := state.get(f"{layer}.bias")) is not None:
            state[f"{layer}.bias"] = bias * gamma
        folded[name] = layer
    return folded


def _differences(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """What the weights show of their network, where resizing does not bridge it."""
    theirs, ours = describe_vit(state), describe_vit(target)
    return [
        f"{name} is {theirs[name]} in the weights, the model's {ours[name]}"
        for name in ("embed_dim", "depth", "mlp_ratio", "qkv_bias", "in_chans")
        if name in theirs and theirs[name] != ours[name]
    ]


def _resized(
    name: str, tensor: Tensor, target: Tensor, family: Format, has_cls_token: bool
) -> Tensor:
    """The tensor in the size of the target, or itself where sizes are not all that differs."""
    if name == STEM and tensor.shape[:2] == target.shape[:2]:
        return resize_patches(tensor, target.shape[-1])
    if tensor.shape[-1:] == target.shape[-1:]:
        if name.endswith((".rel_pos_h", ".rel_pos_w")):
            return resize_relative_positions(tensor, len(target))
        if name == "pos_embed":
            return _resized_positions(tensor, target, family, has_cls_token)
    return tensor


def _resized_positions(
    table: Tensor, target: Tensor, family: Format, has_cls_token: bool
) -> Tensor:
    parts = split_positions(table, MOST_PREFIX_TOKENS)
    if parts is None:
        return table
    prefix, grid = parts
    side = round((target.shape[1] - has_cls_token) ** 0.5)
    if side != grid.shape[-1]:
        grid = family.resize(grid, side)
    rows = grid.flatten(2).transpose(1, 2)
    if not has_cls_token:
        return rows
    cls_row = prefix[:, :1] if prefix.shape[1] else rows.new_zeros(1, 1, rows.shape[2])
    return torch.cat([cls_row, rows], dim=1)


def _condensed(phrases: Iterable[str]) -> list[str]:
    """Phrases that differ in the numbers between dots alone, as one with a star."""
    groups: dict[str, list[str]] = {}
    for phrase in phrases:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", phrase), []).append(phrase)
    return [
        group[0] if len(group) == 1 else f"{star} ({len(group)}x)" for star, group in groups.items()
    ]
