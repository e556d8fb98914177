"""Matching of a checkpoint with a model, name by name and shape by shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from dr2net_d2.core.coefficients import HostScalars
from dr2net_d2.weights.formats import matches
from dr2net_d2.weights.report import CheckpointReport

COEFFICIENTS = ("*coefficients.alpha", "*coefficients.beta")
STREAM_RANGE = ("*stream_range.*",)


def match_tensors(
    state: Mapping[str, Tensor],
    keys: Mapping[str, str],
    model: nn.Module,
    report: CheckpointReport,
    why_dropped: Callable[[str], str | None],
    resize: Callable[[str, Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Select the tensors that a model has, and report on all of them.

    Args:
        state: name in the model -> tensor.
        keys: name in the model -> key of the checkpoint, as the report names it.
        model: the model; it is not changed.
        report: filled in.
        why_dropped: why the model does without a name, or None if the name is unexpected.
        resize: (name, tensor, the model's tensor) -> a tensor of the model's shape, or the tensor
            itself if it cannot be resized.

    Returns:
        The tensors to load, in the model's dtypes.
    """
    targets, scalars = model.state_dict(), host_scalars(model)
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
        fitted = tensor
        if resize is not None and tensor.shape != target.shape:
            fitted = resize(name, tensor, target)
        shapes = (tuple(tensor.shape), tuple(target.shape))
        # Coefficients have one value, or one for each function.
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


def host_scalars(model: nn.Module) -> set[str]:
    """Names in the model's state dict that only Dr2Net has: coefficients and stream ranges."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, HostScalars)
        for name in module.state_dict()
    }


def redundant_scalars(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Keys that Dr2Net saves and that do not change what a plain network computes -> why."""
    redundant = {
        key: "serves the reversible training" for key in state if matches(key, STREAM_RANGE)
    }
    coefficients = [key for key in state if matches(key, COEFFICIENTS)]
    if all(bool((state[key] == key.endswith("alpha")).all()) for key in coefficients):
        redundant |= dict.fromkeys(coefficients, "(1, 0) is the plain network")
    return redundant
