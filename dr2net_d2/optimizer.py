"""The optimizer of a ViT detector: layer-wise rates, weight decay where it belongs."""

from __future__ import annotations

from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from dr2net_d2.errors import ConfigError

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def layer_decay_factor(name: str, depth: int, decay: float) -> float:
    """Learning-rate factor of a parameter: ``decay`` to the number of layers above it.

    The embeddings are layer 0, block i is layer i + 1, the rest of the detector (depth + 1) keeps
    the full rate, as in ViTDet (arXiv 2203.16527) and BEiT.
    """
    layer = depth + 1
    if name.startswith("backbone"):
        if ".pos_embed" in name or ".patch_embed" in name:
            layer = 0
        elif ".blocks." in name:
            layer = int(name.split(".blocks.")[1].split(".")[0]) + 1
    return decay ** (depth + 1 - layer)


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float,
    layer_decay: float,
    depth: int,
) -> list[dict[str, Any]]:
    """Optimizer groups ``{params, lr, weight_decay}``, parameters of equal settings together.

    Norm layers get ``weight_decay_norm``, position embeddings none, everything else
    ``weight_decay``. Frozen parameters are left out, shared ones come once.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            decay = weight_decay_norm if isinstance(module, _NORMS) else weight_decay
            if name == "pos_embed":
                decay = 0.0
            full_name = f"{module_name}.{name}" if module_name else name
            lr = base_lr * layer_decay_factor(full_name, depth, layer_decay)
            groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW with the learning rates and weight decays of cfg.SOLVER."""
    solver = cfg.SOLVER
    groups = parameter_groups(
        model,
        solver.BASE_LR,
        solver.WEIGHT_DECAY,
        solver.WEIGHT_DECAY_NORM,
        solver.LAYER_DECAY,
        cfg.MODEL.VIT.DEPTH,
    )
    if not groups:
        raise ConfigError("no parameter of the model is trainable; unfreeze some")
    if solver.OPTIMIZER == "AdamW":
        return torch.optim.AdamW(groups, lr=solver.BASE_LR)
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(
            groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV
        )
    raise ConfigError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; use 'SGD' or 'AdamW'")
