"""Detectron2's hierarchical backbones with reversible stages: Swin (arXiv 2103.14030) and MViTv2
(arXiv 2112.01526).

Inside a stage, where resolution and width stay, the blocks are steps of a reversible stack. Between
stages, where the stream is pooled or merged, ordinary autograd runs. The networks are Detectron2's
own objects, so their arguments and the names of their parameters are too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.mvit import MViT
from detectron2.modeling.backbone.swin import (
    BasicLayer,
    SwinTransformer,
    window_partition,
    window_reverse,
)
from detectron2.modeling.backbone.utils import get_abs_pos
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dr2net_d2.core import Coefficients, ReversibleSequence

SEPARATED = -100.0
"""Added to attention logits of tokens that the cyclic shift has brought together, as in Swin."""


def mlp(block: Any, x: Tensor) -> Tensor:
    """The second residual function of a Swin or MViT block."""
    return block.drop_path(block.mlp(block.norm2(x)))


def pooling_attention(block: Any, x: Tensor) -> Tensor:
    """The first residual function of an MViT block: (N, H, W, C), its residual pooling included."""
    return block.drop_path(block.attn(block.norm1(x)))


def window_attention(block: Any, x: Tensor) -> Tensor:
    """The first residual function of a Swin block, (N, H, W, C).

    Windows and mask follow from the shape of ``x`` alone, not from what the block has kept of the
    last forward.
    """
    h, w = x.shape[1:3]
    window, shift = block.window_size, block.shift_size
    x = F.pad(block.norm1(x), (0, 0, 0, -w % window, 0, -h % window))
    height, width = x.shape[1:3]
    mask = None
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
        mask = shifted_window_mask(height, width, window, shift, x)
    tokens = window_partition(x, window).flatten(1, 2)
    tokens = block.attn(tokens, mask=mask)
    x = window_reverse(tokens.unflatten(1, (window, window)), window, height, width)
    if shift:
        x = x.roll((shift, shift), (1, 2))
    return block.drop_path(x[:, :h, :w])


def shifted_window_mask(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """(windows, window^2, window^2): 0, or ``SEPARATED`` for tokens that are no neighbours.

    Args:
        height, width: of the padded map, in tokens.
        window, shift: side of a window and how far the map has been rolled, in tokens.
        like: gives dtype and device.
    """

    def part(side: int) -> Tensor:
        # The last window has what was there before, and what was rolled in from the other end.
        position = torch.arange(side, device=like.device)
        return (position >= side - window).int() + (position >= side - shift).int()

    parts = 3 * part(height)[:, None] + part(width)
    tokens = window_partition(parts[None, :, :, None], window).flatten(1)
    return (tokens[:, :, None] != tokens[:, None]).to(like.dtype) * SEPARATED


class ReversibleLayer(BasicLayer):
    """A stage of Swin whose ``blocks`` are a ``ReversibleSequence``."""

    def forward(self, x: Tensor, h: int, w: int) -> tuple[Tensor, int, int, Tensor, int, int]:
        x = self.blocks(x.unflatten(1, (h, w))).flatten(1, 2)
        if self.downsample is None:
            return x, h, w, x, h, w
        down = _between(self.blocks.reversible, self.downsample, x, h, w)
        return x, h, w, down, (h + 1) // 2, (w + 1) // 2


class Dr2NetSwin(SwinTransformer):
    """Detectron2's ``SwinTransformer`` with reversible stages.

    At coefficients (1, 0), where it starts, it computes the same. Its state dict has the
    coefficients of each stage in addition; one without them loads strictly.

    Args:
        reversible, arithmetic, first_state, output: see ``ReversibleSequence``.
        swin: keyword arguments of ``SwinTransformer``.

    Raises:
        ValueError: ``use_checkpoint``, which reversible stages have no use for.
    """

    def __init__(
        self,
        *,
        reversible: bool = True,
        arithmetic: str = "exact",
        first_state: str = "copy",
        output: str = "last",
        **swin: Any,
    ) -> None:
        _refuse_checkpoints("use_checkpoint", swin)
        super().__init__(**swin)
        for layer in self.layers:
            layer.__class__ = ReversibleLayer
            layer.blocks = ReversibleSequence(
                layer.blocks,
                Coefficients(),
                reversible,
                arithmetic,
                first_state,
                output,
                residuals=(window_attention, mlp),
            )


class Dr2NetMViT(MViT):
    """Detectron2's ``MViT`` (MViTv2) with reversible stages.

    A block that pools or widens the stream begins a stage; the blocks after it are reversible. At
    coefficients (1, 0), where it starts, it computes the same. Its state dict has the coefficients
    of each stage in addition; one without them loads strictly.

    Args:
        reversible, arithmetic, first_state, output: see ``ReversibleSequence``.
        mvit: keyword arguments of ``MViT``.

    Raises:
        ValueError: ``use_act_checkpoint``, which reversible stages have no use for.
    """

    def __init__(
        self,
        *,
        reversible: bool = True,
        arithmetic: str = "exact",
        first_state: str = "copy",
        output: str = "last",
        **mvit: Any,
    ) -> None:
        _refuse_checkpoints("use_act_checkpoint", mvit)
        super().__init__(**mvit)
        self.reversible = reversible
        self._first_block_indexes = [0, *(last + 1 for last in self._last_block_indexes[:-1])]
        self.stages = nn.ModuleList()
        for first, last in zip(self._first_block_indexes, self._last_block_indexes, strict=True):
            blocks = self.blocks[first + _changes_stream(self.blocks[first]) : last + 1]
            self.stages.append(
                ReversibleSequence(
                    blocks,
                    Coefficients(),
                    reversible,
                    arithmetic,
                    first_state,
                    output,
                    residuals=(pooling_attention, mlp),
                    adopt=False,  # their names are those of self.blocks
                )
                if blocks
                else nn.Identity()
            )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + get_abs_pos(self.pos_embed, self.pretrain_use_cls_token, x.shape[1:3])
        outputs = {}
        for index, first in enumerate(self._first_block_indexes):
            if _changes_stream(self.blocks[first]):
                x = _between(self.reversible, self.blocks[first], x)
            x = self.stages[index](x)
            name = f"scale{index + 2}"
            if name in self._out_features:
                outputs[name] = self.get_submodule(f"{name}_norm")(x).permute(0, 3, 1, 2)
        return outputs


def _changes_stream(block: nn.Module) -> bool:
    """Whether the shortcut of an MViT block is pooled or projected."""
    return hasattr(block, "pool_skip") or hasattr(block, "proj")


def _between(reversible: bool, module: Callable[..., Tensor], *args: Any) -> Tensor:
    """``module(*args)``, checkpointed beside reversible stages: it would save more than they do."""
    if reversible and torch.is_grad_enabled():
        return checkpoint(module, *args, use_reentrant=False)
    return module(*args)


def _refuse_checkpoints(name: str, arguments: dict[str, Any]) -> None:
    if arguments.get(name):
        raise ValueError(f"{name} is True, but reversible stages recompute already; leave it out")
