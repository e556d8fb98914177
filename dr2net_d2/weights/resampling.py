"""Resampling of weights that depend on the size of images or patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_grid(grid: Tensor, side: int, antialias: bool = False, offset: float = 0.0) -> Tensor:
    """Resize position embeddings bicubically.

    Args:
        grid: ``(1, C, S, S)``.
        side: new side, in tokens.
        antialias: apply a low-pass filter if the grid shrinks.
        offset: added to ``side`` in the scale between the two grids; DINOv2 adds 0.1.

    Returns:
        ``(1, C, side, side)``.
    """
    if offset:
        scale = (side + offset) / grid.shape[-1]
        return F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
    return F.interpolate(grid, size=(side, side), mode="bicubic", antialias=antialias)


def split_positions(table: Tensor, max_prefix_tokens: int) -> tuple[Tensor, Tensor] | None:
    """Split a position table into the rows of prefix tokens and the grid of patches.

    Args:
        table: ``(1, N + S * S, C)`` or ``(1, S, S, C)``. N may be less than the number of prefix
            tokens, because some models prepend tokens after they have added positions.
        max_prefix_tokens: maximum N.

    Returns:
        ``(1, N, C)`` and ``(1, C, S, S)``; None if the grid is not square.
    """
    rows = table.float().flatten(1, -2)
    side = math.isqrt(rows.shape[1])
    prefix = rows.shape[1] - side**2
    if prefix > max_prefix_tokens:
        return None
    grid = rows[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return rows[:, :prefix], grid


def resize_relative_positions(table: Tensor, length: int) -> Tensor:
    """Resize ``(L, C)`` to ``(length, C)`` linearly."""
    return F.interpolate(table.float().T[None], size=length, mode="linear")[0].T


def resize_patches(kernel: Tensor, size: int) -> Tensor:
    """Resize a patch embedding as in FlexiViT (Beyer et al., arXiv 2212.08013).

    With B x the bicubically resized patch x, the result w' minimises the mean squared difference
    between <w', B x> and <w, x> over patches of white noise; it is zero if patches grow.

    Args:
        kernel: w, ``(C, channels, P, P)``.
        size: new side of a patch, in pixels.

    Returns:
        w', ``(C, channels, size, size)``.
    """
    old = kernel.shape[-1]
    pixels = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resized = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    inverse = torch.linalg.pinv(resized.flatten(1))
    return (kernel.double().flatten(2) @ inverse.T).unflatten(2, (size, size)).to(kernel.dtype)
