"""The optimizer of a ViT detector: layer-wise learning rates, weight decay by parameter."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from dr2net_d2.config import require_plain_vit
from dr2net_d2.errors import ConfigError

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def layer_decay_factor(name: str, depth: int, decay: float) -> float:
    """Learning-rate factor of a parameter: ``decay`` to the power of the number of layers above it.

    As in ViTDet (arXiv 2203.16527) and BEiT, the embeddings are layer 0 and block i is layer i + 1.
    The rest of the detector is layer depth + 1, which has the full rate.

    Args:
        name: name of the parameter in the detector.
        depth: number of blocks.
        decay: factor from one layer to the one below.
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
    weight_decay_overrides: Sequence[tuple[str, float]] = (),
) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay.

    Args:
        model: the detector.
        base_lr: full learning rate.
        weight_decay: weight decay of all parameters but those of norm layers.
        weight_decay_norm: weight decay of norm layers.
        layer_decay: see ``layer_decay_factor``.
        depth: number of blocks.
        weight_decay_overrides: pairs of a name pattern and a weight decay for the parameters that
            match it; the last match counts.

    Returns:
        Optimizer groups with "params", "lr" and "weight_decay"; a shared parameter is in one group.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            full_name = f"{module_name}.{name}" if module_name else name
            decay = weight_decay_norm if isinstance(module, _NORMS) else weight_decay
            for pattern, override in weight_decay_overrides:
                if fnmatch.fnmatchcase(full_name, pattern):
                    decay = override
            lr = base_lr * layer_decay_factor(full_name, depth, layer_decay)
            groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW as cfg.SOLVER describes it, which clips gradients before each step.

    With CLIP_GRADIENTS.CLIP_TYPE "value" each element is clipped, with "norm" the norm of each
    parameter's gradient, as in Detectron2, and with "full_model" the norm of all gradients
    together, as in ViTDet's recipe.

    Raises:
        ConfigError: there is no trainable parameter, the optimizer or clip type is unknown, an
            override is not a pair, or LAYER_DECAY is set for a backbone without a plain ViT.
    """
    solver = cfg.SOLVER
    if solver.LAYER_DECAY != 1:
        require_plain_vit(cfg, f"SOLVER.LAYER_DECAY {solver.LAYER_DECAY} (1 turns it off)")
    groups = parameter_groups(
        model,
        solver.BASE_LR,
        solver.WEIGHT_DECAY,
        solver.WEIGHT_DECAY_NORM,
        solver.LAYER_DECAY,
        cfg.MODEL.VIT.DEPTH,
        _overrides(solver.WEIGHT_DECAY_OVERRIDES),
    )
    if not groups:
        raise ConfigError("no parameter of the model is trainable; unfreeze some")
    optimizer: torch.optim.Optimizer
    if solver.OPTIMIZER == "AdamW":
        optimizer = torch.optim.AdamW(groups, lr=solver.BASE_LR)
    elif solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(
            groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV
        )
    else:
        raise ConfigError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; use 'SGD' or 'AdamW'")
    if solver.CLIP_GRADIENTS.ENABLED:
        parameters = [parameter for group in groups for parameter in group["params"]]
        clip = _clipping(solver.CLIP_GRADIENTS, parameters)

        def before_step(*_: Any) -> None:
            clip()

        # With a GradScaler, the step and therefore this hook come after unscaling.
        optimizer.register_step_pre_hook(before_step)
    return optimizer


def _overrides(pairs: Any) -> list[tuple[str, float]]:
    """SOLVER.WEIGHT_DECAY_OVERRIDES after a check of its values."""
    for pair in pairs:
        match pair:
            case [str(), int() | float() as decay] if decay >= 0:
                continue
        raise ConfigError(
            f"SOLVER.WEIGHT_DECAY_OVERRIDES has {pair!r}; list pairs of a name pattern and a "
            "weight decay of 0 or more, such as ['*pos_embed', 0.0]"
        )
    return [tuple(pair) for pair in pairs]


def _clipping(clip: CfgNode, parameters: list[nn.Parameter]) -> Callable[[], object]:
    """A function that clips the gradients of the parameters, as CLIP_GRADIENTS says."""
    norm, value = nn.utils.clip_grad_norm_, clip.CLIP_VALUE
    if clip.CLIP_TYPE == "value":
        return lambda: nn.utils.clip_grad_value_(parameters, value)
    if clip.CLIP_TYPE == "norm":
        return lambda: [norm([parameter], value, clip.NORM_TYPE) for parameter in parameters]
    if clip.CLIP_TYPE == "full_model":
        return lambda: norm(parameters, value, clip.NORM_TYPE)
    raise ConfigError(
        f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; use 'value', 'norm' or "
        "'full_model'"
    )
