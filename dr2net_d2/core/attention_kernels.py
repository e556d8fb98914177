"""Attention with decomposed relative positions, computed in three ways.

    logits[q, k] = <q, k> / sqrt(D) + <q, R_row[y_q, y_k]> + <q, R_column[x_q, x_k]>

Legend, shared by the three functions:
    qkv      (B, H, W, 3, heads, D): query, key and value of every token
    rows     (H, H, D): R_row, the vector of every (query row, key row)
    columns  (W, W, D): R_column
    result   (B, H, W, heads * D)

``matrix_attention`` is the formula as ViTDet writes it, with a logit of every pair of tokens; the
others never hold them all. N = H * W below.
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
"""Of logits: what stays in a processor's cache. On other devices a chunk is as large as qkv."""

FUSED_WIDTH = 256
"""The largest head dimension of flash attention kernels."""


class _Plan(NamedTuple):
    device_type: str
    chunks: int | None


_plan: ContextVar[_Plan | None] = ContextVar("plan", default=None)


@contextmanager
def planned_for(device_type: str, chunks: int | None = None) -> Iterator[None]:
    """Choose as on another device: fake tensors that stand for a GPU's live on the CPU.

    Args:
        device_type: "cpu" or "cuda".
        chunks: that are gone through on each axis; for fake tensors, of which all chunks are alike.
    """
    token = _plan.set(_Plan(device_type, chunks))
    try:
        yield
    finally:
        _plan.reset(token)


def choose_kernel(qkv: Tensor) -> str:
    """The name in ``KERNELS`` of the way that suits qkv's device and size."""
    _, h, w, _, _, dim = qkv.shape
    fits = dim + h + w <= FUSED_WIDTH
    return "fused" if fits and _device_type(qkv) == "cuda" else "chunked"


def _device_type(qkv: Tensor) -> str:
    plan = _plan.get()
    return plan.device_type if plan else qkv.device.type


