"""Attention with decomposed relative positions, computed in three ways.

    logits[q, k] = <q, k> / sqrt(D) + <q, R_row[y_q, y_k]> + <q, R_column[x_q, x_k]>

The suffix of a tensor's name has one letter for each of its dimensions:
    b       images, or windows
    n       heads
    y, x    row and column of a query token; q counts both, row by row
    u, v    row and column of a key token; k counts both, row by row
    d       channels of a head, D
    t       query, key and value

Of a chunk, b, n, y and q count what is in the chunk. All three ways are functions of
    qkv_byxtnd   query, key and value of every token
    rows_yud     R_row, a vector for every pair of a query's row and a key's row
    columns_xvd  R_column
and give (B, H, W, heads * D), for a grid of H x W tokens.

``matrix_attention`` is the formula as ViTDet writes it, with a logit for every pair of tokens; the
others never hold all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 2**23
"""Bytes of a chunk of logits: it stays in a CPU's cache. On a GPU a chunk is as large as qkv."""

FUSED_WIDTH = 256
"""Largest head dimension that flash attention kernels take."""


class _Plan(NamedTuple):
    device_type: str
    chunks: int | None


_plan: ContextVar[_Plan | None] = ContextVar("plan", default=None)


@contextmanager
def planned_for(device_type: str, chunks: int | None = None) -> Iterator[None]:
    """Choose kernels and chunks as on another device.

    For fake tensors, which stand for a GPU's and live on the CPU.

    Args:
        device_type: "cpu" or "cuda".
        chunks: number of chunks to compute on each axis, which is enough for fake tensors, as all
            chunks are alike; None computes all.
    """
    token = _plan.set(_Plan(device_type, chunks))
    try:
        yield
    finally:
        _plan.reset(token)


def choose_kernel(qkv_byxtnd: Tensor) -> str:
    """Name in ``KERNELS`` of the way that suits the tensor's device and size."""
    _, h, w, _, _, dim = qkv_byxtnd.shape
    fits = dim + h + w <= FUSED_WIDTH
    return "fused" if fits and _device_type(qkv_byxtnd) == "cuda" else "chunked"


def _device_type(qkv: Tensor) -> str:
    plan = _plan.get()
    return plan.device_type if plan else qkv.device.type


def matrix_attention(qkv_byxtnd: Tensor, rows_yud: Tensor, columns_xvd: Tensor) -> Tensor:
    """All N x N logits at once, N = H * W."""
    q_bnyxd, k_bnuvd, v_bnuvd = _heads_first(qkv_byxtnd)
    row_bnyxu, column_bnyxv = _position_logits(q_bnyxd, rows_yud, columns_xvd)
    q_bnqd, k_bnkd, v_bnkd = (t.flatten(2, 3) for t in (q_bnyxd, k_bnuvd, v_bnuvd))
    logits_bnqk = q_bnqd * q_bnqd.shape[-1] ** -0.5 @ k_bnkd.transpose(2, 3)
    logits_bnyxuv = logits_bnqk.view(*row_bnyxu.shape, len(columns_xvd))
    logits_bnyxuv = logits_bnyxuv + row_bnyxu.unsqueeze(-1) + column_bnyxv.unsqueeze(-2)
    out_bnqd = logits_bnyxuv.view_as(logits_bnqk).softmax(-1) @ v_bnkd
    return _heads_last(out_bnqd, qkv_byxtnd)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def fused_attention(qkv_byxtnd: Tensor, rows_yud: Tensor, columns_xvd: Tensor) -> Tensor:
    """``scaled_dot_product_attention`` with the positions as channels, some heads at a time.

    Only qkv and the tables are saved. The backward makes the widened queries, keys and values
    again, and the result that a fused kernel wants for its backward, some heads at a time too.
    """
    dtype = qkv_byxtnd.dtype
    out: Tensor = _Fused.apply(qkv_byxtnd, rows_yud.to(dtype), columns_xvd.to(dtype))
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chunked_attention(qkv_byxtnd: Tensor, rows_yud: Tensor, columns_xvd: Tensor) -> Tensor:
    """Some images, heads and query rows at a time; the backward computes their logits again.

    Saved are qkv, the tables, the result, and one float for each query and head, as in
    FlashAttention (Dao et al., arXiv 2205.14135). Sums over chunks are float32 or better.
    """
    # Under autocast the tables may be of another dtype than the products.
    dtype = qkv_byxtnd.dtype
    out: Tensor = _Chunked.apply(qkv_byxtnd, rows_yud.to(dtype), columns_xvd.to(dtype))
    return out


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matrix": matrix_attention,
    "fused": fused_attention,
    "chunked": chunked_attention,
}


