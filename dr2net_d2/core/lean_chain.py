"""Layers outside the reversible network that keep little for their backward, exactly.

A chain of layers is cut into regions. Each keeps only its input and runs again in the backward,
up to the last tensor that its backward needs: the input of a convolution that ends the region, so
that this convolution itself is not run again. What a cut costs is thus the convolutions and matrix
products inside regions but not at their ends; norms and activations between are cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Layer = Callable[[Tensor], Tensor]


class BareConvolution:
    """Only the convolution of a module that would apply its norm or activation after it."""

    def __init__(self, module: nn.Conv2d) -> None:
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self._module._conv_forward(x, self._module.weight, self._module.bias)


_PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, BareConvolution)


def lean_chain(layers: Sequence[Layer], x: Tensor, products: int = 1) -> Tensor:
    """Apply layers one after another, keeping for the backward only the inputs of the regions.

    Values and gradients are those of the layers applied plainly. Layers that draw random numbers
    or update statistics do not belong in here, as they run twice.

    Args:
        layers: in the order in which they are applied. A ReLU works in place on the output of the
            layer before it.
        x: input of the first layer. If that is a convolution or a linear layer, autocast's
            low-precision copy of x is what is kept.
        products: number of convolutions and linear layers in a region, which ends after the last of
            them; the others run again in the backward. The first region may have fewer.
    """
    if not torch.is_grad_enabled():
        return _apply(layers, x)
    # The cache would keep low-precision copies of the weights until the autocast region ends.
    with autocast_without_cache(x.device):
        for region in regions_of(layers, products):
            if isinstance(region[0], _PRODUCTS):
                x = in_autocast_dtype(x)
            # When a region runs again it is a chain itself, of regions of one product.
            inner = _apply if len(regions_of(region, 1)) == 1 else lean_chain
            x = checkpoint(inner, region, x, use_reentrant=False, preserve_rng_state=False)
    return x


def regions_of(layers: Sequence[Layer], products: int) -> list[Sequence[Layer]]:
    """Cut a chain after every so many convolutions and linear layers, counted from the last one."""
    after_products = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, _PRODUCTS)]
    count = len(after_products)
    # The last product ends a region; before it, every one that is a multiple of ``products`` away.
    ends = [end for i, end in enumerate(after_products, 1) if (count - i) % products == 0]
    cuts = [0, *ends, len(layers)]
    return [layers[start:end] for start, end in pairwise(cuts) if start < end]


def _apply(layers: Sequence[Layer], x: Tensor) -> Tensor:
    for i, layer in enumerate(layers):
        # The input of a region is kept, so it must not change.
        x = F.relu(x, inplace=i > 0) if type(layer) is nn.ReLU else layer(x)
    return x


def has_inner_hooks(module: nn.Module) -> bool:
    """Whether a submodule has hooks, which would be called again when it runs again."""
    return any(
        submodule._forward_hooks
        or submodule._forward_pre_hooks
        or submodule._backward_hooks
        or submodule._backward_pre_hooks
        for submodule in module.modules()
        if submodule is not module
    )


def in_autocast_dtype(x: Tensor) -> Tensor:
    """``x`` as the active autocast would cast it for a convolution or a matrix product."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


@contextmanager
def autocast_without_cache(device: torch.device) -> Iterator[None]:
    """The active autocast, if any, without its cache of low-precision weights."""
    kind = device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False):
            yield
    else:
        yield


class SharedCast:
    """One low-precision copy of a tensor for several readers.

    Each ``read`` returns the values of ``x.to(dtype)`` in the same storage. Its gradient is cast to
    the dtype of ``x`` before it is added to those of the other readers, as if every reader had cast
    ``x`` for itself.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x
        with torch.no_grad():
            self._copy = in_autocast_dtype(x)

    def read(self) -> Tensor:
        if self._copy.dtype == self._x.dtype:
            return self._x
        out: Tensor = _ReadCopy.apply(self._x, self._copy)
        return out


class _ReadCopy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return copy.detach()  # view_as would change the strides of dimensions of size 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def lean_max_pool(x: Tensor) -> Tensor:
    """2 x 2 max pooling that keeps one byte per output: (N, C, H, W) -> (N, C, H // 2, W // 2)."""
    out: Tensor = _MaxPool2x2.apply(x)
    return out


class _MaxPool2x2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, index = F.max_pool2d(x, kernel_size=2, stride=2, return_indices=True)
        width = x.shape[-1]
        # Which of the four values in the window it was: 0 to 3, row by row.
        corner = (index // width % 2 * 2 + index % width % 2).to(torch.uint8)
        ctx.save_for_backward(corner)
        ctx.shape = x.shape
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (corner,) = ctx.saved_tensors
        out = gradient.new_zeros(ctx.shape)
        height, width = (2 * side for side in gradient.shape[-2:])
        for i in range(4):
            chosen = torch.where(corner == i, gradient, 0)
            out[:, :, i // 2 : height : 2, i % 2 : width : 2] = chosen
        return out


class NormInPieces:
    """LayerNorm over the channels of a map, and an activation, computed some rows at a time.

    It keeps only its input, in the autocast dtype. On a GPU the plain layers keep float32 copies;
    here such copies exist for one piece of the map at a time. Values equal those of the layers;
    gradients of weight and bias are summed piece by piece.

    Args:
        norm: normalises the last dimension of (N, H, W, C).
        activation: elementwise, without parameters.
        low: return the autocast dtype, for a convolution that follows.

    Shape: (N, C, H, W) -> the same, channels last.
    """

    def __init__(self, norm: nn.LayerNorm, activation: Layer | None, low: bool) -> None:
        self._norm = norm
        self._activation = activation
        self._low = low

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = _NormInPieces.apply(x, self._norm.weight, self._norm.bias, self._piece)
        return out

    def _piece(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, self._norm.eps)
        y = y.permute(0, 3, 1, 2)
        y = y if self._activation is None else self._activation(y)
        return in_autocast_dtype(y) if self._low else y


_PIECE_ELEMENTS = 2**22  # 16 MB in float32


class _NormInPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, piece: Any) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.piece = piece
        kind = x.device.type
        ctx.autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": False,
        }
        out: Tensor | None = None
        for rows in _pieces(x):
            y = piece(x[:, :, rows], weight, bias)
            if out is None:
                n, c, h, w = x.shape
                out = y.new_empty(n, h, w, c).permute(0, 3, 1, 2)
            out[:, :, rows] = y
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *affine = (tensor.detach() for tensor in ctx.saved_tensors)
        needed = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x) if needed[0] else None
        grad_affine: list[Tensor | None] = [None, None]  # of weight and bias
        for rows in _pieces(x):
            inputs = [
                tensor.detach().requires_grad_(need)
                for tensor, need in zip((x[:, :, rows], *affine), needed, strict=True)
            ]
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                y = ctx.piece(*inputs)
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            grads = iter(torch.autograd.grad(y, wanted, gradient[:, :, rows]))
            if grad_x is not None:
                grad_x[:, :, rows] = next(grads)
            for i in (0, 1):
                if needed[1 + i]:
                    grad, total = next(grads), grad_affine[i]
                    grad_affine[i] = grad if total is None else total.add_(grad)
        return grad_x, *grad_affine, None


def _pieces(x: Tensor) -> list[slice]:
    rows = max(1, _PIECE_ELEMENTS * x.shape[2] // max(x.numel(), 1))
    return [slice(start, start + rows) for start in range(0, x.shape[2], rows)]
