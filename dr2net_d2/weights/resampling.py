"""Weights whose size is that of an image or a patch, brought to another size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_grid(grid: Tensor, side: int, antialias: bool = False, offset: float = 0.0) -> Tensor:
    """(1, C, S, S) -> (1, C, side, side), bicubically.

    Args:
        grid: position embeddings.
        side: in tokens.
        antialias: low-pass filter where the grid shrinks.
        offset: added to ``side`` in the scale between the two grids, as DINOv2 does by 0.1.
    """
    if offset:
        scale = (side + offset) / grid.shape[-1]
        return F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
    return F.interpolate(grid, size=(side, side), mode="bicubic", antialias=antialias)


def split_positions(table: Tensor, most_prefix_tokens: int) -> tuple[Tensor, Tensor] | None:
    """The rows of prefix tokens (1, N, C) and the grid (1, C, S, S) of a position table.

    Args:
        table: (1, N + S * S, C) or (1, S, S, C). N is 0 where the model adds positions before it
            prepends its tokens, and may count some of them only.
        most_prefix_tokens: N at most.

    Returns:
        None for a grid that is not square.
    """
    rows = table.float().flatten(1, -2)
    side = math.isqrt(rows.shape[1])
    prefix = rows.shape[1] - side**2
    if prefix > most_prefix_tokens:
        return None
    grid = rows[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return rows[:, :prefix], grid


def resize_relative_positions(table: Tensor, length: int) -> Tensor:
    """(L, C) -> (length, C), linearly."""
    return F.interpolate(table.float().T[None], size=length, mode="linear")[0].T


def resize_patches(kernel: Tensor, size: int) -> Tensor:
    """A patch embedding for patches of another size.

    Its inner product with a patch that was enlarged bicubically is what the given kernel's was with
    the patch before; the closest to that where patches shrink (FlexiViT, Beyer et al.,
    arXiv 2212.08013).

    Args:
        kernel: (C, channels, P, P).
        size: px.

    Returns:
        (C, channels, size, size).
    """
    old = kernel.shape[-1]
    pixels = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resized = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    inverse = torch.linalg.pinv(resized.flatten(1))
    return (kernel.double().flatten(2) @ inverse.T).unflatten(2, (size, size)).to(kernel.dtype)
