"""Detectron2's hierarchical backbones with reversible stages: Swin (arXiv 2103.14030) and MViTv2
(arXiv 2112.01526).

Inside a stage, where resolution and width stay the same, the blocks are steps of a reversible
stack. Between stages, where the stream is pooled or merged, ordinary autograd runs. The networks
are subclasses of Detectron2's own and keep its arguments and parameter names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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

ResidualFunction = Callable[[Any, Tensor], Tensor]

SEPARATED = -100.0
"""Added to attention logits of tokens that only the cyclic shift has made adjacent, as in Swin."""


def mlp(block: Any, x: Tensor) -> Tensor:
    """The second residual function of a Swin or MViT block, (N, H, W, C) -> (N, H, W, C)."""
    return block.drop_path(block.mlp(block.norm2(x)))


def pooling_attention(block: Any, x: Tensor) -> Tensor:
    """The first residual function of an MViT block, residual pooling included; shapes as above."""
    return block.drop_path(block.attn(block.norm1(x)))


def window_attention(block: Any, x: Tensor) -> Tensor:
    """The first residual function of a Swin block, (N, H, W, C) -> (N, H, W, C).

    Windows and mask are derived from the shape of ``x`` alone, while Detectron2's block takes them
    from its last forward, which may have been of another image.
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
    """The mask to add to attention logits inside windows of a shifted map.

    Args:
        height, width: size of the padded map, in tokens.
        window: side of a window, in tokens.
        shift: how far the map has been rolled, in tokens.
        like: a tensor with the dtype and device of the mask.

    Returns:
        (windows, window^2, window^2), 0 for tokens from the same region of the map and
        ``SEPARATED`` for others.
    """

    def region(side: int) -> Tensor:
        # The last window has tokens from its own end of the map and from the opposite one.
        position = torch.arange(side, device=like.device)
        return (position >= side - window).int() + (position >= side - shift).int()

    regions = 3 * region(height)[:, None] + region(width)
    tokens = window_partition(regions[None, :, :, None], window).flatten(1)
    return (tokens[:, :, None] != tokens[:, None]).to(like.dtype) * SEPARATED


@dataclass(frozen=True)
class StageOptions:
    """Keyword arguments of ``Dr2NetSwin`` and ``Dr2NetMViT`` in addition to Detectron2's.

    Attributes:
        reversible, arithmetic, first_state, output: as for ``ReversibleSequence``; all stages have
            the same.
    """

    reversible: bool = True
    arithmetic: str = "exact"
    first_state: str = "copy"
    output: str = "last"

    @classmethod
    def split(cls, arguments: Mapping[str, Any]) -> tuple[StageOptions, dict[str, Any]]:
        """Separate these options from the arguments of Detectron2's network."""
        names = {field.name for field in fields(cls)}
        options = {name: value for name, value in arguments.items() if name in names}
        others = {name: value for name, value in arguments.items() if name not in names}
        return cls(**options), others

    def stack(
        self, blocks: Iterable[nn.Module], residuals: Sequence[ResidualFunction], adopt: bool = True
    ) -> ReversibleSequence:
        """Couple the blocks of a stage, starting at coefficients (1, 0)."""
        return ReversibleSequence(
            blocks, Coefficients(), **asdict(self), residuals=residuals, adopt=adopt
        )


class ReversibleStage(nn.Module):
    """A stage of Swin whose ``blocks`` are a ``ReversibleSequence``.

    Args:
        layer: Detectron2's stage, whose blocks and patch merging this one takes.
        options: how the blocks are coupled.
    """

    def __init__(self, layer: BasicLayer, options: StageOptions) -> None:
        super().__init__()
        self.blocks = options.stack(layer.blocks, residuals=(window_attention, mlp))
        self.downsample = layer.downsample
        self.training = layer.training

    def forward(self, x: Tensor, h: int, w: int) -> tuple[Tensor, int, int, Tensor, int, int]:
        """``BasicLayer``'s forward: tokens (N, h * w, C) -> the stage's, and the next stage's."""
        x = self.blocks(x.unflatten(1, (h, w))).flatten(1, 2)
        if self.downsample is None:
            return x, h, w, x, h, w
        merged = _between(self.blocks.reversible, self.downsample, x, h, w)
        return x, h, w, merged, (h + 1) // 2, (w + 1) // 2


class Dr2NetSwin(SwinTransformer):
    """Detectron2's ``SwinTransformer`` with reversible stages.

    At coefficients (1, 0), where it starts, it computes the same as Detectron2's. Its state dict
    also has the coefficients of each stage; a state dict without them loads strictly.

    Args:
        arguments: keyword arguments of ``SwinTransformer`` and of ``StageOptions``.

    Raises:
        ValueError: ``use_checkpoint`` is set, though reversible stages recompute already.
    """

    def __init__(self, **arguments: Any) -> None:
        options, swin = StageOptions.split(arguments)
        _refuse_checkpoints("use_checkpoint", swin)
        super().__init__(**swin)
        for index, layer in enumerate(self.layers):
            self.layers[index] = ReversibleStage(layer, options)


class Dr2NetMViT(MViT):
    """Detectron2's ``MViT`` (MViTv2) with reversible stages.

    A block that pools or widens the stream begins a stage; the blocks after it are reversible. At
    coefficients (1, 0), where it starts, it computes the same as Detectron2's. Its state dict also
    has the coefficients of each stage; a state dict without them loads strictly.

    Args:
        arguments: keyword arguments of ``MViT`` and of ``StageOptions``.

    Raises:
        ValueError: ``use_act_checkpoint`` is set, though reversible stages recompute already.
    """

    def __init__(self, **arguments: Any) -> None:
        options, mvit = StageOptions.split(arguments)
        _refuse_checkpoints("use_act_checkpoint", mvit)
        super().__init__(**mvit)
        self.reversible = options.reversible
        self._first_block_indexes = [0, *(last + 1 for last in self._last_block_indexes[:-1])]
        self.stages = nn.ModuleList()
        for first, last in zip(self._first_block_indexes, self._last_block_indexes, strict=True):
            blocks = self.blocks[first + _changes_stream(self.blocks[first]) : last + 1]
            if blocks:
                # Not adopted: the names of their parameters come from self.blocks.
                residuals = (pooling_attention, mlp)
                self.stages.append(options.stack(blocks, residuals=residuals, adopt=False))
            else:
                self.stages.append(nn.Identity())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``MViT``'s forward: images (N, 3, H, W) -> {"scale<n>": (N, C, H', W')}."""
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
    """``module(*args)``, checkpointed between reversible stages, where it would dominate memory."""
    if reversible and torch.is_grad_enabled():
        return checkpoint(module, *args, use_reentrant=False)
    return module(*args)


def _refuse_checkpoints(name: str, arguments: dict[str, Any]) -> None:
    if arguments.get(name):
        raise ValueError(f"{name} is True, but reversible stages recompute already; leave it out")
