"""Checkpoints of plain ViTs, fitted to a model: dict in, dict and report out, no files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dr2net_d2.weights.formats import (
    MAX_PREFIX_TOKENS,
    STEM,
    CheckpointFormat,
    describe_vit,
    find_plain_vit,
    foreign_parts,
    matches,
    why_unused,
)
from dr2net_d2.weights.matching import host_scalars, match_tensors
from dr2net_d2.weights.report import CheckpointReport, Converted
from dr2net_d2.weights.resampling import resize_patches, resize_relative_positions, split_positions

RELATIVE_POSITIONS = ("*.rel_pos_h", "*.rel_pos_w")
"""Parameters that ViTDet adds to pretrained blocks and learns during finetuning, from zero."""

LAYER_SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
"""LayerScale -> the linear layer in front of it."""


def convert_vit_checkpoint(checkpoint: Mapping[str, Tensor], model: nn.Module) -> Converted:
    """Fit the plain ViT in a checkpoint to a ``Dr2NetViT`` or Detectron2's ``ViT``.

    LayerScale, gamma * (W x + b), is folded into W and b. Position tables are resized as in the
    checkpoint's own code, tables of relative positions linearly, and patch embeddings as in
    FlexiViT (arXiv 2212.08013). The class token's row of the position table is added or removed
    according to the model's ``pretrain_use_cls_token``.

    Args:
        checkpoint: of any format in ``formats.FORMATS``, alone or within a larger model.
        model: the ViT to load, on any device; it is not changed.

    Returns:
        The tensors to load, under the model's names, and the report.

    Raises:
        ValueError: the checkpoint has no plain ViT, or several.
    """
    vit = find_plain_vit(checkpoint)
    report = CheckpointReport(vit.format.name)
    if vit.prefix:
        report.source += f", under {vit.prefix}"
    outside = f"outside the ViT, which is under {vit.prefix}"
    report.dropped = {key: outside for key in checkpoint if not key.startswith(vit.prefix)}
    state = dict(vit.state)
    report.folded = {vit.keys[name]: layer for name, layer in _fold_layer_scales(state).items()}
    report.differences = [*foreign_parts(state), *_differences(state, model.state_dict())]
    has_cls_token = bool(getattr(model, "pretrain_use_cls_token", False))

    def resize(name: str, tensor: Tensor, target: Tensor) -> Tensor:
        return _resized(name, tensor, target, vit.format, has_cls_token)

    converted = match_tensors(state, vit.keys, model, report, why_unused, resize)
    if not any(matches(name, RELATIVE_POSITIONS) for name in state):
        report.initialized = [key for key in report.missing if matches(key, RELATIVE_POSITIONS)]
        report.missing = [key for key in report.missing if key not in report.initialized]
    return converted, report


def plain_vit_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without Dr2Net's scalars, which a plain network loads strictly."""
    scalars = host_scalars(model)
    return {key: tensor for key, tensor in model.state_dict().items() if key not in scalars}


def _fold_layer_scales(state: dict[str, Tensor]) -> dict[str, str]:
    """Fold each LayerScale into the layer in front of it; returns LayerScale -> layer."""
    folded = {}
    for name in [name for name in state if name.endswith(tuple(LAYER_SCALES))]:
        block, _, scale = name.rpartition(".ls")
        layer = f"{block}.{LAYER_SCALES[f'ls{scale}']}"
        weight = state.get(f"{layer}.weight")
        if weight is None or len(weight) != len(state[name]):
            continue
        gamma = state.pop(name).float()
        state[f"{layer}.weight"] = weight * gamma[:, None]
        bias = state.get(f"{layer}.bias")
        if bias is not None:
            state[f"{layer}.bias"] = bias * gamma
        folded[name] = layer
    return folded


def _differences(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Phrases for differences between two networks that resizing cannot remove."""
    theirs, ours = describe_vit(state), describe_vit(target)
    return [
        f"{name} is {theirs[name]} in the weights, but {ours[name]} in the model"
        for name in ("embed_dim", "depth", "mlp_ratio", "qkv_bias", "in_chans")
        if name in theirs and theirs[name] != ours[name]
    ]


def _resized(
    name: str,
    tensor: Tensor,
    target: Tensor,
    checkpoint_format: CheckpointFormat,
    has_cls_token: bool,
) -> Tensor:
    """The tensor resized to the target's shape; the tensor itself if other dimensions differ."""
    if name == STEM and tensor.shape[:2] == target.shape[:2]:
        return resize_patches(tensor, target.shape[-1])
    if tensor.shape[-1:] == target.shape[-1:]:
        if matches(name, RELATIVE_POSITIONS):
            return resize_relative_positions(tensor, len(target))
        if name == "pos_embed":
            return _resized_positions(tensor, target, checkpoint_format, has_cls_token)
    return tensor


def _resized_positions(
    table: Tensor, target: Tensor, checkpoint_format: CheckpointFormat, has_cls_token: bool
) -> Tensor:
    parts = split_positions(table, MAX_PREFIX_TOKENS)
    if parts is None:
        return table
    prefix, grid = parts
    side = round((target.shape[1] - has_cls_token) ** 0.5)
    if side != grid.shape[-1]:
        grid = checkpoint_format.resize(grid, side)
    rows = grid.flatten(2).transpose(1, 2)
    if not has_cls_token:
        return rows
    cls_row = prefix[:, :1] if prefix.shape[1] else rows.new_zeros(1, 1, rows.shape[2])
    return torch.cat([cls_row, rows], dim=1)
