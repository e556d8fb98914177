"""The alternative to compare with: a stack with one of torch's checkpoints per block."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dr2net_d2.core.coupling import couple
from dr2net_d2.core.reversible import ReversibleSequence
from dr2net_d2.core.steps import Step


def checkpointed(stack: ReversibleSequence, x: Tensor, preserve_rng_state: bool = False) -> Tensor:
    """Run a stack in floating point, with one of torch's checkpoints per block.

    Args:
        stack: its coefficients, first state and output are used.
        x: ``(..., C)``.
        preserve_rng_state: needed by blocks that draw random numbers, as drop path does.

    Returns:
        h_n, of the shape of x.
    """
    h1 = x
    h2 = h1 if stack.first_state == "copy" else torch.zeros_like(h1)
    steps = stack.steps()
    size = len(steps) // len(stack)
    for start in range(0, len(steps), size):
        # At beta 0 a block does not read the older stream, which then need not be stored.
        h1, h2 = checkpoint(
            partial(_block, steps[start : start + size]),
            h1,
            h2 if steps[start].beta else None,
            use_reentrant=False,
            preserve_rng_state=preserve_rng_state,
        )
    return h1 if stack.output == "last" else (h1 + h2) / 2


def _block(steps: list[Step], h1: Tensor, h2: Tensor | None) -> tuple[Tensor, Tensor]:
    older = h1 if h2 is None else h2
    for step in steps:
        h = couple(step(h1), h1, older, step.alpha, step.beta)
        h1, older = h, h1
    return h1, older
