"""Fully sharded training (FSDP2) in place of DistributedDataParallel, for large detectors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, fp16_compression: bool = False) -> None:
    """Shard the parameters of a detector, and with them their gradients, over all processes.

    The attention and the MLP of every transformer block are gathered one at a time, because a
    reversible block is called once for each. All other parameters, among them the few that a block
    holds itself, may be used outside their modules, so they are gathered for a whole iteration.
    Parameters are kept and gathered in full precision; autocast casts them as in one process.

    All processes start with the parameters and buffers of the first one. The detector goes on
    loading ordinary state dicts. The optimizer has to be built afterwards. With one process nothing
    changes.

    Args:
        model: on its device, changed in place.
        fp16_compression: reduce gradients in float16.

    Raises:
        ValueError: a parameter cannot be sharded, for example because it has no dimension.
    """
    if comm.get_world_size() == 1:
        return
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    device = next(model.parameters()).device
    # The warning is about in-place changes to the output, and nothing changes that of these parts.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (comm.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float16 if fp16_compression else None)
    for name, part in [*model.named_modules()]:
        if name.endswith((".attn", ".mlp")):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        module.register_load_state_dict_pre_hook(_load_shards)


def _load_shards(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if prefix + name in state_dict:
            state_dict[prefix + name] = placed_like(parameter, state_dict[prefix + name])


def placed_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Move a whole tensor to the device, and into the shards, of a parameter of its shape."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def load_optimizer_shards(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """Convert the state of an unsharded optimizer; a hook to run before ``load_state_dict``."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for index, values in state_dict["state"].items():
        parameter = parameters[index]
        state[index] = {
            name: placed_like(parameter, value) if _is_of_shape(value, parameter) else value
            for name, value in values.items()
        }
    return {**state_dict, "state": state}


def _is_of_shape(value: Any, parameter: Tensor) -> bool:
    """Whether a value of the state belongs to the elements of a parameter, unlike "step"."""
    return isinstance(value, Tensor) and value.shape == parameter.shape


@contextmanager
def without_reduction(model: FSDPModule) -> Iterator[None]:
    """A context in which gradients accumulate in their process, as under DDP's ``no_sync``."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """A context in which every process has all parameters, so that forwards need no gathering.

    Otherwise a process with more images to evaluate would wait for those that have none left.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)
