"""Attention over a grid of tokens: windows, decomposed relative positions, absolute positions.

The formulas come from ViTDet (Li et al., arXiv 2203.16527) and, for the relative positions, from
MViTv2 (arXiv 2112.01526). Parameter names are Detectron2's, so that its checkpoints load.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dr2net_d2.core.attention_kernels import KERNELS, choose_kernel


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, window_size, window_size, C), zero-padded at the end."""
    b, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, -w % window_size, 0, -h % window_size))
    rows, columns = x.shape[1] // window_size, x.shape[2] // window_size
    x = x.view(b, rows, window_size, columns, window_size, c).transpose(2, 3)
    return x.reshape(-1, window_size, window_size, c)


def window_unpartition(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo ``window_partition``: back to (B, H, W, C), with ``size`` = (H, W)."""
    h, w = size
    side, c = windows.shape[1], windows.shape[3]
    rows, columns = -(-h // side), -(-w // side)
    x = windows.view(-1, rows, columns, side, side, c).transpose(2, 3)
    return x.reshape(-1, rows * side, columns * side, c)[:, :h, :w]


def relative_positions(table: Tensor, size: int) -> Tensor:
    """A vector for every pair of a query's and a key's position on one axis.

    Args:
        table: (L, C), one vector for each distance; resized linearly unless L is 2 * size - 1.
        size: number of positions on the axis.

    Returns:
        (size, size, C): element [q, k] is the vector of distance q - k.
    """
    length = 2 * size - 1
    if len(table) != length:
        table = F.interpolate(table.T[None], size=length, mode="linear")[0].T
    positions = torch.arange(size, device=table.device)
    return table[positions[:, None] - positions[None, :] + size - 1]


def absolute_positions(table: Tensor, size: tuple[int, int], has_cls_token: bool) -> Tensor:
    """Position embeddings for a grid of any shape.

    Args:
        table: (1, P, C) with P a square number, plus one for a leading class token.
        size: (H, W) in tokens; the square table is resized bicubically if it differs.
        has_cls_token: whether the table begins with a class token, which is left out.

    Returns:
        (1, H, W, C).
    """
    table = table[:, 1:] if has_cls_token else table
    side = math.isqrt(table.shape[1])
    grid = table.reshape(1, side, side, -1)
    if (side, side) != tuple(size):
        grid = F.interpolate(grid.permute(0, 3, 1, 2), size=size, mode="bicubic")
        grid = grid.permute(0, 2, 3, 1)
    return grid


class Attention(nn.Module):
    """Multi-head self-attention, (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: C.
        num_heads: a divisor of C.
        qkv_bias: whether query, key and value have a bias.
        use_rel_pos: whether decomposed relative positions are added to the logits.
        rel_pos_zero_init: whether their tables start at zero.
        input_size: (H, W) in tokens that the tables are made for; for other sizes they are
            interpolated.

    Attributes:
        kernel: how attention with relative positions is computed, a name in
            ``attention_kernels.KERNELS``; "auto" lets ``choose_kernel`` decide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        input_size: tuple[int, int] = (14, 14),
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        self.kernel = "auto"
        if use_rel_pos:
            head_dim = dim // num_heads
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, head_dim))
            if not rel_pos_zero_init:
                nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
                nn.init.trunc_normal_(self.rel_pos_w, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        qkv = self.qkv(x).view(b, h, w, 3, self.num_heads, -1)
        if self.use_rel_pos:
            kernel = choose_kernel(qkv) if self.kernel == "auto" else self.kernel
            rows, columns = (
                relative_positions(self.rel_pos_h, h),
                relative_positions(self.rel_pos_w, w),
            )
            out = KERNELS[kernel](qkv, rows, columns)
        else:
            q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, c)
        return self.proj(out)
