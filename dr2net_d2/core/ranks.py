"""Sharded parameters: ranks whose forwards communicate, and so must repeat a pass together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map


def groups_of_shards(parameters: Iterable[nn.Parameter]) -> list[dist.ProcessGroup]:
    """The process groups that these parameters are sharded over (FSDP2, tensor parallelism)."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.tensor import DTensor

    # A dict keeps the order, which must be the same on all ranks.
    meshes = dict.fromkeys(p.device_mesh for p in parameters if isinstance(p, DTensor))
    return [group for mesh in meshes for group in mesh.get_all_groups()]


def largest(value: float, groups: list[dist.ProcessGroup], device: torch.device) -> float:
    """The largest value on any rank of the groups; infinite if one is nan."""
    if not groups:
        return value
    value = math.inf if math.isnan(value) else value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    for group in groups:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group)
    return tensor.item()


def whole(tree: Any, keep: bool = True) -> Any:
    """A tree of containers with every sharded tensor (DTensor) gathered on the CPU.

    Ranks gather one tensor after another, so every rank must call this.

    Args:
        tree: nested dicts, lists and tuples.
        keep: False leaves None in place of the gathered tensors, on a rank that does not need them.
    """

    def gathered(leaf: Any) -> Any:
        if not hasattr(leaf, "full_tensor"):
            return leaf
        tensor = leaf.full_tensor()
        return tensor.cpu() if keep else None

    return tree_map(gathered, tree)
