"""The four ways to compute a ViT that a plan compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from dr2net_d2.core import reversible_stacks
from dr2net_d2.core.attention import Attention
from dr2net_d2.core.checkpointed import checkpointed


@dataclass(frozen=True)
class Arm:
    """A way to compute a backbone.

    Attributes:
        stock: the engine's own ViT, or, on an engine without one, ours with all attention logits
            at once.
        checkpoints: one of torch's checkpoints per block.
        reversible: activations are rebuilt in the backward.
    """

    stock: bool = False
    checkpoints: bool = False
    reversible: bool = False


ARMS = {
    "stock": Arm(stock=True),
    "stock + checkpoint": Arm(stock=True, checkpoints=True),
    "our attention + checkpoint": Arm(checkpoints=True),
    "dr2net": Arm(reversible=True),
}
"""By the names in tables and files. Swin and MViT have Detectron2's attention in all of them."""


def arrange(backbone: nn.Module, arm: Arm) -> None:
    """Give a backbone the arithmetic, the attention and the checkpoints of an arm, for good."""
    stacks = reversible_stacks(backbone)
    for stack in stacks:
        stack.reversible = arm.reversible
        if not arm.reversible:
            stack.arithmetic = "float"
    if stacks and arm.stock:
        for module in backbone.modules():
            if isinstance(module, Attention):
                module.kernel = "matrix"
    if arm.checkpoints:
        _checkpoint_blocks(backbone, stacks)


def _checkpoint_blocks(backbone: nn.Module, stacks: list[Any]) -> None:
    """Checkpoint each block. Forwards are replaced, as wrappers would rename the parameters."""
    for stack in stacks:
        stack.forward = partial(checkpointed, stack)
    if stacks:
        return
    # A plain ViT has one list of blocks, Swin one in every stage.
    lists = [m for name, m in backbone.named_modules() if name.rpartition(".")[2] == "blocks"]
    block: Any
    for block in chain.from_iterable(module.children() for module in lists):
        block.forward = partial(_checkpoint, block.forward)


def _checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