def _heads_first(qkv_byxtnd: Tensor) -> list[Tensor]:
    """q_bnyxd, k_bnuvd, v_bnuvd."""
    return list(qkv_byxtnd.permute(3, 0, 4, 1, 2, 5))


def _heads_last(out_bnqd: Tensor, qkv_byxtnd: Tensor) -> Tensor:
    """(b, n, q, d) -> (b, y, x, n * d)."""
    return out_bnqd.transpose(1, 2).reshape(*qkv_byxtnd.shape[:3], -1)


def _position_logits(
    q_bnyxd: Tensor, rows_yud: Tensor, columns_xvd: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of queries with every row and every column of keys: row_bnyxu, column_bnyxv."""
    return (
        torch.einsum("bnyxd,yud->bnyxu", q_bnyxd, rows_yud),
        torch.einsum("bnyxd,xvd->bnyxv", q_bnyxd, columns_xvd),
    )


def _widened_attention(qkv_byxtnd: Tensor, rows_yud: Tensor, columns_xvd: Tensor) -> Tensor:
    """One fused kernel: (b, y, x, n * d).

    The position logits of a query are appended to it, and to each key the one-hot code of its row
    and column, so that one inner product sums all three terms. These vectors are d + u + v wide: e.
    """
    q_bnyxd, k_bnuvd, v_bnuvd = _heads_first(qkv_byxtnd)
    h, w = len(rows_yud), len(columns_xvd)
    widened_q = (
        q_bnyxd * q_bnyxd.shape[-1] ** -0.5,
        *_position_logits(q_bnyxd, rows_yud, columns_xvd),
    )
    cells_uv = torch.arange(h * w, device=qkv_byxtnd.device).view(h, w)
    codes_uve = torch.cat([F.one_hot(cells_uv // w, h), F.one_hot(cells_uv % w, w)], -1)
    codes_uve = codes_uve.to(k_bnuvd.dtype)
    out_bnqe = F.scaled_dot_product_attention(
        torch.cat(widened_q, -1).flatten(2, 3),
        torch.cat([k_bnuvd, codes_uve.expand(*k_bnuvd.shape[:4], -1)], -1).flatten(2, 3),
        F.pad(v_bnuvd, (0, h + w)).flatten(2, 3),  # fused kernels want one width
        scale=1.0,
    )
    return _heads_last(out_bnqe[..., : v_bnuvd.shape[-1]], qkv_byxtnd)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_byxtnd: Tensor, rows_yud: Tensor, columns_xvd: Tensor) -> Tensor:
        ctx.save_for_backward(qkv_byxtnd, rows_yud, columns_xvd)
        b, h, w, _, heads, dim = qkv_byxtnd.shape
        out_byxnd = qkv_byxtnd.new_empty(b, h, w, heads, dim)
        for some in _heads_to_widen(qkv_byxtnd):
            out = _widened_attention(qkv_byxtnd[..., some, :], rows_yud, columns_xvd)
            out_byxnd[..., some, :] = out.view_as(out_byxnd[..., some, :])
        return out_byxnd.flatten(3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv_byxtnd, rows_yud, columns_xvd = ctx.saved_tensors
        grad_qkv_byxtnd = torch.empty_like(qkv_byxtnd)
        sum_dtype = _sum_dtype(qkv_byxtnd)
        grad_rows_yud = torch.zeros_like(rows_yud, dtype=sum_dtype)
        grad_columns_xvd = torch.zeros_like(columns_xvd, dtype=sum_dtype)
        grad_out_byxnd = grad_out.view(*qkv_byxtnd.shape[:3], *qkv_byxtnd.shape[4:])
        for some in _heads_to_widen(qkv_byxtnd):
            tensors = (qkv_byxtnd[..., some, :], rows_yud, columns_xvd)
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            with torch.enable_grad(), torch.autocast(qkv_byxtnd.device.type, enabled=False):
                out = _widened_attention(*leaves)
            grads = torch.autograd.grad(out, leaves, grad_out_byxnd[..., some, :].flatten(3))
            del out
            grad_qkv_byxtnd[..., some, :] = grads[0]
            grad_rows_yud += grads[1]
            grad_columns_xvd += grads[2]
        return (
            grad_qkv_byxtnd,
            grad_rows_yud.to(rows_yud.dtype),
            grad_columns_xvd.to(columns_xvd.dtype),
        )


def _heads_to_widen(qkv_byxtnd: Tensor) -> list[slice]:
    """Heads at a time, so that the backward's eight wide tensors hold about 5/3 of qkv's bytes."""
    _, h, w, _, heads, dim = qkv_byxtnd.shape
    return _slices(heads, max(1, 5 * heads * dim // (8 * (dim + h + w))))


class _Chunked(torch.autograd.Function):
    # A name keeps its tensor until the next chunk has one, so large temporaries have none.

    @staticmethod
    def forward(ctx: Any, qkv_byxtnd: Tensor, rows_yud: Tensor, columns_xvd: Tensor) -> Tensor:
        b, h, w, _, heads, dim = qkv_byxtnd.shape
        out_byxnd = qkv_byxtnd.new_empty(b, h, w, heads, dim)
        # log of the sum of the exponentials of every query's logits
        lse_bnyx = qkv_byxtnd.new_empty(b, heads, h, w, dtype=_sum_dtype(qkv_byxtnd))
        for images, some_heads in _groups(qkv_byxtnd):
            q_bnyxd, k_bnkd, v_bnkd = _of_group(qkv_byxtnd, images, some_heads)
            out_bnyxd = torch.empty_like(q_bnyxd)
            for some_rows in _row_slices(qkv_byxtnd):
                chunk_bnyxd = q_bnyxd[:, :, some_rows]
                logits_bnqk = _logits(chunk_bnyxd, k_bnkd, rows_yud[some_rows], columns_xvd)
                largest_bnq1 = logits_bnqk.amax(-1, keepdim=True)
                # From here on in place: the exponentials, then the log of their sum.
                total_bnq1 = logits_bnqk.sub_(largest_bnq1).exp_().sum(-1, keepdim=True)
                mean_bnqd = (logits_bnqk.to(qkv_byxtnd.dtype) @ v_bnkd).div_(total_bnq1)
                out_bnyxd[:, :, some_rows] = mean_bnqd.view_as(chunk_bnyxd)
                lse_bnyx[images, some_heads, some_rows] = (largest_bnq1 + total_bnq1.log_()).view(
                    chunk_bnyxd.shape[:-1]
                )
            out_byxnd[images, :, :, some_heads] = out_bnyxd.permute(0, 2, 3, 1, 4)
        ctx.save_for_backward(qkv_byxtnd, rows_yud, columns_xvd, out_byxnd, lse_bnyx)
        return out_byxnd.view(b, h, w, heads * dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # For one query of one head, with p its softmax, o its result and g the gradient of o:
        #     grad v_k = p_k g,   grad logit_k = p_k (<g, v_k> - <g, o>)
        qkv_byxtnd, rows_yud, columns_xvd, out_byxnd, lse_bnyx = ctx.saved_tensors
        dtype, sum_dtype = qkv_byxtnd.dtype, lse_bnyx.dtype
        grad_qkv_byxtnd = torch.empty_like(qkv_byxtnd)
        grad_rows_yud = torch.zeros_like(rows_yud, dtype=sum_dtype)
        grad_columns_xvd = torch.zeros_like(columns_xvd, dtype=sum_dtype)
        g_byxnd = grad_out.view_as(out_byxnd)
        go_byxn = (g_byxnd * out_byxnd).sum(-1, dtype=sum_dtype)  # <g, o>
        for images, some_heads in _groups(qkv_byxtnd):
            q_bnyxd, k_bnkd, v_bnkd = _of_group(qkv_byxtnd, images, some_heads)
            grad_tbnyxd = torch.zeros(3, *q_bnyxd.shape, dtype=sum_dtype, device=q_bnyxd.device)
            grad_q_bnyxd = grad_tbnyxd[0]
            grad_k_bnkd, grad_v_bnkd = grad_tbnyxd[1:].flatten(3, 4)
            g_bnyxd = g_byxnd[images, :, :, some_heads].permute(0, 3, 1, 2, 4).contiguous()
            go_bnyx = go_byxn[images, :, :, some_heads].permute(0, 3, 1, 2)
            for some_rows in _row_slices(qkv_byxtnd):
                chunk_bnyxd = q_bnyxd[:, :, some_rows]
                g_bnqd = g_bnyxd[:, :, some_rows].flatten(2, 3)
                shape_bnq1 = (*g_bnqd.shape[:-1], 1)
                p_bnqk = _logits(chunk_bnyxd, k_bnkd, rows_yud[some_rows], columns_xvd)
                p_bnqk.sub_(lse_bnyx[images, some_heads, some_rows].reshape(shape_bnq1)).exp_()
                grad_v_bnkd += p_bnqk.to(dtype).mT @ g_bnqd
                grad_logits_bnqk = (g_bnqd @ v_bnkd.mT).to(sum_dtype)
                grad_logits_bnqk.sub_(go_bnyx[:, :, some_rows].reshape(shape_bnq1)).mul_(p_bnqk)
                del p_bnqk
                shape_bnyxuv = (*chunk_bnyxd.shape[:4], *q_bnyxd.shape[2:4])
                grad_logits_bnyxuv = grad_logits_bnqk.view(shape_bnyxuv)
                row_bnyxu = grad_logits_bnyxuv.sum(-1).to(dtype)
                column_bnyxv = grad_logits_bnyxuv.sum(-2).to(dtype)
                del grad_logits_bnyxuv
                grad_rows_yud[some_rows] += torch.einsum("bnyxu,bnyxd->yud", row_bnyxu, chunk_bnyxd)
                grad_columns_xvd += torch.einsum("bnyxv,bnyxd->xvd", column_bnyxv, chunk_bnyxd)
                grad_logits_bnqk = grad_logits_bnqk.to(dtype)
                grad_k_bnkd += grad_logits_bnqk.mT @ chunk_bnyxd.flatten(2, 3)
                grad_q_bnyxd[:, :, some_rows] = (grad_logits_bnqk @ k_bnkd).view_as(chunk_bnyxd)
                grad_q_bnyxd[:, :, some_rows] += torch.einsum(
                    "bnyxu,yud->bnyxd", row_bnyxu, rows_yud[some_rows]
                )
                grad_q_bnyxd[:, :, some_rows] += torch.einsum(
                    "bnyxv,xvd->bnyxd", column_bnyxv, columns_xvd
                )
            grad_k_bnkd *= q_bnyxd.shape[-1] ** -0.5
            grad_qkv_byxtnd[images, :, :, :, some_heads] = grad_tbnyxd.permute(1, 3, 4, 0, 2, 5)
        return (
            grad_qkv_byxtnd,
            grad_rows_yud.to(rows_yud.dtype),
            grad_columns_xvd.to(columns_xvd.dtype),
        )


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _rows_at_once(qkv_byxtnd: Tensor) -> int:
    """Rows of queries of one head whose logits fill a chunk; may be more than there are."""
    _, h, w, _, _, _ = qkv_byxtnd.shape
    on_cpu = _device_type(qkv_byxtnd) == "cpu"
    limit = CHUNK_BYTES if on_cpu else max(CHUNK_BYTES, qkv_byxtnd.nbytes)
    return max(1, limit // (w * h * w * _sum_dtype(qkv_byxtnd).itemsize))


def _row_slices(qkv_byxtnd: Tensor) -> list[slice]:
    return _slices(qkv_byxtnd.shape[1], _rows_at_once(qkv_byxtnd))


def _groups(qkv_byxtnd: Tensor) -> list[tuple[slice, slice]]:
    """Images and heads that are worked on together."""
    b, h, _, _, heads, _ = qkv_byxtnd.shape
    heads_at_once = max(1, _rows_at_once(qkv_byxtnd) // h)
    images_at_once = max(1, heads_at_once // heads)
    return [
        (images, some_heads)
        for images in _slices(b, images_at_once)
        for some_heads in _slices(heads, heads_at_once)
    ]


def _slices(length: int, at_once: int) -> list[slice]:
    plan = _plan.get()
    starts = range(0, length, at_once)[: plan.chunks if plan else None]
    return [slice(start, min(start + at_once, length)) for start in starts]


def _of_group(
    qkv_byxtnd: Tensor, images: slice, some_heads: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Query q_bnyxd, scaled key k_bnkd and value v_bnkd of some images and heads."""
    qkv_byxtnd = qkv_byxtnd[images, :, :, :, some_heads]
    q_bnyxd, k_bnuvd, v_bnuvd = qkv_byxtnd.permute(3, 0, 4, 1, 2, 5).contiguous()
    k_bnuvd = k_bnuvd * k_bnuvd.shape[-1] ** -0.5
    return q_bnyxd, k_bnuvd.flatten(2, 3), v_bnuvd.flatten(2, 3)


def _logits(q_bnyxd: Tensor, k_bnkd: Tensor, rows_yud: Tensor, columns_xvd: Tensor) -> Tensor:
    """logits_bnqk of the queries of some rows, in ``_sum_dtype``."""
    row_bnyxu, column_bnyxv = _position_logits(q_bnyxd, rows_yud, columns_xvd)
    logits_bnqk = (q_bnyxd.flatten(2, 3) @ k_bnkd.mT).to(_sum_dtype(q_bnyxd))
    logits_bnyxuv = logits_bnqk.view(*row_bnyxu.shape, len(columns_xvd))
    logits_bnyxuv += row_bnyxu.unsqueeze(-1)
    logits_bnyxuv += column_bnyxv.unsqueeze(-2)
    return logits_bnqk
