"""Plain ViT checkpoints -> ``Dr2NetViT``: dict in, dict and report out, no files.

MAE, timm and Detectron2's ViTDet name the blocks alike; they differ in prefixes, in what surrounds
the blocks, and in the sizes of the position tables.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dr2net_d2.core.coefficients import HostScalars

PREFIXES = ("module.", "model.", "backbone.", "net.", "encoder.")
"""Prefixes that wrap a ViT in other people's checkpoints; stripped while every ViT key has one."""

UNUSED_BY_DETECTORS = ("cls_token", "mask_token", "norm.*", "fc_norm.*", "head.*", "decoder*")
"""What a pretraining checkpoint has around the blocks and ViTDet does not use."""

FINETUNED_FROM_SCRATCH = ("*.rel_pos_h", "*.rel_pos_w")
"""What ViTDet adds to the pretrained blocks and learns during finetuning."""


@dataclass
class CheckpointReport:
    """Where every key of the checkpoint and of the model went.

    Attributes:
        loaded: keys taken over unchanged.
        resized: key -> (shape in the checkpoint, shape in the model), position tables.
        missing: keys of the model that the checkpoint lacks.
        unexpected: keys of the checkpoint that the model lacks.
        mismatched: key -> (shape in the checkpoint, shape in the model), not loadable.
    """

    loaded: list[str] = field(default_factory=list)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def problems(
        self,
        allow_missing: Sequence[str] = FINETUNED_FROM_SCRATCH,
        allow_unexpected: Sequence[str] = UNUSED_BY_DETECTORS,
    ) -> list[str]:
        """One phrase for each key that makes the load partial, beyond the allowed patterns."""
        return [
            *(f"missing {k}" for k in self.missing if not _matches(k, allow_missing)),
            *(f"unexpected {k}" for k in self.unexpected if not _matches(k, allow_unexpected)),
            *(
                f"{key} is {source}, the model's {target}"
                for key, (source, target) in self.mismatched.items()
            ),
        ]

    def summary(self) -> str:
        """One line: how many keys were loaded and resized, which were missing or left over."""
        parts = [f"{len(self.loaded)} loaded"]
        parts += [f"resized {key} {old} -> {new}" for key, (old, new) in self.resized.items()]
        if self.missing:
            parts.append("not in the checkpoint: " + ", ".join(self.missing))
        if self.unexpected:
            parts.append("left over: " + ", ".join(self.unexpected))
        return "; ".join(parts)


def convert_vit_checkpoint(
    checkpoint: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], CheckpointReport]:
    """Fit a plain ViT checkpoint to a ``Dr2NetViT``.

    Args:
        checkpoint: names and tensors of MAE, timm or Detectron2.
        model: the ViT to be filled; it is not changed.

    Returns:
        The tensors to load, under the model's names, and the report. Absolute position tables are
        resized bicubically, relative ones linearly; a missing or superfluous class token row is
        accounted for.
    """
    targets = {
        key: tensor for key, tensor in model.state_dict().items() if key not in _host_scalars(model)
    }
    has_cls_token = bool(getattr(model, "pretrain_use_cls_token", False))
    converted: dict[str, Tensor] = {}
    report = CheckpointReport()
    for key, tensor in _strip_prefixes(checkpoint, targets).items():
        target = targets.get(key)
        if target is None:
            if key not in _host_scalars(model):
                report.unexpected.append(key)
            continue
        fitted = tensor
        if tensor.shape != target.shape:
            if key == "pos_embed":
                fitted = _resize_absolute(tensor, target, has_cls_token)
            elif key.endswith(("rel_pos_h", "rel_pos_w")):
                fitted = _resize_relative(tensor, target)
        shapes = (tuple(tensor.shape), tuple(target.shape))
        if fitted.shape != target.shape:
            report.mismatched[key] = shapes
            continue
        if fitted is not tensor:
            report.resized[key] = shapes
        else:
            report.loaded.append(key)
        converted[key] = fitted.to(target.dtype)
    seen = converted.keys() | report.mismatched.keys()
    report.missing = [key for key in targets if key not in seen]
    return converted, report


def plain_vit_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without what only Dr2Net has: a plain network loads it strictly."""
    scalars = _host_scalars(model)
    return {key: tensor for key, tensor in model.state_dict().items() if key not in scalars}


def _host_scalars(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, HostScalars)
        for name in module.state_dict()
    }


def _strip_prefixes(
    checkpoint: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    stripped = dict(checkpoint)
    while not stripped.keys() & targets.keys():
        for prefix in PREFIXES:
            if any(key.startswith(prefix) for key in stripped):
                stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}
                break
        else:
            break
    return stripped


def _resize_absolute(table: Tensor, target: Tensor, has_cls_token: bool) -> Tensor:
    """(1, P, C) -> the target's (1, P', C); the input itself where the widths differ."""
    if table.dim() != 3 or table.shape[2] != target.shape[2]:
        return table
    tokens = table.shape[1]
    # A square number of rows is a bare grid; one row more is a grid with a class token.
    extra = 0 if math.isqrt(tokens) ** 2 == tokens else 1
    side, side_out = math.isqrt(tokens - extra), math.isqrt(target.shape[1] - has_cls_token)
    if side**2 != tokens - extra:
        return table
    grid = table[:, extra:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if side != side_out:
        grid = F.interpolate(grid, size=(side_out, side_out), mode="bicubic")
    grid = grid.flatten(2).transpose(1, 2)
    if not has_cls_token:
        return grid
    cls_row = table[:, :1].float() if extra else grid.new_zeros(1, 1, grid.shape[2])
    return torch.cat([cls_row, grid], dim=1)


def _resize_relative(table: Tensor, target: Tensor) -> Tensor:
    """(L, C) -> the target's (L', C), linearly; the input itself where the widths differ."""
    if table.dim() != 2 or table.shape[1] != target.shape[1]:
        return table
    return F.interpolate(table.float().T[None], size=len(target), mode="linear")[0].T


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