def matrix_attention(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """All N x N logits at once."""
    q, k, v = _heads_first(qkv)
    on_row, on_column = _position_logits(q, rows, columns)
    q, k, v = (t.flatten(2, 3) for t in (q, k, v))
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
    pairs = logits.view(*on_row.shape, len(columns))
    pairs = pairs + on_row.unsqueeze(-1) + on_column.unsqueeze(-2)
    return _heads_last(pairs.view_as(logits).softmax(-1) @ v, qkv)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def fused_attention(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``scaled_dot_product_attention`` with the positions as channels, some heads at a time.

    Saved is qkv alone: the widened queries, keys and values, and the result that a fused kernel
    wants for its backward, are made again for these heads.
    """
    out: Tensor = _Fused.apply(qkv, rows.to(qkv.dtype), columns.to(qkv.dtype))
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chunked_attention(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Some images, heads and query rows at a time; the backward computes their logits again.

    Saved are qkv, the result and one float per query and head, as in FlashAttention (Dao et al.,
    arXiv 2205.14135). Sums over chunks are float32 or better.
    """
    # Under autocast the tables may be of another dtype than the products.
    out: Tensor = _Chunked.apply(qkv, rows.to(qkv.dtype), columns.to(qkv.dtype))
    return out


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matrix": matrix_attention,
    "fused": fused_attention,
    "chunked": chunked_attention,
}


def _heads_first(qkv: Tensor) -> list[Tensor]:
    """q, k, v, each (B, heads, H, W, D)."""
    return list(qkv.permute(3, 0, 4, 1, 2, 5))


def _heads_last(out: Tensor, qkv: Tensor) -> Tensor:
    """(B, heads, N, D) -> (B, H, W, heads * D)."""
    return out.transpose(1, 2).reshape(*qkv.shape[:3], -1)


def _position_logits(q: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, heads, rows, W, D) -> its logits with every key row and with every key column."""
    return (
        torch.einsum("bnywd,ykd->bnywk", q, rows),
        torch.einsum("bnywd,wkd->bnywk", q, columns),
    )


def _widened_attention(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """One fused kernel: (B, H, W, heads * D).

    A query's position logits are appended to it, to a key the one-hot code of its row and column:
    one inner product sums all three terms.
    """
    q, k, v = _heads_first(qkv)
    h, w = len(rows), len(columns)
    queries = (q * q.shape[-1] ** -0.5, *_position_logits(q, rows, columns))
    cells = torch.arange(h * w, device=qkv.device).view(h, w)
    place = torch.cat([F.one_hot(cells // w, h), F.one_hot(cells % w, w)], -1).to(k.dtype)
    out = F.scaled_dot_product_attention(
        torch.cat(queries, -1).flatten(2, 3),
        torch.cat([k, place.expand(*k.shape[:4], -1)], -1).flatten(2, 3),
        F.pad(v, (0, h + w)).flatten(2, 3),  # fused kernels want one width
        scale=1.0,
    )
    return _heads_last(out[..., : v.shape[-1]], qkv)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(qkv, rows, columns)
        out = qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])
        for heads in _heads_to_widen(qkv):
            some = _widened_attention(qkv[..., heads, :], rows, columns)
            out[..., heads, :] = some.view_as(out[..., heads, :])
        return out.flatten(3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv, rows, columns = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        sums = [torch.zeros_like(t, dtype=_sum_dtype(qkv)) for t in (rows, columns)]
        grad = grad.view(*qkv.shape[:3], *qkv.shape[4:])
        for heads in _heads_to_widen(qkv):
            tensors = (qkv[..., heads, :], rows, columns)
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            with torch.enable_grad(), torch.autocast(qkv.device.type, enabled=False):
                out = _widened_attention(*leaves)
            grad_part, *of_tables = torch.autograd.grad(out, leaves, grad[..., heads, :].flatten(3))
            del out
            grad_qkv[..., heads, :] = grad_part
            for total, of_table in zip(sums, of_tables, strict=True):
                total += of_table
        return grad_qkv, sums[0].to(rows.dtype), sums[1].to(columns.dtype)


def _heads_to_widen(qkv: Tensor) -> list[slice]:
    """Heads at a time, so that the backward's eight wide tensors hold about 5/3 of qkv's bytes."""
    _, h, w, _, heads, dim = qkv.shape
    return _slices(heads, max(1, 5 * heads * dim // (8 * (dim + h + w))))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        b, h, w, _, heads, dim = qkv.shape
        out = qkv.new_empty(b, h, w, heads, dim)
        # log of the sum of the exponentials of every query's logits
        lse = qkv.new_empty(b, heads, h, w, dtype=_sum_dtype(qkv))
        for group in _groups(qkv):
            q, k, v = _of_group(qkv, group)
            result = torch.empty_like(q)
            for some in _row_slices(qkv):
                logits = _logits(q[:, :, some], k, rows[some], columns)
                largest = logits.amax(-1, keepdim=True)
                total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
                mean = (logits.to(qkv.dtype) @ v.flatten(2, 3)).div_(total)
                result[:, :, some] = mean.view_as(q[:, :, some])
                lse[(*group, some)] = (largest + total.log_()).view(q[:, :, some].shape[:-1])
            out[group[0], :, :, group[1]] = result.permute(0, 2, 3, 1, 4)
        ctx.save_for_backward(qkv, rows, columns, out, lse)
        return out.view(b, h, w, heads * dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv, rows, columns, out, lse = ctx.saved_tensors
        dtype = qkv.dtype
        grad_qkv = torch.empty_like(qkv)
        grad_rows, grad_columns = (torch.zeros_like(t, dtype=lse.dtype) for t in (rows, columns))
        grad = grad.view_as(out)
        mean = (grad * out).sum(-1, dtype=lse.dtype)
        for group in _groups(qkv):
            q, k, v = _of_group(qkv, group)
            grad_group = torch.zeros(3, *q.shape, dtype=lse.dtype, device=q.device)
            grad_q, grad_k, grad_v = grad_group
            grad_out = grad[group[0], :, :, group[1]].permute(0, 3, 1, 2, 4).contiguous()
            means = mean[group[0], :, :, group[1]].permute(0, 3, 1, 2)
            for some in _row_slices(qkv):
                queries, g = q[:, :, some], grad_out[:, :, some].flatten(2, 3)
                weights = _logits(queries, k, rows[some], columns)
                weights.sub_(lse[(*group, some)].reshape(*g.shape[:-1], 1)).exp_()
                grad_v += (weights.to(dtype).mT @ g).view_as(v)
                grad_logits = (g @ v.flatten(2, 3).mT).to(lse.dtype)
                grad_logits.sub_(means[:, :, some].reshape(*g.shape[:-1], 1)).mul_(weights)
                del weights
                pairs = grad_logits.view(*queries.shape[:4], *q.shape[2:4])
                on_row, on_column = pairs.sum(-1).to(dtype), pairs.sum(-2).to(dtype)
                del pairs
                grad_rows[some] += torch.einsum("bnywk,bnywd->ykd", on_row, queries)
                grad_columns += torch.einsum("bnywk,bnywd->wkd", on_column, queries)
                grad_logits = grad_logits.to(dtype)
                grad_k += (grad_logits.mT @ queries.flatten(2, 3)).view_as(k)
                grad_q[:, :, some] = (grad_logits @ k.flatten(2, 3)).view_as(queries)
                grad_q[:, :, some] += torch.einsum("bnywk,ykd->bnywd", on_row, rows[some])
                grad_q[:, :, some] += torch.einsum("bnywk,wkd->bnywd", on_column, columns)
            grad_k *= q.shape[-1] ** -0.5
            grad_qkv[group[0], :, :, :, group[1]] = grad_group.permute(1, 3, 4, 0, 2, 5)
        return grad_qkv, grad_rows.to(rows.dtype), grad_columns.to(columns.dtype)


def _sum_dtype(qkv: Tensor) -> torch.dtype:
    return torch.promote_types(qkv.dtype, torch.float32)


def _rows_at_once(qkv: Tensor) -> int:
    """Rows of queries of one head whose logits make a chunk; it may be more than there are."""
    _, h, w, _, _, _ = qkv.shape
    limit = CHUNK_BYTES if _device_type(qkv) == "cpu" else max(CHUNK_BYTES, qkv.nbytes)
    return max(1, limit // (w * h * w * _sum_dtype(qkv).itemsize))


def _row_slices(qkv: Tensor) -> list[slice]:
    return _slices(qkv.shape[1], _rows_at_once(qkv))


def _groups(qkv: Tensor) -> list[tuple[slice, slice]]:
    """Images and heads that are worked on together."""
    b, h, _, _, heads, _ = qkv.shape
    heads_at_once = max(1, _rows_at_once(qkv) // h)
    images_at_once = max(1, heads_at_once // heads)
    return [
        (images, some)
        for images in _slices(b, images_at_once)
        for some in _slices(heads, heads_at_once)
    ]


def _slices(length: int, at_once: int) -> list[slice]:
    plan = _plan.get()
    starts = range(0, length, at_once)[: plan.chunks if plan else None]
    return [slice(start, min(start + at_once, length)) for start in starts]


def _of_group(qkv: Tensor, group: tuple[slice, slice]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, scaled key and value of some images and heads, (images, heads, H, W, D)."""
    q, k, v = qkv[group[0], :, :, :, group[1]].permute(3, 0, 4, 1, 2, 5).contiguous()
    return q, k * k.shape[-1] ** -0.5, v


def _logits(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(images, heads, rows * W, N) of the queries of some rows, in ``_sum_dtype``."""
    on_row, on_column = _position_logits(q, rows, columns)
    logits = (q.flatten(2, 3) @ k.flatten(2, 3).mT).to(_sum_dtype(q))
    pairs = logits.view(*on_row.shape, len(columns))
    pairs += on_row.unsqueeze(-1)
    pairs += on_column.unsqueeze(-2)
    return logits
